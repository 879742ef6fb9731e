"""Launch, ranks, signals, time limits and SLURM."""
