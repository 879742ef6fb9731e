"""Reads a dataset in any order with PyTorch alone: `python load_pytorch.py out/demo`. Needs pyarrow and Pillow too.

`index.parquet` says where each sample's bytes lie, so nothing is unpacked, and rows can be chosen before.
"""

import io
import sys
import tarfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from pyarrow import parquet


class Panoramas(torch.utils.data.Dataset):
    """uint8 [3, H, W] and the prompt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = parquet.read_table(folder / "index.parquet").to_pylist()  # choose here, by scores for example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        row = self.rows[index]
        with open(self.folder / "shards" / f"{row['shard']}.tar", "rb") as stream:
            stream.seek(row["offset"])
            records = io.BytesIO(stream.read(row["size"]))
        with tarfile.open(fileobj=records) as sample:
            member = next(name for name in sample.getnames() if name.endswith((".png", ".jpg", ".webp")))
            picture = Image.open(sample.extractfile(member)).convert("RGB")
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1), row["prompt"]


if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Panoramas(Path(sys.argv[1])), batch_size=4, shuffle=True)
    for pictures, prompts in loader:  # of one size: sort rows by size, or crop, where they differ
        print(tuple(pictures.shape), prompts)
