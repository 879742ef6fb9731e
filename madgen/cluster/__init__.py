"""Launchers, ranks, signals, time limits and SLURM scripts."""
