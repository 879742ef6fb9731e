"""Finish a run: exit status, derived files and closing lines. Imports no torch."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from madgen.cluster.launch import joins_a_group
from madgen.dataset import manifest
from madgen.dataset.foreign_shards import refuse_foreign_shards
from madgen.dataset.format import FormatError
from madgen.dataset.index import is_tidy, write_index, write_quarantine
from madgen.dataset.shards.leases import remove_work
from madgen.monitoring.status import status
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.console import plural, rate_text

logger = logging.getLogger(__name__)

COMPLETE, STOPPED, QUARANTINED = 0, 3, 4


@dataclass(frozen=True)
class Outcome:
    """Result of `generate`; `code` is the exit status."""

    code: int
    state: dict[str, Any]
    seconds: float
    generated: int
    tripped: str | None = None
    """Why the run stopped itself, if too many samples failed."""
    unsent: str | None = None
    """Why the upload of a complete dataset is not complete."""


def finished(run: ResolvedRun) -> Outcome | None:
    """Return the outcome of a complete dataset, without importing torch.

    None if something is left to do, or if other processes wait for this one to join them.
    """
    started, job, directory = time.monotonic(), run.job, run.directory
    if job.retry is not None or joins_a_group(job.trainer) or not directory.manifest.exists():
        return None
    if not run.is_complete() or not run.weights_are_local:
        return None
    run.check_directory()
    try:
        directory.read_manifest()
        run = run.in_recorded_dtype()
    except FormatError:
        return None  # a run on a device writes it again
    manifest.create(directory, run.manifest, job.output.resume)
    refuse_foreign_shards(directory, run.manifest)
    return finish(run, started, 0)


def finish(run: ResolvedRun, started: float, generated: int, tripped: str | None = None) -> Outcome:
    """Write derived files and clean up once all shards are done; then read the state of the dataset.

    A run whose dataset has been extended by another job is complete with its own shards.
    """
    directory = run.directory
    state = status(directory)
    if state["quarantined"] or (directory.root / "quarantine.jsonl").exists():
        write_quarantine(directory)
    if state["complete"] and not is_tidy(directory):
        write_index(directory)
        directory.sweep()
        remove_work(directory, lambda: status(directory)["complete"])
    complete = state["complete"] or (run.plan.shard_count < state["shards"]["planned"] and run.is_complete())
    code = STOPPED if not complete else QUARANTINED if state["quarantined"] else COMPLETE
    return Outcome(code, state, time.monotonic() - started, generated, tripped)


def report(outcome: Outcome, run: ResolvedRun) -> None:
    """Print the closing lines: results, location, next steps."""
    if not outcome.state:
        return
    state, job, out = outcome.state, run.job, run.directory.root
    rate = rate_text(outcome.generated / max(outcome.seconds, 1e-3))
    pace = f" in {outcome.seconds:.0f} s ({rate})" if outcome.generated else ""
    unfinished = state["in_flight"] + state["kept"]
    more = f", {unfinished} more in open shards" if unfinished else ""
    logger.info(
        f"{state['done']} of {plural(state['planned'], 'panorama')} in {out}/shards{more}; "
        f"{outcome.generated} generated{pace}"
    )
    if state["quarantined"]:
        again = "" if outcome.tripped else "; to retry them, rerun the same command with retry=quarantined"
        logger.info(f"{state['quarantined']} quarantined, see {out}/quarantine.jsonl{again}")
    if outcome.tripped:
        logger.warning(f"{outcome.tripped}; fix the cause, then rerun with retry=quarantined")
    elif outcome.unsent is not None:
        url = job.output.upload
        logger.warning(f"the upload to {url} is not complete: {outcome.unsent}; "
            f"rerun the same command, or run madgen push {out} {url}")  # fmt: skip
    elif outcome.code == STOPPED:
        logger.info("stopped early; panoramas of unfinished shards are kept: rerun the same command to resume")
    elif outcome.generated:
        logger.info(f"next: madgen preview {out}    madgen verify {out}")
