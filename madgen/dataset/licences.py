"""Licences of the weights that a dataset was generated with, as `dataset.json` records them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from madgen.dataset.format import FormatError, Manifest
from madgen.hub.license import ADAPTERS, TERMS, Licence

LICENCE_COLUMNS = ("weights_licence", "training_on_outputs", "commercial_use", "licence_source")
"""Columns of `index.parquet`; a kept column of the same name replaces one of them."""
STRICTEST_FIRST = ("no", "restricted", "unknown", "yes")


def recorded_licences(manifest: Manifest) -> list[tuple[str, Licence]]:
    """Return the licences of backbone, LoRAs and adapters, each with a title. Raises FormatError.

    Terms that earlier versions did not record are those of the licence's name; LoRAs without a record are unknown.
    """
    recorded = manifest.licence or {}
    try:
        name = recorded.get("backbone")
        own = Licence(**recorded["terms"]) if "terms" in recorded else TERMS.get(name, Licence(name))
        known = [own, *(Licence(**fields) for fields in recorded.get("loras", ()))]
        known += [Licence()] * (1 + len(manifest.job["backbone"]["loras"]) - len(known))
        titled = [(f"LoRA {number}" if number else "backbone", each) for number, each in enumerate(known)]
        return titled + [(title, Licence(**recorded[key])) for key, title in ADAPTERS.items() if key in recorded]
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"dataset.json is damaged: its licences cannot be read ({error!r:.80})") from error


def licence_values(manifest: Manifest, shard: int) -> dict[str, str | None]:
    """Return the values of `LICENCE_COLUMNS` for the samples of a shard: all licences, and the strictest terms."""
    source = manifest.portion(shard).source
    sources = source.sources or (source,)
    licences = [licence for each in sources for _, licence in recorded_licences(each)]
    names = (licence.name or "unknown" for licence in licences)
    values = (
        "; ".join(dict.fromkeys(names)),
        _strictest(licence.training for licence in licences),
        _strictest(licence.commercial for licence in licences),
        " ".join(dict.fromkeys(licence.source for licence in licences if licence.source)) or None,
    )
    return dict(zip(LICENCE_COLUMNS, values, strict=True))


def _strictest(terms: Iterable[Any]) -> str:
    known = set(terms)
    return next((term for term in STRICTEST_FIRST if term in known), "unknown")
