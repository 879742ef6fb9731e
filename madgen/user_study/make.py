"""`madgen study A B -o study`: the page for participants, and apart from it the key that says what was what."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import secrets
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from madgen.dataset.filtering.selection import prompt_id
from madgen.dataset.layout import to_json
from madgen.user_study.design import Design, Item, Picture, Source, choose_items, read_sources
from madgen.user_study.pictures import MOST_PIXELS, render
from madgen.user_study.questions import QUESTIONS
from madgen.utils.atomic import atomic, check_new_directory, publish_directory, write_atomically
from madgen.utils.seeding import derived_seed

VERSION = 1
"""Of the key and of the answers; they have to fit."""
PAGE = Path("public") / "index.html"
"""In a folder of its own, so that whoever serves it does not serve the key."""
KEY = Path("key.json")


def make_study(roots: Sequence[Path], target: Path, design: Design) -> None:
    """Writes `target`, which appears by rename: `public/index.html` and `key.json`, a function of samples and design.

    Raises UserError, and leaves nothing: no two datasets with samples of the same prompts, a damaged sample, or a
    `target` that is there.
    """
    check_new_directory(target)
    sources = read_sources(roots)
    items = choose_items(sources, design)
    key, pictures = _key(sources, items, design)
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        (temporary / PAGE).parent.mkdir(parents=True)
        with atomic(temporary / PAGE) as stream:
            _write_page(stream, key, pictures, sources)
        write_atomically(temporary / KEY, to_json(key, indent=1))
        publish_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _report(target, sources, items, pictures)


def _report(target: Path, sources: Sequence[Source], items: Sequence[Item], pictures: dict[str, Picture]) -> None:
    asked = len(items) - (controls := sum(item.control for item in items))
    large = sum(max(sources[p.source].samples[p.key][1:3]) > MOST_PIXELS for p in pictures.values())
    size = (target / PAGE).stat().st_size / 1e6
    print(f"{target / PAGE}: {asked} questions and {controls} controls, {len(pictures)} pictures, {size:.1f} MB")
    if large:
        print(f"{large} of the pictures are shrunk to {MOST_PIXELS} px there")
    print(f"{target / KEY}: what was what; keep it from participants")
    print(f"then: madgen study --score answers*.json -o {target}")


# The key


def _key(sources: Sequence[Source], items: Sequence[Item], design: Design) -> tuple[dict[str, Any], dict[str, Picture]]:
    """The content of `key.json`, and the pictures by the ids that stand for them in the page."""
    content = repr([design, items, [source.manifest.get("fingerprint") for source in sources]])
    rng = random.Random(derived_seed(design.seed, content))  # ids say nothing, and differ between studies
    pictures = list(dict.fromkeys(picture for item in items for picture in item.pictures))
    names = _ids(rng, len(pictures), "p")
    named = dict(zip(pictures, names, strict=True))
    told = {name: _told(item, named) for name, item in zip(_ids(rng, len(items), "q"), items, strict=True)}
    key = {
        "madgen_study": VERSION,
        "datasets": [
            {"name": source.name, "fingerprint": source.manifest.get("fingerprint"), "method": _method(source)}
            for source in sources
        ],
        "questions": list(design.questions),
        "ties": design.ties,
        "seed": design.seed,
        "items": told,
        "pictures": {name: _of(picture) for picture, name in named.items()},
    }
    key["study"] = study_id(key)
    return key, dict(sorted((name, picture) for picture, name in named.items()))


def study_id(key: dict[str, Any]) -> str:
    """What a key and the answers to it know each other by: a digest of all else in the key."""
    content = {name: value for name, value in key.items() if name != "study"}
    return hashlib.blake2b(to_json(content), digest_size=8).hexdigest()


def _ids(rng: random.Random, count: int, letter: str) -> list[str]:
    """So many different ids, in random order."""
    return [f"{letter}{number:08x}" for number in rng.sample(range(16**8), count)]


def _method(source: Source) -> Any:
    identity = source.manifest.get("identity")
    return identity.get("method") if isinstance(identity, dict) else None


def _told(item: Item, named: dict[Picture, str]) -> dict[str, Any]:
    told = {"question": item.question, "prompt_id": prompt_id(item.key), "key": item.key, "prompt": item.prompt}
    right = {"right": named[item.pictures[0]]} if item.control else {}
    return {**told, "pictures": sorted(named[picture] for picture in item.pictures), **right}


def _of(picture: Picture) -> dict[str, Any]:
    return {"dataset": picture.source, "key": picture.key, "kind": picture.kind}


# The page


def _write_page(stream: BinaryIO, key: dict[str, Any], pictures: dict[str, Picture], sources: Sequence[Source]) -> None:
    """Nothing in it but ids, prompts, questions and pictures, in the order of the ids."""
    room = files("madgen.user_study")
    page, style, script = ((room / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js"))
    head, tail = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).split("<!--DATA-->")
    stream.write(head.encode())
    stream.write(_block("study", _shown(key)))
    for name, picture in pictures.items():
        data = base64.b64encode(render(picture, sources)).decode("ascii")
        stream.write(_block(name, f"data:image/webp;base64,{data}"))
    stream.write(tail.encode())


def _shown(key: dict[str, Any]) -> dict[str, Any]:
    """What participants may know; a control looks as any other question does."""
    items = [{"id": name, **{field: item[field] for field in ("question", "prompt", "pictures")}}
             for name, item in sorted(key["items"].items())]  # fmt: skip
    questions = {name: {"text": QUESTIONS[name].text, "hint": QUESTIONS[name].hint} for name in key["questions"]}
    return {"study": key["study"], "version": VERSION, "ties": key["ties"], "questions": questions, "items": items}


def _block(name: str, value: Any) -> bytes:
    """A JSON data block: ASCII, and without any character that HTML could take for markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'.encode("ascii")
