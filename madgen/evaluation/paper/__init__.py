"""Reproduce tables and figures of the paper, each from one file in `jobs/paper/`."""
