# docker build -t madgen .
# docker run --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/data" madgen generate jobs/alps.yaml
FROM python:3.11-slim

COPY . /opt/madgen
# PyTorch's wheels contain CUDA; the host provides the driver.
RUN pip install --no-cache-dir -c /opt/madgen/constraints.txt '/opt/madgen[s3,gcs,eval]'

ENV HF_HOME=/data/.cache/huggingface MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data
ENTRYPOINT ["madgen"]
CMD ["--help"]
