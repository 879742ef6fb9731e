"""What follows when a dataset is complete: the rest of the upload, with a line of progress."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from madgen.cluster.launch import rank
from madgen.cluster.signals import end_instead
from madgen.config.schema import check_url
from madgen.dataset import manifest
from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.filesystem import Remote, check_at_hand, told
from madgen.dataset.remote.push import Push, Pushed, is_hopeless, open_remote, push, refuse_other
from madgen.generation.outcome import COMPLETE, QUARANTINED, STOPPED, Outcome
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.console import say
from madgen.utils.errors import UserError

LOOK_S = 15.0
"""At the start no longer is waited for an answer of the place that is uploaded to."""
TELL_EVERY_S = 30.0


def hand_over(run: ResolvedRun, outcome: Outcome) -> Outcome:
    """Uploads what is missing of a complete dataset; without it the run is one that stopped early."""
    url = run.job.output.upload
    if url is None or not outcome.state or outcome.code not in (COMPLETE, QUARANTINED):
        return outcome
    end_instead("stopped while it was uploaded: the same command goes on", signal.SIGINT)
    with run.directory.disappearance_is_told():
        pushed = push_with_progress(run.directory, url, "output.upload")
    return outcome if pushed.complete else replace(outcome, code=STOPPED, unsent=f"{pushed.trouble}")


def push_with_progress(directory: DatasetDir, url: str, name: str) -> Pushed:
    """`push`, with a bar on a terminal or a line every 30 s, and what was done in the end."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        pushed = push(directory, url, _teller(progress, url), name)
    if pushed.sent or pushed.complete:
        checked = ", ".join(f"{count} by {how}" for how, count in sorted(pushed.verified.items()))
        say(
            f"{'uploaded to' if pushed.complete else 'partly uploaded to'} {url}: {pushed.sent} files sent "
            f"({pushed.sent_bytes / 1e6:.1f} MB{', verified ' + checked if checked else ''}), {pushed.there} were there"
        )
    return pushed


def _teller(progress: Progress, url: str) -> Callable[[int, int, int], None]:
    task, due = progress.add_task("shards uploaded", total=None), time.monotonic() + 1

    def tell(done: int, shards: int, sent_bytes: int) -> None:
        nonlocal due
        progress.update(task, completed=done, total=shards)
        if progress.disable and time.monotonic() >= due:
            say(f"uploading to {url}: {done} of {shards} shards are there, {sent_bytes / 1e6:.1f} MB sent")
            due = time.monotonic() + TELL_EVERY_S

    return tell


def push_now(directory: DatasetDir, url: str) -> int:
    """`madgen push`: the exit status, 3 if something is not there yet."""
    check_url("URL", url)
    _refuse_itself(directory, open_remote("URL", url), "URL")
    pushed = push_with_progress(directory, url, "URL")
    if pushed.trouble:
        say(f"madgen: the upload is not complete: {pushed.trouble}; the same command goes on with it")
    elif not pushed.complete:
        say(f"madgen: {pushed.shards_left} shards are not made yet; push again when the dataset is complete")
    return COMPLETE if pushed.complete else STOPPED


def _refuse_itself(directory: DatasetDir, remote: Remote, name: str) -> None:
    if remote.protocol == "file" and Path(remote.root).resolve().is_relative_to(directory.root.resolve()):
        raise UserError(f"{name}={remote.url} lies in the dataset {directory.root} itself; name another place")


def _content(run: ResolvedRun) -> Manifest:
    """What `dataset.json` says or will say; without a fingerprint as long as the weights are not at hand."""
    if run.directory.manifest.exists():
        return run.directory.read_manifest()
    if run.weights_are_local:
        return run.manifest
    return Manifest(None, run.job.as_dict(), manifest.plan_totals(run.plan))


def refuse_other_place(run: ResolvedRun) -> None:
    """UserError before anything is made if `output.upload` holds another dataset; a place that is away is only told."""
    url = run.job.output.upload
    if url is None:
        return
    check_at_hand("output.upload", url)
    content = _content(run)
    found: list[BaseException] = []

    def look() -> None:
        try:
            remote = open_remote("output.upload", url)
            _refuse_itself(run.directory, remote, "output.upload")
            sender = Push(run.directory, remote, attempts=2)
            refuse_other(sender, sender.listing(), content, "output.upload")
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LOOK_S)
    if found and isinstance(found[0], UserError):
        raise found[0]
    if found and is_hopeless(found[0].__cause__ or found[0]):
        raise UserError(f"output.upload={url} cannot be used: {told(found[0].__cause__ or found[0])}")
    if (found or thread.is_alive()) and rank() == 0:
        why = told(found[0].__cause__ or found[0]) if found else f"no answer in {LOOK_S:.0f} s"
        say(f"madgen: output.upload={url} cannot be reached now ({why}); sampling goes on, and it is tried again")
