"""Prompts from a template, such as `a {time} view of {place}`: every combination of its attributes, or random ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from string import Formatter
from typing import Any

import numpy as np

from madgen.config.schema import PromptsConfig
from madgen.prompts.readers import ROWS, Chunk, in_chunks
from madgen.utils.errors import UserError
from madgen.utils.validation import nearest

NAME = "prompts.template"
MAX_COMBINATIONS = 2**32 - 1


@dataclass(frozen=True)
class Attribute:
    """An attribute of a template."""

    name: str
    values: tuple[Any, ...]
    weights: tuple[float, ...]
    """Relative frequency of each value in random combinations."""


class Template:
    """A template with its attributes, in the order in which it uses them. Raises UserError if it is invalid."""

    def __init__(self, config: PromptsConfig):
        assert config.template is not None
        self.text, self.samples, self.seed = config.template, config.samples, config.seed
        names = _names(config.template)
        attributes = config.attributes
        unknown = next((name for name in names if name not in attributes), None)
        if unknown is not None:
            hint = nearest(unknown, list(attributes)) if attributes else ""
            raise UserError(f"prompts.template: {{{unknown}}} is not one of prompts.attributes{hint}")
        unused = next((name for name in attributes if name not in names), None)
        if unused is not None:
            raise UserError(f"prompts.attributes.{unused} does not occur in prompts.template; use it, or remove it")
        weighted = config.samples is not None
        self.attributes = [_attribute(name, attributes[name], weighted) for name in names]
        combinations = math.prod(len(attribute.values) for attribute in self.attributes)
        if config.samples is None and config.limit is None and combinations > MAX_COMBINATIONS:
            raise UserError(
                f"prompts.attributes has {combinations:,} combinations, at most {MAX_COMBINATIONS:,}; "
                "set prompts.samples"
            )

    def read(self) -> Iterator[Chunk]:
        """Yield the prompts, with their attributes as kept columns."""
        names = [attribute.name for attribute in self.attributes]
        every = product(*(attribute.values for attribute in self.attributes))
        values = every if self.samples is None else self._random(self.samples)
        rows = enumerate((dict(zip(names, row, strict=True)) for row in values), 1)
        yield from in_chunks(((number, self.text.format(**row), row) for number, row in rows), keep=True)

    def _random(self, count: int) -> Iterator[tuple[Any, ...]]:
        draws = [_Draws(self.seed, attribute) for attribute in self.attributes]
        for start in range(0, count, ROWS):
            yield from zip(*(each.take(min(ROWS, count - start)) for each in draws), strict=True)


class _Draws:
    """Draws values of an attribute by weight: of exponential random numbers divided by the weights, the least wins.

    The number of a value in a draw depends on the seed, the names of the attribute and the value, and the number of the
    draw, so draws do not change if attributes or values are listed in another order (Efraimidis and Spirakis, 2006).
    """

    def __init__(self, seed: int, attribute: Attribute):
        used = [index for index, weight in enumerate(attribute.weights) if weight > 0]
        self.values = [attribute.values[index] for index in used]
        self.weights = np.array([attribute.weights[index] for index in used])[:, None]
        identities = (f"{seed}/{attribute.name}/{value}".encode() for value in self.values)
        keys = (int.from_bytes(blake2b(identity, digest_size=16).digest(), "big") for identity in identities)
        self.generators = [np.random.Philox(key=key) for key in keys]  # raw numbers are equal in all versions of NumPy

    def take(self, count: int) -> list[Any]:
        """Return the values of the next `count` draws."""
        raw = np.stack([generator.random_raw(count) for generator in self.generators])
        uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
        winners = np.argmin(-np.log(uniform) / self.weights, axis=0)
        return [self.values[winner] for winner in winners]


def _names(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompts.template={template!r}: {error}; write {{{{ and }}}} for braces") from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise UserError(
                f"prompts.template={template!r}: an attribute is a name of letters, digits and _ in braces, such as "
                f"{{place}}, got {{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}; write "
                "{{ and }} for braces"
            )
        names.append(name)
    if not names:
        raise UserError(f"prompts.template={template!r} has no attribute such as {{place}}")
    return list(dict.fromkeys(names))


def _attribute(name: str, content: Any, weighted: bool) -> Attribute:
    where = f"prompts.attributes.{name}"
    values, weights = content, None
    if isinstance(content, dict):
        if "values" not in content or not content.keys() <= {"values", "weights"}:
            raise UserError(
                f"{where} must be a list of values or {{values: [...], weights: [...]}}, got {content!r:.80}"
            )
        values, weights = content["values"], content.get("weights")
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{where} must be a list of values such as [dawn, noon], got {values!r:.80}")
    invalid = next((value for value in values if not _is_value(value)), None)
    if invalid is not None or None in values:
        raise UserError(f"{where}: a value must be a string or a number, got {invalid!r:.80}; put it in quotes")
    duplicate = next((text for text, count in Counter(map(str, values)).items() if count > 1), None)
    if duplicate is not None:
        raise UserError(f"{where} lists {duplicate!r} twice; remove one of them")
    if weights is None:
        return Attribute(name, tuple(values), (1.0,) * len(values))
    if not weighted:
        raise UserError(f"{where}.weights have no effect on all combinations; set prompts.samples, or remove them")
    return Attribute(name, tuple(values), _weights(where, weights, len(values)))


def _is_value(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _weights(where: str, weights: Any, count: int) -> tuple[float, ...]:
    valid = isinstance(weights, list | tuple) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        for weight in weights
    )
    if not valid:
        raise UserError(f"{where}.weights must be a list of numbers >= 0, got {weights!r:.80}")
    if len(weights) != count:
        raise UserError(f"{where} has {count} values, but {len(weights)} weights; give one for each")
    if not any(weights):
        raise UserError(f"{where}.weights are all 0; at least one must be > 0")
    return tuple(map(float, weights))
