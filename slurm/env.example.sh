# Copy and edit this file, then `export MADGEN_ENV=$PWD/env.sh` before sbatch, or use `madgen submit --env env.sh`.
# It is sourced on the first node of the job, before srun, which passes the environment to every rank.

# Python environment with madgen.
# module load cuda
# source /path/to/venv/bin/activate
# Or an Apptainer image, built from slurm/apptainer/madgen.def:
# export MADGEN_SIF=/shared/madgen.sif PATH=/path/to/checkout/slurm/apptainer:$PATH

# Threads per rank. On a CPU it may change the last bits of an image: use the same number for a whole dataset.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Compute nodes rarely have a network. `madgen fetch JOB.yaml` on the login node fills this cache; it must be on a file
# system that all nodes share.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=1

# Ranks communicate only at the start, over gloo, so NCCL needs no settings. If the nodes cannot reach each other over
# the network of their host name, set the right interface:
# export GLOO_SOCKET_IFNAME=ib0

# Maximum number of restarts of a preempted or timed-out job.
# export MADGEN_MAX_RESTARTS=100
