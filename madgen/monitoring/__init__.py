"""Monitoring of runs: progress, status from files, Weights & Biases, the gallery."""
