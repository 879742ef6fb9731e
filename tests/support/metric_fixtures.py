"""Synthetic datasets and small random networks."""

from pathlib import Path

import pytest
import torch
from synthetic import PROMPTS, cut, textures, write_dataset


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Save an untrained CLIP of the demo's shape in the transformers layout."""
    from demo_backbone.scenes import vocabulary
    from demo_backbone.tokenizer import build_tokenizer
    from demo_backbone.train_clip import new_clip, save_clip

    folder = tmp_path_factory.mktemp("clip") / "openai-random-clip"  # torchmetrics accepts no other names
    folder.mkdir()
    torch.manual_seed(5)  # a seed with positive cosines
    tokenizer = build_tokenizer(vocabulary(), folder)
    model = new_clip(tokenizer)
    save_clip(model, tokenizer, folder)
    model.save_pretrained(folder)  # save_clip stores float16, in which torchmetrics would compute
    return folder


@pytest.fixture(scope="session")
def networks(clip_folder):
    """The random CLIP and untrained VGGs."""
    from madgen.metrics.extractors import Extractors, parse

    return Extractors(parse(f"{clip_folder},vgg=random"), torch.device("cpu"))


@pytest.fixture(scope="session")
def panoramas(tmp_path_factory):
    """10 panoramas of 32x112 px for two prompts: three crops each and a remainder."""
    return textures(PROMPTS, 5, 32, 112)


@pytest.fixture(scope="session")
def images(panoramas):
    """The same panoramas with their crops."""
    return cut(panoramas)


@pytest.fixture
def dataset(tmp_path):
    """Return a function to write a dataset: `dataset("name", samples, per_shard=3)`."""
    return lambda name, samples, **options: write_dataset(tmp_path / name, samples, **options)
