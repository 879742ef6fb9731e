"""Maximum prompt lengths, and the parts of prompts that are truncated."""

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
    """Maximum number of tokens of a checkpoint's text encoders, and its tokenizers, loaded on request."""

    tokens: int
    """Maximum length including the start and end tokens."""
    where: str
    """Folder or Hub id."""
    revision: str | None
    subfolders: tuple[str, ...]
    chosen: bool = False
    """The limit is a setting, not that of the tokenizers."""

    def load(self) -> list[Any] | None:
        """Return the tokenizers, None if they are not available locally."""
        from transformers import AutoTokenizer, CLIPTokenizer

        cls = AutoTokenizer if self.chosen else CLIPTokenizer
        options = {"revision": self.revision, "local_files_only": True}
        try:
            loaded = [cls.from_pretrained(self.where, subfolder=folder, **options) for folder in self.subfolders]
        except (OSError, ValueError):
            return None
        for tokenizer in loaded if self.chosen else ():
            tokenizer.model_max_length = self.tokens
        return loaded


def text_limit(
    subfolders: tuple[str, ...], pretrained: str, revision: str | None, config: str | None
) -> TextLimit | None:
    """Read the limit from the config files of a checkpoint's tokenizers; None if they are not available locally."""
    try:
        where = config_source(pretrained, revision, config)
        limits = [_limit(where, revision, subfolder) for subfolder in subfolders]
    except UserError:
        return None
    known = [limit for limit in limits if limit is not None]
    return TextLimit(min(known), where, revision, subfolders) if len(known) == len(subfolders) else None


def chosen_limit(
    subfolder: str, tokens: int, pretrained: str, revision: str | None, config: str | None
) -> TextLimit | None:
    """Return a limit of `tokens` for one tokenizer; None if its files are not available locally."""
    try:
        where = config_source(pretrained, revision, config)
    except UserError:
        return None
    available = _limit(where, revision, subfolder) is not None
    return TextLimit(tokens, where, revision, (subfolder,), chosen=True) if available else None


def _limit(where: str, revision: str | None, subfolder: str) -> int | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = f"{subfolder}/tokenizer_config.json"
    try:
        file = Path(where) / name if Path(where).is_dir() else try_to_load_from_cache(where, name, revision=revision)
        if not isinstance(file, str | Path):
            return None
        limit = json.loads(Path(file).read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError, HFValidationError):
        return None
    return limit if type(limit) is int else None


def cut_texts(tokenizers: Sequence[Any], texts: Sequence[str]) -> list[str | None]:
    """Return the truncated end of each text, the longest over all tokenizers; None if the text fits."""
    starts: list[int | None] = [None] * len(texts)
    for tokenizer in tokenizers:
        kept = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        backend = tokenizer.backend_tokenizer  # avoids Python lists of all tokens
        backend.no_truncation()
        backend.no_padding()
        for index, encoding in enumerate(backend.encode_batch(list(texts), add_special_tokens=False)):
            if len(encoding) > kept:
                start, before = encoding.token_to_chars(kept)[0], starts[index]
                starts[index] = start if before is None else min(before, start)
    return [None if start is None else text[start:] for text, start in zip(texts, starts, strict=True)]
