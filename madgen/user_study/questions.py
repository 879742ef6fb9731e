"""What participants may be asked, and how a question's controls are made: pairs whose right answer is known."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.config.schema import nearest
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Question:
    """One question, asked of every pair."""

    text: str
    hint: str
    """Explains it once, before the first pair."""
    control: str
    """The wrong side of its controls: `patchwork`, `blurred` or `other` (a panorama of another prompt)."""


QUESTIONS = {
    "coherence": Question(
        "Which panorama looks more like one coherent scene?",
        "In a coherent scene light, colours, ground and horizon go together from one end to the other, and things "
        "stand where they could stand.",
        "patchwork",
    ),
    "match": Question(
        "Which panorama matches the description better?",
        "Look for what the description names, and for what contradicts it.",
        "other",
    ),
    "quality": Question(
        "Which panorama has the better image quality?",
        "Look at sharpness, detail and visible faults, whatever the picture shows.",
        "blurred",
    ),
    "both": Question(
        "Which panorama is more coherent and matches the description better?",
        "Light, colours and things go together from one end to the other, and show what the description names.",
        "patchwork",
    ),
}
"""The paper's study asks `both`."""


def check_questions(names: tuple[str, ...]) -> None:
    """UserError for a question that is not known, or asked twice."""
    for at, name in enumerate(names):
        if name not in QUESTIONS:
            raise UserError(f"--question: unknown {name!r}{nearest(name, tuple(QUESTIONS))}")
        if name in names[:at]:
            raise UserError(f"--question {name} is given twice")
