"""Puts back on the list of `generate` what `verify` found broken."""

from __future__ import annotations

from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.recovery import reopen
from madgen.dataset.verify import Verdict, planned_samples, sidecar_time
from madgen.utils.errors import UserError


def repair(directory: DatasetDir, verdict: Verdict) -> int:
    """Opens every broken shard again, its whole samples kept; how many samples are to be made.

    A sidecar that was written after the check is left alone, and so are files that were not planned: they may be
    somebody's.
    """
    manifest, again = directory.read_manifest(), 0
    if "filtered" in manifest:
        raise UserError(f"{directory.root} was not generated: remove it, then madgen filter again")
    plan = manifest["plan"]
    for name, broken in verdict.broken.items():
        if sidecar_time(directory, name) == broken.changed:  # else a worker has mended it meanwhile
            reopen(directory, name, broken.whole)
            again += planned_samples(plan, name) - len(broken.whole)
    return again
