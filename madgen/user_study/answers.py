"""Read the key of a study and the answers that the page exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.dataset.records import parse_object
from madgen.user_study.make import KEY, VERSION, study_id
from madgen.utils.errors import UserError

CHOICES = ("first", "second", "same")


@dataclass(frozen=True)
class Answer:
    """The answer to one item."""

    item: str
    picked: str | None
    """The preferred image, None for no difference."""
    first: str
    """The image that was shown first."""


@dataclass(frozen=True)
class Participant:
    """All answers of one participant."""

    name: str
    answers: dict[str, Answer]
    """By item."""
    path: Path


def read_key(folder: Path) -> dict[str, Any]:
    """Read `key.json` of a study; raise UserError if it is missing or was changed."""
    path = folder / KEY
    key = _read_object(path, f"; -o must name the folder that `madgen study` created, with its {KEY}")
    if key.get("madgen_study") != VERSION:
        raise UserError(f"{path} is not the key of a madgen study of version {VERSION}")
    if key.get("study") != study_id(key):
        raise UserError(f"{path} was changed after the study was created; restore the original file")
    return key


def read_answers(paths: Sequence[Path], key: dict[str, Any]) -> list[Participant]:
    """Return the participants sorted by name, merging repeated exports of the same participant.

    Raises UserError for a file that is damaged, belongs to another study, or contradicts another of its participant.
    """
    if not paths:
        raise UserError("no answers given; example: madgen study --score answers*.json -o study")
    participants: dict[str, Participant] = {}
    for path in paths:
        participant = _participant(path, key)
        before = participants.setdefault(participant.name, participant)
        less, more = sorted((before, participant), key=lambda one: len(one.answers))
        if less.answers.items() - more.answers.items():
            raise UserError(
                f"{before.path} and {path} differ but are both of participant {participant.name!r}; rename one in its "
                "file if they are two people, else remove the file that does not count"
            )
        participants[participant.name] = more
    return [participants[name] for name in sorted(participants)]


def _participant(path: Path, key: dict[str, Any]) -> Participant:
    content = _read_object(path)
    if content.get("madgen_study") != VERSION:
        raise UserError(f"{path} is not an answers file of a madgen study of version {VERSION}")
    if content.get("study") != key["study"]:
        raise UserError(f"{path} answers another study, {content.get('study')!r}, not {key['study']!r}")
    name, entries = content.get("participant"), content.get("answers")
    if not isinstance(name, str) or not name.strip() or not isinstance(entries, list):
        raise UserError(f"{path} is damaged: it has no participant, or no list of answers")
    answers: dict[str, Answer] = {}
    for entry in entries:
        answer = _answer(entry, key, path)
        if answer.item in answers:
            raise UserError(f"{path} is damaged: {answer.item} is answered twice")
        answers[answer.item] = answer
    return Participant(name.strip(), answers, path)


def _answer(entry: Any, key: dict[str, Any], path: Path) -> Answer:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("item", "first", "second")):
        raise UserError(f"{path} is damaged: an answer needs the fields item, first, second and choice")
    item, first, second, choice = entry["item"], entry["first"], entry["second"], entry.get("choice")
    if item not in key["items"] or sorted([first, second]) != sorted(key["items"][item]["pictures"]):
        raise UserError(f"{path} is damaged: the study has no item {item} with the images {first} and {second}")
    choices = CHOICES if key["ties"] else CHOICES[:2]
    if choice not in choices:
        raise UserError(f"{path} is damaged: the choice of {item} must be {' or '.join(choices)}, got {choice!r}")
    return Answer(item, {"first": first, "second": second}.get(str(choice)), first)


def _read_object(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}{hint}") from None
