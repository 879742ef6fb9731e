"""The job schema and the loader of job files. The only package that imports OmegaConf."""
