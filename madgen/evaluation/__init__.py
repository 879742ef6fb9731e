"""Score finished datasets, write reports and reproduce the paper's tables and figures."""
