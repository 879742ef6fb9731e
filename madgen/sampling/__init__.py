"""Sample panoramas from prompts and seeds; independent of datasets, files and Lightning."""
