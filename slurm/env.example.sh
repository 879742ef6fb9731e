# Copy it, change it, and name the copy: export MADGEN_ENV=$PWD/env.sh before sbatch, or madgen submit --env env.sh.
# It is sourced on the first node of the job, before srun; srun hands the environment on to every rank.

# Python: the environment that madgen is installed in.
# module load cuda
# source /path/to/venv/bin/activate

# Threads of one rank on a CPU. On a CPU it may change the last bits of a picture: keep it the same for one dataset.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Compute nodes rarely have a network. `madgen fetch JOB.yaml` on the login node fills this cache; it must lie on a file
# system that the nodes see.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=1

# The ranks meet once, when they start, and exchange nothing afterwards: over gloo, so NCCL needs no settings. Where the
# nodes' host name is bound to a network that they cannot reach each other by, name the right one:
# export GLOO_SOCKET_IFNAME=ib0

# How often a preempted or timed-out job may requeue itself.
# export MADGEN_MAX_RESTARTS=100
