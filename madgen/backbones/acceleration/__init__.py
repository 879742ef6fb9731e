"""Faster execution of the same network: compilation, CUDA graphs, CPU kernels, shared computation."""
