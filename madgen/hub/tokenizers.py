"""What text encoders do not see: prompts that are longer than their tokenizers take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.hub.model_configs import config_source
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class TextLimit:
    """How many tokens a checkpoint's text encoders take; its tokenizers, loaded when asked for."""

    tokens: int
    """With those that mark the beginning and the end."""
    where: str
    """A folder or a hub id."""
    revision: str | None
    subfolders: tuple[str, ...]

    def load(self) -> list[Any] | None:
        """The tokenizers, None if they are not at hand."""
        from transformers import CLIPTokenizer

        try:
            return [
                CLIPTokenizer.from_pretrained(
                    self.where, subfolder=subfolder, revision=self.revision, local_files_only=True
                )
                for subfolder in self.subfolders
            ]
        except (OSError, ValueError):
            return None


def text_limit(
    subfolders: tuple[str, ...], pretrained: str, revision: str | None, config: str | None
) -> TextLimit | None:
    """The limit of a checkpoint, from the config files of its tokenizers; None if they are not at hand."""
    try:
        where = config_source(pretrained, revision, config)
        limits = [_limit(where, revision, subfolder) for subfolder in subfolders]
    except UserError:
        return None
    known = [limit for limit in limits if limit is not None]
    return TextLimit(min(known), where, revision, subfolders) if len(known) == len(subfolders) else None


def _limit(where: str, revision: str | None, subfolder: str) -> int | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = f"{subfolder}/tokenizer_config.json"
    try:
        found = Path(where) / name if Path(where).is_dir() else try_to_load_from_cache(where, name, revision=revision)
        limit = (
            json.loads(Path(found).read_text(encoding="utf-8"))["model_max_length"]
            if isinstance(found, str | Path)
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, HFValidationError):
        return None
    return limit if type(limit) is int else None


def cut_texts(tokenizers: Sequence[Any], texts: Sequence[str]) -> list[str | None]:
    """What of each text is cut off by the first of the tokenizers to do so, None if all of it fits."""
    starts: list[int | None] = [None] * len(texts)
    for tokenizer in tokenizers:
        kept = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        backend = tokenizer.backend_tokenizer  # of which nothing is made Python objects but what is asked for
        backend.no_truncation()
        backend.no_padding()
        for index, encoding in enumerate(backend.encode_batch(list(texts), add_special_tokens=False)):
            if len(encoding) > kept:
                start, before = encoding.token_to_chars(kept)[0], starts[index]
                starts[index] = start if before is None else min(before, start)
    return [None if start is None else text[start:] for text, start in zip(texts, starts, strict=True)]
