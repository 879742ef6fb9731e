"""Synthetic datasets, and small random networks."""

from pathlib import Path

import pytest
import torch
from synthetic import PROMPTS, cut, textures, write_dataset


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """An untrained CLIP of the demo's shape, in the transformers layout."""
    from madgen.demo.scenes import vocabulary
    from madgen.demo.tokenizer import build_tokenizer
    from madgen.demo.training.train_clip import new_clip, save_clip

    folder = tmp_path_factory.mktemp("clip") / "openai-random-clip"  # torchmetrics loads no CLIP of another name
    folder.mkdir()
    torch.manual_seed(5)  # gives cosines above 0
    tokenizer = build_tokenizer(vocabulary(), folder)
    model = new_clip(tokenizer)
    save_clip(model, tokenizer, folder)
    model.save_pretrained(folder)  # in float32: torchmetrics would compute in float16
    return folder


@pytest.fixture(scope="session")
def networks(clip_folder):
    """The random CLIP, and untrained VGGs."""
    from madgen.metrics.extractors import Extractors, parse

    return Extractors(parse(f"{clip_folder},vgg=random"), torch.device("cpu"))


@pytest.fixture(scope="session")
def panoramas(tmp_path_factory):
    """10 panoramas of 32x112 px of two prompts: three crops each, and something left over."""
    return textures(PROMPTS, 5, 32, 112)


@pytest.fixture(scope="session")
def pictures(panoramas):
    """The same, cut."""
    return cut(panoramas)


@pytest.fixture
def dataset(tmp_path):
    """`dataset("name", samples, per_shard=3)`."""
    return lambda name, samples, **options: write_dataset(tmp_path / name, samples, **options)
