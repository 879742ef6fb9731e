"""Read UTF-8 text files in blocks of whole lines, with or without gzip and byte order mark."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from functools import partial

from madgen.prompts.readers import PromptFile
from madgen.utils.errors import UserError

BLOCK = 1 << 20  # bytes
MAX_LINE = 16 << 20  # bytes
BOM = b"\xef\xbb\xbf"
BARE_CR = re.compile(rb"\r(?=[^\n])")
LINE_MARKS = re.compile("^\ufeff+", re.MULTILINE)
MAX_TEXT = 1 << 30  # bytes


def read_blocks(file: PromptFile) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, lines without newlines) of each block. UserErrors name the invalid line."""
    number, start = 1, 0
    for block in _whole_lines(file):
        text, error = _decode(file, block, number, start)
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        if lines:
            yield number, lines
        if error is not None:
            raise error
        number, start = number + len(lines), start + len(block)


def read_text(file: PromptFile) -> str:
    """Read a whole file, for formats that cannot be read incrementally."""
    content = bytearray()
    for piece in _pieces(file):
        content += piece
        if len(content) > MAX_TEXT:
            raise UserError(
                f"{file} holds more than {MAX_TEXT >> 30} GiB of text; use .jsonl, which is read line by line"
            )
    text, error = _decode(file, bytes(content), 1, 0)
    if error is not None:
        raise error
    return text


def _whole_lines(file: PromptFile) -> Iterator[bytes]:
    """Yield blocks that end with a newline, except for the last."""
    rest, number = b"", 1
    for piece in _pieces(file):
        # Bare carriage returns end lines too; one at the end of the piece may belong to a newline that follows.
        piece = BARE_CR.sub(b"\n", rest + piece)
        cut = piece.rfind(b"\n") + 1
        if cut:
            block = piece[:cut]
            number += block.count(b"\n")
            yield block
        rest = piece[cut:]
        if len(rest) > MAX_LINE:
            raise UserError(f"{file}:{number} is longer than {MAX_LINE >> 20} MiB; write one prompt per line")
    if rest:
        yield rest.replace(b"\r", b"\n")


def _decode(file: PromptFile, block: bytes, number: int, start: int) -> tuple[str, UserError | None]:
    """Decode a block that starts at line `number` and byte `start`, up to the first line that is not UTF-8.

    Byte order marks at the starts of lines are removed, where concatenating files leaves them.
    """
    error = None
    try:
        text = block.decode()
    except UnicodeDecodeError as problem:
        line = number + block.count(b"\n", 0, problem.start)
        text = block[: block.rfind(b"\n", 0, problem.start) + 1].decode()
        place = start + problem.start
        error = UserError(f"{file}:{line} is not UTF-8 (byte {place}); convert the file to UTF-8")
    return LINE_MARKS.sub("", text) if BOM in block else text, error


def _pieces(file: PromptFile) -> Iterator[bytes]:
    """Yield the content of a file, decompressed, in pieces."""
    try:
        with gzip.open(file.path) if file.name.lower().endswith(".gz") else open(file.path, "rb", 0) as stream:
            yield from iter(partial(stream.read, BLOCK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is not a complete gzip file ({error}); copy it again, or decompress it") from error
    except OSError as error:
        raise UserError(f"cannot read prompts.source={file}: {error.strerror or error}") from error
