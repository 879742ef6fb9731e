"""Watching a run: progress, Weights & Biases, status from files, the gallery. The only home of wandb."""
