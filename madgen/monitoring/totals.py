"""Totals over the sidecars of finished shards, each of which is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass

from madgen.dataset.checks.tar import check_size
from madgen.dataset.format import FormatError, ShardSummary
from madgen.dataset.layout import DatasetDir


@dataclass(frozen=True)
class _Shard:
    samples: int
    quarantined: Counter[str]
    seconds: Counter[str]


class Totals:
    """Totals of finished shards; `update` reads the new ones."""

    def __init__(self, directory: DatasetDir):
        self.directory = directory
        self.shards: dict[str, _Shard] = {}
        self.samples = 0
        self.quarantined: Counter[str] = Counter()
        """By reason."""
        self.seconds: Counter[str] = Counter()
        """Worker seconds by activity."""
        self.damaged: FormatError | None = None
        """The error of the first damaged sidecar or tar at the last update; its shard is not counted."""

    def update(self, planned: Container[str]) -> set[str]:
        """Count the planned shards that are finished, except damaged ones; return their names."""
        done = {name for name in self.directory.done() if name in planned}
        for name in self.shards.keys() - done:  # marked for regeneration
            self._add(self.shards.pop(name), -1)
        self.damaged = None
        for name in sorted(done - self.shards.keys()):
            try:
                summary = self.directory.read_summary(name)
                _check_tar(self.directory, name, summary)
                self.shards[name] = _read(summary)
            except FileNotFoundError:  # just marked for regeneration
                continue
            except FormatError as error:
                self.damaged = self.damaged or error
                continue
            self._add(self.shards[name], 1)
        return done

    def _add(self, shard: _Shard, sign: int) -> None:
        self.samples += sign * shard.samples
        for sums, more in ((self.quarantined, shard.quarantined), (self.seconds, shard.seconds)):
            for name, value in more.items():
                sums[name] += sign * value

    def settled(self) -> int:
        """Return the number of samples that are done or in quarantine."""
        return self.samples + self.quarantined.total()


def _check_tar(directory: DatasetDir, name: str, sidecar: ShardSummary) -> None:
    """Raise FormatError if a tar is longer or shorter than its samples; `verify` reads them."""
    with suppress(KeyError, TypeError):  # damaged entries, which `verify` reports
        check_size(directory, name, max((entry["offset"] + entry["size"] for entry in sidecar.samples), default=0))


def _read(sidecar: ShardSummary) -> _Shard:
    reasons = Counter(entry.reason for entry in sidecar.quarantine)
    return _Shard(len(sidecar.samples), reasons, Counter(sidecar.seconds))
