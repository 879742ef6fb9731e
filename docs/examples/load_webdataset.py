"""Reads a dataset as a stream with webdataset: `python load_webdataset.py out/demo`. Needs webdataset and Pillow."""

import sys
from pathlib import Path

import webdataset

shards = sorted(str(path) for path in Path(sys.argv[1], "shards").glob("*.tar"))
samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).decode("pil")
for picture, about in samples.to_tuple("png;jpg;webp", "json"):
    print(about["key"], picture.size, about["seed"], about.get("scores"), about["prompt"])
