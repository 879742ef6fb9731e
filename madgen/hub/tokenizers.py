"""Maximum prompt lengths, and the parts of prompts that are truncated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.hub.model_configs import config_source
from madgen.hub.repository import cached_file
from madgen.hub.weights import ModelFiles
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
    limits: tuple[int, ...] = ()
    """Maximum length of each tokenizer; empty if `tokens` is a setting, not that of the tokenizers."""

    def load(self) -> list[Any] | None:
        """Return the tokenizers, None if they are not available locally."""
        try:
            if self.limits:
                backends = (_clip_backend(self.where, self.revision, folder) for folder in self.subfolders)
                return list(map(ClipCounter, backends, self.limits))
            from transformers import AutoTokenizer

            options = {"revision": self.revision, "local_files_only": True}
            loaded = [AutoTokenizer.from_pretrained(self.where, subfolder=name, **options) for name in self.subfolders]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        for tokenizer in loaded:
            tokenizer.model_max_length = self.tokens
        return loaded


@dataclass(frozen=True)
class ClipCounter:
    """Count tokens like transformers' CLIPTokenizer, whose import takes longer than the rest of `madgen plan`."""

    backend_tokenizer: Any
    model_max_length: int

    def num_special_tokens_to_add(self) -> int:
        """Return 2: each text has a start and an end token."""
        return 2


def _clip_backend(where: str, revision: str | None, subfolder: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary, merges = _clip_vocabulary(where, revision, subfolder)
    config = json.loads(_read(where, revision, f"{subfolder}/tokenizer_config.json"))
    start, end, unknown = (
        token["content"] if isinstance(token := config.get(f"{name}_token", default), dict) else token
        for name, default in (("bos", "<|startoftext|>"), ("eos", "<|endoftext|>"), ("unk", "<|endoftext|>"))
    )
    backend = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unknown))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens([start, end])
    return backend


def _clip_vocabulary(where: str, revision: str | None, subfolder: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read the vocabulary and the merges of byte-pair encoding, from either form of the files."""
    try:
        vocabulary = json.loads(_read(where, revision, f"{subfolder}/vocab.json"))
        lines = _read(where, revision, f"{subfolder}/merges.txt").split("\n")
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    except OSError:
        model = json.loads(_read(where, revision, f"{subfolder}/tokenizer.json"))["model"]
        vocabulary = model["vocab"]
        pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
    return vocabulary, [(first, second) for first, second in pairs]


def text_limit(subfolders: tuple[str, ...], files: ModelFiles) -> TextLimit | None:
    """Read the limit from the config files of a checkpoint's tokenizers; None if they are not available locally."""
    try:
        where = config_source(files)
        limits = [_limit(where, files.revision, subfolder) for subfolder in subfolders]
    except UserError:
        return None
    known = tuple(limit for limit in limits if limit is not None)
    return TextLimit(min(known), where, files.revision, subfolders, known) if len(known) == len(subfolders) else None


def _limit(where: str, revision: str | None, subfolder: str) -> int | None:
    try:
        limit = json.loads(_read(where, revision, f"{subfolder}/tokenizer_config.json"))["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return limit if type(limit) is int else None


def _read(where: str, revision: str | None, name: str) -> str:
    """Read a file in a folder or in the Hub's cache. Raises FileNotFoundError if it is not there."""
    file = Path(where) / name if Path(where).is_dir() else cached_file(where, name, revision)
    if file is None:
        raise FileNotFoundError(name)
    return file.read_text(encoding="utf-8")


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


def count_tokens(tokenizers: Sequence[Any], text: str) -> int:
    """Return the number of tokens of a text, the largest over all tokenizers, with those of its beginning and end."""
    return max(
        len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)) + tokenizer.num_special_tokens_to_add()
        for tokenizer in tokenizers
    )
