"""The data of a page: a JSON block per sample, escaped so that no prompt can act as markup."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import EncodedSample
from madgen.monitoring.gallery.input_pictures import CAPTIONS, find_inputs, load_inputs
from madgen.monitoring.gallery.samples import read
from madgen.monitoring.gallery.thumbnails import FEW, SIDES, embedded, thumbnail_of
from madgen.utils.escaping import json_block
from madgen.utils.ordered_map import ordered_map


def write_samples(
    file: BinaryIO,
    dataset: DatasetDir,
    shown: Sequence[SampleEntry],
    preview: int | None,
    progress: Callable[[int, int], Any],
) -> None:
    """Write a block per sample (`s0`, `s1`, ..), then one per large image (`f0`, ..), so that thumbnails load first."""
    side, inputs = SIDES[len(shown) > FEW], find_inputs(dataset, shown)

    def blocks(number: int) -> tuple[bytes, bytes]:
        sample = read(dataset, shown[number])
        thumbnail, picture = embedded(sample, side, preview)
        details = {"thumbnail": thumbnail, "preview": preview, **_details(dataset, sample)}
        pictures = load_inputs(sample.metadata, inputs) if inputs else {}
        details["inputs"] = [
            {"caption": CAPTIONS[name], "picture": thumbnail_of(image, 2 * side)} for name, image in pictures.items()
        ]
        return json_block(f"s{number}", details), b"" if picture is None else json_block(f"f{number}", picture)

    with tempfile.TemporaryFile() as pictures:
        for done, (details, picture) in enumerate(ordered_map(blocks, range(len(shown))), start=1):
            file.write(details)
            pictures.write(picture)
            progress(done, len(shown))
        pictures.seek(0)
        shutil.copyfileobj(pictures, file)


def _details(dataset: DatasetDir, sample: EncodedSample) -> dict[str, Any]:
    entry, sampling = sample.entry, sample.metadata.get("sampling")
    return {
        "rows": list(_rows(sample.metadata)),
        "loop": isinstance(sampling, dict) and sampling.get("loop") is True,
        "shard": dataset.tar(entry.shard).name,
        "offset": entry.offset,
        "size": entry.size,
        "member": f"{entry.key}.{sample.format}",
        "command": shlex.join(["madgen", "regenerate", str(dataset.root), entry.key, "-o", f"{entry.key}.png"]),
    }


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of the metadata as (dotted name, text); text, as browsers round integers above 2**53."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _rows(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
