"""Cost and running time of a job, before it runs. Loads no weights."""
