"""Create a study: a page for participants and, apart from it, the key with the origin of every image."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from madgen.dataset.format import prompt_id, to_json
from madgen.dataset.new_directory import new_directory
from madgen.user_study.design import Design, Item, Source, StudyImage, choose_items, read_sources
from madgen.user_study.questions import QUESTIONS
from madgen.user_study.rendering import MAX_SIDE, render
from madgen.utils.atomic import atomic, check_new_directory, write_atomically
from madgen.utils.escaping import json_block
from madgen.utils.seeding import derived_seed

VERSION = 1
"""Version of key and answers, which have to match."""
PAGE = Path("public") / "index.html"
"""In a folder without the key, which must not be served."""
KEY = Path("key.json")


def make_study(roots: Sequence[Path], target: Path, design: Design) -> None:
    """Write `public/index.html` and `key.json` to a new folder, a function of the samples and the design.

    Raises UserError without leaving files: if datasets share no samples, a sample is damaged, or `target` exists.
    """
    check_new_directory(target)
    sources = read_sources(roots)
    items = choose_items(sources, design)
    key, images = _key(sources, items, design)
    with new_directory(target) as temporary:
        (temporary / PAGE).parent.mkdir()
        with atomic(temporary / PAGE) as stream:
            _write_page(stream, key, images, sources)
        write_atomically(temporary / KEY, to_json(key, indent=1))
    _print_summary(target.resolve(), sources, items, images)


def _print_summary(
    target: Path, sources: Sequence[Source], items: Sequence[Item], images: dict[str, StudyImage]
) -> None:
    controls = sum(item.control for item in items)
    large = sum(max(sources[image.source].samples[image.key].shape) > MAX_SIDE for image in images.values())
    size = (target / PAGE).stat().st_size / 1e6
    questions = f"{len(items) - controls} questions and {controls} controls"
    print(f"{target / PAGE}: {questions}, {len(images)} images, {size:.1f} MB")
    if large:
        print(f"{large} of the images are shrunk to {MAX_SIDE} px")
    print(f"{target / KEY}: the origin of every image; do not share it with participants")
    print(f"next: madgen study --score answers*.json -o {target}")


# The key


def _key(
    sources: Sequence[Source], items: Sequence[Item], design: Design
) -> tuple[dict[str, Any], dict[str, StudyImage]]:
    """Return the content of `key.json`, and the images by their ids in the page."""
    content = repr([design, items, [source.manifest.fingerprint for source in sources]])
    rng = random.Random(derived_seed(design.seed, content))  # ids reveal nothing, and differ between studies
    images = list(dict.fromkeys(image for item in items for image in item.images))
    ids = dict(zip(images, _ids(rng, len(images), "p"), strict=True))
    key = {
        "madgen_study": VERSION,
        "datasets": [
            {
                "name": source.name,
                "fingerprint": source.manifest.fingerprint,
                "method": source.manifest.identity.get("method"),
            }
            for source in sources
        ],
        "questions": list(design.questions),
        "ties": design.ties,
        "seed": design.seed,
        "items": {name: _item(item, ids) for name, item in zip(_ids(rng, len(items), "q"), items, strict=True)},
        "pictures": {
            name: {"dataset": image.source, "key": image.key, "kind": image.kind} for image, name in ids.items()
        },
    }
    key["study"] = study_id(key)
    return key, dict(sorted((name, image) for image, name in ids.items()))


def study_id(key: dict[str, Any]) -> str:
    """Return the id that links a key with its answers: a digest of the rest of the key."""
    content = {name: value for name, value in key.items() if name != "study"}
    return hashlib.blake2b(to_json(content), digest_size=8).hexdigest()


def _ids(rng: random.Random, count: int, letter: str) -> list[str]:
    return [f"{letter}{number:08x}" for number in rng.sample(range(16**8), count)]


def _item(item: Item, ids: dict[StudyImage, str]) -> dict[str, Any]:
    content = {"question": item.question, "prompt_id": prompt_id(item.key), "key": item.key, "prompt": item.prompt}
    right = {"right": ids[item.images[0]]} if item.control else {}
    return {**content, "pictures": sorted(ids[image] for image in item.images), **right}


# The page


def _write_page(
    stream: BinaryIO, key: dict[str, Any], images: dict[str, StudyImage], sources: Sequence[Source]
) -> None:
    """Write the page; it contains only ids, prompts, questions and images, in the order of their ids."""
    folder = files("madgen.user_study")
    page, style, script = ((folder / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js"))
    head, tail = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).split("<!--DATA-->")
    stream.write(head.encode())
    stream.write(json_block("study", _public(key)))
    for name, image in images.items():
        data = base64.b64encode(render(image, sources)).decode("ascii")
        stream.write(json_block(name, f"data:image/webp;base64,{data}"))
    stream.write(tail.encode())


def _public(key: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the key that participants may see; it does not mark controls."""
    items = [{"id": name, **{field: item[field] for field in ("question", "prompt", "pictures")}}
             for name, item in sorted(key["items"].items())]  # fmt: skip
    questions = {name: {"text": QUESTIONS[name].text, "hint": QUESTIONS[name].hint} for name in key["questions"]}
    return {"study": key["study"], "version": VERSION, "ties": key["ties"], "questions": questions, "items": items}
