"""Build a CLIP tokenizer with one token for each word of the captions."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32


def build_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """Write `vocab.json`, `merges.txt` and the tokenizer's config to `folder`; return the tokenizer.

    Every merge joins one letter with the end of a word ("s" + "k</w>", "u" + "sk</w>", ...), so at most one merge
    applies at a time, and each word becomes one token. Other words are split into letters (bytes), as in any
    byte-level BPE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    tokens = [START, END, *alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = []
    for word in words:
        for start in range(len(word) - 2, -1, -1):
            letter, ending = word[start], word[start + 1 :] + "</w>"
            if (letter, ending) not in merges:
                merges.append((letter, ending))
                tokens.append(letter + ending)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_alphabet() -> list[str]:
    """Return the 256 characters that represent bytes in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
