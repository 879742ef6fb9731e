"""The language of `madgen filter --where`. Nothing of it is run as Python: only what is listed here has a meaning.

    coherence > 0.8 and (seam < 1.2 or not prompt contains "fog")

Names are those of scores, `seed`, `height`, `width` and `prompt`; `prompt contains "text"`, also written
`"text" in prompt`, does not tell capitals from small letters. What compares a score that a sample does not have is
neither true nor false, nor is its negation: such a sample is left out, unless the rest decides.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from madgen.config.schema import SCORES, nearest
from madgen.utils.errors import UserError

NUMBERS = (*SCORES, "seed", "height", "width")
NAMES = (*NUMBERS, "prompt")
LONGEST, DEEPEST, LARGEST = 2000, 40, 2**63
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
# `contains` is no operator of Python; `is` is one that compares, as long as it, and not otherwise needed here.
WORDS = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\b(?P<word>contains|is)\b|(?P<comment>#)""")

Row = Mapping[str, Any]
"""`key`, `prompt`, `seed`, `height`, `width` and the scores that the sample has."""
NUMBER, TEXT, TRUTH = "a number", "a text", "a comparison"


@dataclass(frozen=True)
class Where:
    """A parsed expression: `where(row)` says whether it is true of a sample."""

    expression: str
    scores: frozenset[str]
    """That it names."""
    value: Callable[[Row], bool | None]

    def __call__(self, row: Row) -> bool:
        return self.value(row) is True


@dataclass(frozen=True)
class _Part:
    kind: str
    value: Callable[[Row], Any]
    """None where a score is missing."""
    literal: bool = False


def parse(expression: str) -> Where:
    """UserError with the place (counted from 1) and the known names."""
    text = expression.strip()
    if len(text) > LONGEST:
        raise UserError(f"--where is {len(text)} characters long; at most {LONGEST}")
    if not text.isprintable() or not text:
        raise UserError(f"--where must be one line of text, such as 'coherence > 0.8', got {expression[:60]!r}")
    return Where(text, *_Parser(text, len(expression) - len(expression.lstrip())).parse())


