"""A CLIP for the scores: untrained, so that these tests need no weights."""

import pytest
import torch


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    from madgen.demo.scenes import vocabulary
    from madgen.demo.tokenizer import build_tokenizer
    from madgen.demo.train_clip import new_clip, save_clip

    folder = tmp_path_factory.mktemp("clip") / "openai-random-clip"
    folder.mkdir()
    torch.manual_seed(5)
    tokenizer = build_tokenizer(vocabulary(), folder)
    save_clip(new_clip(tokenizer), tokenizer, folder)
    return folder
