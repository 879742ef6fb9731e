"""Generate datasets: the run loop and its Lightning adapters. The only package that imports Lightning."""
