"""Files of answers, as the page exports them, and the key that they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.user_study.make import KEY, VERSION, study_id
from madgen.utils.errors import UserError

CHOICES = ("first", "second", "same")


@dataclass(frozen=True)
class Answer:
    """What was said of one pair."""

    item: str
    picked: str | None
    """The picture; None is no difference."""
    first: str
    """The picture that was shown first."""


@dataclass(frozen=True)
class Participant:
    """Everything that one person answered."""

    name: str
    answers: dict[str, Answer]
    """By item."""
    path: Path


def read_key(folder: Path) -> dict[str, Any]:
    """`key.json` of a study; UserError if there is none."""
    path = folder / KEY
    key = _object(path, f"; -o names the folder that `madgen study` made, with its {KEY}")
    if key.get("madgen_study") != VERSION:
        raise UserError(f"{path} is no key of a madgen study of version {VERSION}")
    if key.get("study") != study_id(key):
        raise UserError(f"{path} is not as it was made, so that it says nothing of the answers; restore it from a copy")
    return key


def read_answers(paths: Sequence[Path], key: dict[str, Any]) -> list[Participant]:
    """The participants in order of their names; one whose answers were exported more than once is there once.

    UserError names the file that is damaged, of another study, or that contradicts another one of the same participant.
    """
    if not paths:
        raise UserError("no files of answers given; example: madgen study --score answers*.json -o study")
    found: dict[str, Participant] = {}
    for path in paths:
        person = _participant(path, key)
        before = found.setdefault(person.name, person)
        more, less = (person, before) if len(person.answers) > len(before.answers) else (before, person)
        if less.answers.items() - more.answers.items():
            raise UserError(
                f"{before.path} and {path} are both of participant {person.name!r} and differ; rename one of the two "
                "in its file if they are two people, else remove the file that does not count"
            )
        found[person.name] = more
    return [found[name] for name in sorted(found)]


def _participant(path: Path, key: dict[str, Any]) -> Participant:
    content = _object(path)
    if content.get("madgen_study") != VERSION:
        raise UserError(f"{path} holds no answers to a madgen study of version {VERSION}")
    if content.get("study") != key["study"]:
        raise UserError(f"{path} answers another study, {content.get('study')!r}, not {key['study']!r}")
    name, given = content.get("participant"), content.get("answers")
    if not isinstance(name, str) or not name.strip() or not isinstance(given, list):
        raise UserError(f"{path} is damaged: it has no participant, or no list of answers")
    answers: dict[str, Answer] = {}
    for entry in given:
        answer = _answer(entry, key, path)
        if answer.item in answers:
            raise UserError(f"{path} is damaged: {answer.item} is answered twice")
        answers[answer.item] = answer
    return Participant(name.strip(), answers, path)


def _answer(entry: Any, key: dict[str, Any], path: Path) -> Answer:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("item", "first", "second")):
        raise UserError(f"{path} is damaged: an answer needs an item, the pictures first and second, and a choice")
    item, first, second, choice = entry["item"], entry["first"], entry["second"], entry.get("choice")
    if item not in key["items"] or sorted([first, second]) != sorted(key["items"][item]["pictures"]):
        raise UserError(f"{path} is damaged: the study has no {item} with the pictures {first} and {second}")
    if choice not in CHOICES[: 3 if key["ties"] else 2]:
        raise UserError(f"{path} is damaged: {choice!r} is no choice in {item}")
    return Answer(item, {"first": first, "second": second}.get(choice), first)


def _object(path: Path, way_out: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}{way_out}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content
