"""Reads a dataset with Hugging Face datasets: `python load_datasets.py out/demo`, or the id of one on the hub.

The card says how. Without `streaming` it is copied into the cache, and can be indexed, filtered and shuffled.
"""

import sys

import datasets

table = datasets.load_dataset(sys.argv[1], split="train", streaming=True)
picture = next(name for name in ("png", "jpg", "webp") if name in table.features)
for sample in table:
    print(sample["__key__"], sample[picture].size, sample["json"]["seed"], sample["txt"])
