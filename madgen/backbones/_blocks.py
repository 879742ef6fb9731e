"""Select attention layers by the entries of `method.mad.blocks`."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence

from madgen.utils.errors import UserError

ALL = "all"
"""Entry that selects every attention layer."""


def select_layers(
    layers: Sequence[str], groups: Mapping[str, Collection[str]], blocks: Sequence[str]
) -> frozenset[str]:
    """Return the layers that the entries select: `all`, names of `groups`, or patterns of names of layers.

    Raises UserError for an entry that selects none.
    """
    chosen: set[str] = set()
    for block in blocks:
        if block == ALL:
            matches = list(layers)
        elif block in groups:
            matches = list(groups[block])
        else:  # diffusers appends `.processor` to the names of layers
            names = {name: name.removesuffix(".processor") for name in layers}
            matches = [name for name in layers if fnmatch.filter((names[name], f"{names[name]}.processor"), block)]
        if not matches and block in groups:
            raise UserError(f"method.mad.blocks: {block!r} of this backbone has no attention layers; remove it")
        if not matches:
            raise UserError(
                f"method.mad.blocks: {block!r} is neither {', '.join(groups)} nor a pattern of a layer such as "
                f"{layers[0]!r}; {ALL} selects every layer"
            )
        chosen.update(matches)
    return frozenset(chosen)


def transformer_groups(layers: Sequence[str]) -> dict[str, list[str]]:
    """Return the groups of a transformer's layers, given in the order in which they run.

    `early`, `middle` and `late` are thirds by depth; `double` are blocks in which image and prompt have separate
    weights, `single` those in which they share them.
    """
    blocks = list(dict.fromkeys(layer.rpartition(".")[0] for layer in layers))
    groups: dict[str, list[str]] = {name: [] for name in ("early", "middle", "late", "double", "single")}
    for layer in layers:
        third = 3 * blocks.index(layer.rpartition(".")[0]) // len(blocks)
        groups[("early", "middle", "late")[third]].append(layer)
        groups["double" if layer.startswith("transformer_blocks.") else "single"].append(layer)
    return groups
