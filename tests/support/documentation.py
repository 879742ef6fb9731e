"""The code blocks of the documentation, and small jobs to run its commands on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^>]*?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page. A comment `<!-- not run: REASON -->` before it exempts it from the tests."""

    page: Path
    language: str
    text: str
    note: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block; another block is one command."""
        if self.language != "bash":
            return [self.text]
        return [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Yield the blocks of some languages in order."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["language"] in languages:
            yield Block(page, match["language"], match["text"], match["note"] or "")


def named_command(name: str) -> str:
    """Return the README's command that is marked `<!-- command: NAME -->`."""
    (block,) = (block for block in blocks(ROOT / "README.md", "bash") if block.note == f"command: {name}")
    return block.text


def inline_code(page: Path) -> list[str]:
    """Return the code spans in the text of a page."""
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    )
