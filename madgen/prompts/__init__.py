"""Prompt files to a table of prompts: a pure function of the job, independent of workers and of torch."""
