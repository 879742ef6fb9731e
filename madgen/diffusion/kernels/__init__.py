"""Fast implementations of single operations: Triton split and merge, oneDNN matrix products."""
