"""The questions of a study and the kind of control of each: a pair with a known right answer."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.utils.errors import UserError
from madgen.utils.validation import nearest


@dataclass(frozen=True)
class Question:
    """A question to ask about each pair."""

    text: str
    hint: str
    """Explanation on the first page."""
    control: str
    """The wrong image of its controls: `patchwork`, `blurred` or `other` (a panorama of another prompt)."""


QUESTIONS = {
    "coherence": Question(
        "Which panorama looks more like one coherent scene?",
        "In a coherent scene, light, colours, ground and horizon match from one end to the other, and everything is "
        "where it could plausibly be.",
        "patchwork",
    ),
    "match": Question(
        "Which panorama matches the description better?",
        "Look for everything the description mentions, and for anything that contradicts it.",
        "other",
    ),
    "quality": Question(
        "Which panorama has the better image quality?",
        "Consider sharpness, detail and visible flaws, regardless of the content.",
        "blurred",
    ),
    "both": Question(
        "Which panorama is more coherent and matches the description better?",
        "Light, colours and objects match from one end to the other, and show what the description mentions.",
        "patchwork",
    ),
}
"""The paper's study asks `both`."""


def check_questions(names: tuple[str, ...]) -> None:
    """Raise UserError for an unknown or repeated question."""
    for number, name in enumerate(names):
        if name not in QUESTIONS:
            raise UserError(f"--question: unknown {name!r}{nearest(name, tuple(QUESTIONS))}")
        if name in names[:number]:
            raise UserError(f"--question {name} is given twice")