class _Parser:
    def __init__(self, text: str, before: int = 0):
        self.text, self.before = text, before
        self.scores: set[str] = set()

    def parse(self) -> tuple[frozenset[str], Callable[[Row], bool | None]]:
        source = WORDS.sub(self._word, self.text)
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in texts that mean nothing
                tree = ast.parse(source, mode="eval")
        except SyntaxError as error:
            raise self._error(max(0, (error.offset or 1) - 1), "this cannot be read") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._error(0, "this cannot be read") from error
        part = self._part(tree.body, 0)
        self._expect(part, TRUTH, tree.body)
        return frozenset(self.scores), part.value

    def _word(self, found: re.Match[str]) -> str:
        if found["comment"]:
            raise self._error(found.start(), "this cannot be read")
        if found["word"] == "is":
            raise self._error(found.start(), "'is' has no meaning here; write == or contains")
        return f"{'is':8}" if found["word"] else found[0]

    def _error(self, at: int, problem: str) -> UserError:
        known = f'{", ".join(NUMBERS)}, prompt contains "text"'
        return UserError(
            f"--where, character {self.before + at + 1}: {problem}; "
            f"it may hold and, or, not, < <= > >= == != and {known}"
        )

    def _at(self, node: ast.AST, problem: str) -> UserError:
        before = self.text.encode()[: getattr(node, "col_offset", 0)]  # ast counts bytes
        return self._error(len(before.decode(errors="ignore")), problem)

    def _expect(self, part: _Part, kind: str, node: ast.AST) -> None:
        if part.kind != kind:
            raise self._at(node, f"this is {part.kind}, and {kind} is needed")

    def _part(self, node: ast.expr, depth: int) -> _Part:
        if depth > DEEPEST:
            raise self._at(node, f"more than {DEEPEST} levels deep")
        match node:
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Constant(value=value):
                return self._constant(node, value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                value = self._part(node.operand, depth + 1).value({})
                return _Part(NUMBER, lambda row: -value, literal=True)
            case ast.UnaryOp(op=ast.Not()):
                return _negated(self._truths([node.operand], depth)[0])
            case ast.BoolOp(op=op):
                return _joined(self._truths(node.values, depth), stops=isinstance(op, ast.Or))
            case ast.Compare():
                return self._comparison(node, depth)
            case _:
                raise self._at(node, "this has no meaning here")

    def _truths(self, nodes: list[ast.expr], depth: int) -> list[_Part]:
        parts = [self._part(node, depth + 1) for node in nodes]
        for part, node in zip(parts, nodes, strict=True):
            self._expect(part, TRUTH, node)
        return parts

    def _name(self, node: ast.expr, name: str) -> _Part:
        if name not in NAMES:
            raise self._at(node, f"unknown name {name[:40]!r}{nearest(name[:40], NAMES).partition('; known')[0]}")
        if name in SCORES:
            self.scores.add(name)
        return _Part(TEXT if name == "prompt" else NUMBER, lambda row: row.get(name))

    def _constant(self, node: ast.expr, value: Any) -> _Part:
        if isinstance(value, str):
            return _Part(TEXT, lambda row: value, literal=True)
        if type(value) not in (int, float):
            raise self._at(node, "only numbers and texts in quotes are values here")
        if not abs(value) <= LARGEST:
            raise self._at(node, "numbers end at 2^63 here")
        return _Part(NUMBER, lambda row: value, literal=True)

    def _comparison(self, node: ast.Compare, depth: int) -> _Part:
        nodes = [node.left, *node.comparators]
        parts = [self._part(item, depth + 1) for item in nodes]
        steps = zip(node.ops, zip(nodes, parts, strict=True), zip(nodes[1:], parts[1:], strict=True), strict=False)
        return _joined([self._compared(op, *left, *right) for op, left, right in steps], stops=False)

    def _compared(self, op: ast.cmpop, left: ast.expr, first: _Part, right: ast.expr, second: _Part) -> _Part:
        match op:
            case ast.Is():  # contains
                return self._contains(left, first, right, second)
            case ast.In():
                return self._contains(right, second, left, first)
            case ast.NotIn():
                return _negated(self._contains(right, second, left, first))
        compare = COMPARE.get(type(op))
        if compare is None:
            raise self._at(right, "this comparison has no meaning here")
        if first.kind == TRUTH or (first.kind == TEXT and not isinstance(op, ast.Eq | ast.NotEq)):
            raise self._at(left, f"{first.kind} has no order; a text goes with ==, != and contains")
        self._expect(second, first.kind, right)
        return _Part(TRUTH, lambda row: _known(compare, first.value(row), second.value(row)))

    def _contains(self, left: ast.expr, whole: _Part, right: ast.expr, part: _Part) -> _Part:
        self._expect(whole, TEXT, left)
        self._expect(part, TEXT, right)
        if whole.literal or not part.literal:
            raise self._at(left, 'write prompt contains "text"')
        text = part.value({}).casefold()
        return _Part(TRUTH, lambda row: text in whole.value(row).casefold())


def _known(compare: Callable[[Any, Any], bool], left: Any, right: Any) -> bool | None:
    return None if left is None or right is None else compare(left, right)


def _negated(part: _Part) -> _Part:
    def value(row: Row) -> bool | None:
        found = part.value(row)
        return None if found is None else not found

    return _Part(TRUTH, value)


def _joined(parts: list[_Part], stops: bool) -> _Part:
    """`or` (`stops` True) and `and` (False), by Kleene's rules: one such value decides, whatever is not known."""

    def value(row: Row) -> bool | None:
        found = [part.value(row) for part in parts]
        return stops if stops in found else None if None in found else not stops

    return _Part(TRUTH, value)
