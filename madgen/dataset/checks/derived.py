"""Compare the derived files of a complete dataset with its sidecars: index, quarantine list and card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain
from typing import Any

from PIL import Image

from madgen.dataset.format import COLUMNS, FormatError, Manifest, SampleEntry
from madgen.dataset.kept_columns import KeptColumns
from madgen.dataset.layout import DatasetDir
from madgen.dataset.licences import licence_values
from madgen.dataset.records import open_file, read_file, to_json
from madgen.types import shard_index

BATCH_ROWS = 1000


def derived_problems(directory: DatasetDir, manifest: Manifest) -> list[str]:
    """Return the problems of the files that `madgen index` writes. The shards must be intact."""
    checks: list[Callable[[DatasetDir, Manifest], Iterable[str]]] = [_check_index, _check_quarantine, _check_card]
    problems: list[str] = []
    for check in checks:
        try:
            problems += check(directory, manifest)
        except FileNotFoundError as error:
            problems.append(f"{error.filename.name if hasattr(error.filename, 'name') else error.filename} is missing")
        except FormatError as error:
            problems.append(str(error))
    return problems


def _check_index(directory: DatasetDir, manifest: Manifest) -> Iterator[str]:
    """Compare each row of `index.parquet`, and the statistics that readers use to skip rows."""
    import pyarrow
    from pyarrow import parquet

    path = directory.root / "index.parquet"
    open_file(path).close()
    with pyarrow.OSFile(str(path)) as stream:
        try:
            table = parquet.ParquetFile(stream)
            names = set(table.schema_arrow.names)
            if missing := sorted(set(COLUMNS) - names):
                yield f"index.parquet has no column {missing[0]}"
                return
            batches = table.iter_batches(BATCH_ROWS, use_threads=False)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            kept = KeptColumns.of(directory, manifest)
            yield from _compare_rows(rows, directory.entries(), names, kept, manifest)
            yield from _check_statistics(table)
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            yield f"index.parquet is damaged: {' '.join(str(error).split())[:200]}"


def _compare_rows(
    rows: Iterator[dict[str, Any]], entries: Iterator[SampleEntry], names: set[str], kept: KeptColumns, about: Manifest
) -> Iterator[str]:
    licences = cache(partial(licence_values, about))
    for number, entry in enumerate(entries):
        row = next(rows, None)
        if row is None:
            yield f"index.parquet ends after {number} rows"
            return
        expected = {
            **{name: getattr(entry, name) for name in COLUMNS if name in names},
            **dict.fromkeys(names - set(COLUMNS)),
            **(entry.scores or {}),
            **licences(shard_index(entry.shard)),
            **kept.values(entry),
            "prompt_id": about.prompt_id(entry.key),
        }
        wrong = [name for name, value in row.items() if not _equal(value, expected[name])]
        if wrong:
            value = f"{row[wrong[0]]!r:.60}"
            yield f"index.parquet: row {number} says {wrong[0]} {value}, the sidecar of {entry.key} does not"
            return
    if next(rows, None) is not None:
        yield "index.parquet has more rows than there are samples"


def _equal(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))


def _check_statistics(table: Any) -> Iterator[str]:
    """Compare minimum, maximum and number of nulls of each column of a row group with its values."""
    import pyarrow.compute as compute

    for group in range(table.metadata.num_row_groups):
        metadata = table.metadata.row_group(group)
        for column in range(metadata.num_columns):
            chunk = metadata.column(column)
            values = table.read_row_group(group, [chunk.path_in_schema], use_threads=False).column(0)
            recorded = chunk.statistics
            if recorded is None or not len(values):
                continue
            low, high = compute.min_max(values).as_py().values()
            wrong = recorded.has_null_count and recorded.null_count != values.null_count
            if recorded.has_min_max and low is not None:
                wrong |= (recorded.min, recorded.max) != (low, high)
            if wrong or chunk.num_values != len(values):
                yield f"index.parquet: the statistics of {chunk.path_in_schema} are wrong"
                return


def _check_quarantine(directory: DatasetDir, manifest: Manifest) -> Iterator[str]:
    lines = b"".join(
        to_json({"shard": sidecar.shard, **entry.as_dict()})
        for sidecar in directory.sidecars()
        for entry in sidecar.quarantine
    )
    path = directory.root / "quarantine.jsonl"
    if not lines and not path.exists():
        return
    if read_file(path) != lines:
        yield "quarantine.jsonl is not that of the sidecars"


def _check_card(directory: DatasetDir, manifest: Manifest) -> Iterator[str]:
    """Compare the facts in `README.md`, whose other text may be edited, and open the images that it shows."""
    try:
        text = read_file(directory.root / "README.md").decode()
    except UnicodeDecodeError as error:
        yield f"README.md is damaged: {error}"
        return
    samples = sum(len(sidecar.samples) for sidecar in directory.sidecars())
    facts = {
        r"^\| fingerprint \| `(.*)` \|$": [f"{manifest.fingerprint}"],
        r"^(\d+) of (\d+) synthetic panoramas": [f"{samples}", f"{manifest.plan.samples}"],
        r"^  data_files: (.*)$": ["shards/*.tar"],
    }
    for pattern, expected in facts.items():
        match = re.search(pattern, text, re.MULTILINE)
        if match is not None and list(match.groups()) != expected:
            yield f"README.md says {match[0]!r}, the shards do not"
            return
    for name in re.findall(r"^!\[\]\((samples/\d\.jpg)\)$", text, re.MULTILINE):
        try:
            with open_file(directory.root / name) as stream, Image.open(stream, formats=["JPEG"]) as image:
                image.load()
        except FileNotFoundError:
            yield f"{name} is missing"
        except (OSError, ValueError, SyntaxError) as error:
            yield f"{name} is damaged: {error}"
