"""Upload a dataset: check the target before a run, send the rest after it, `madgen push`."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

from madgen.cluster.launch import rank
from madgen.cluster.signals import exit_on_signals
from madgen.config.schema import check_url
from madgen.dataset import manifest
from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.filesystem import Remote, describe_error
from madgen.dataset.remote.push import Push, Pushed, is_hopeless, open_remote, push, refuse_other
from madgen.generation.outcome import COMPLETE, QUARANTINED, STOPPED, Outcome
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.console import plural, size_text
from madgen.utils.credentials import mask
from madgen.utils.errors import UserError
from madgen.utils.filesystems import check_client_installed
from madgen.utils.progress import showing_progress

logger = logging.getLogger(__name__)

STOPPED_UPLOAD = "stopped during the upload; rerun the same command to resume"
CHECK_TIMEOUT_S = 15.0
"""Longest wait for the upload target before a run starts."""


def finish_upload(run: ResolvedRun, outcome: Outcome) -> Outcome:
    """Upload the rest of a complete dataset; if that fails, the outcome is that of a stopped run."""
    url = run.job.output.upload
    if url is None or not outcome.state or outcome.code not in (COMPLETE, QUARANTINED):
        return outcome
    exit_on_signals(STOPPED_UPLOAD)
    with run.directory.reporting_disappearance():
        pushed = push_with_progress(run.directory, url, "output.upload")
    return outcome if pushed.complete else replace(outcome, code=STOPPED, unsent=f"{pushed.trouble}")


def push_with_progress(directory: DatasetDir, url: str, name: str) -> Pushed:
    """Run `push` with a progress bar, or with a line every 30 s if stderr is not a terminal."""
    with showing_progress(f"uploading to {mask(url)}", "shards", first_line_s=1) as show:
        pushed = push(directory, url, lambda done, shards, sent: show(done, shards, f"{size_text(sent)} sent"), name)
    if pushed.sent or pushed.complete:
        checked = ", ".join(f"{count} by {how}" for how, count in sorted(pushed.verified.items()))
        logger.info(
            f"{'uploaded to' if pushed.complete else 'partly uploaded to'} {url}: {plural(pushed.sent, 'file')} sent "
            f"({size_text(pushed.sent_bytes)}{', verified ' + checked if checked else ''}), {pushed.there} unchanged"
        )
    return pushed


def push_now(directory: DatasetDir, url: str) -> int:
    """Run `madgen push`; return the exit status, 3 if the upload is not complete."""
    exit_on_signals(STOPPED_UPLOAD)
    check_url("URL", url)
    _check_outside(directory, open_remote("URL", url), "URL")
    pushed = push_with_progress(directory, url, "URL")
    if pushed.trouble:
        logger.warning(f"the upload is not complete: {pushed.trouble}; rerun the same command to resume")
    elif not pushed.complete:
        logger.warning(
            f"{plural(pushed.shards_left, 'shard')} not generated yet; push again when the dataset is complete"
        )
    return COMPLETE if pushed.complete else STOPPED


def _check_outside(directory: DatasetDir, remote: Remote, name: str) -> None:
    if remote.protocol == "file" and Path(remote.root).resolve().is_relative_to(directory.root.resolve()):
        raise UserError(f"{name}={remote.url} is inside the dataset {directory.root} itself; choose another target")


def _content(run: ResolvedRun) -> Manifest:
    """Return the content of `dataset.json`; without a fingerprint if the weights are not on this machine."""
    if run.weights_are_local:
        return run.manifest
    if run.directory.manifest.exists():
        return run.directory.read_manifest()
    return Manifest(None, run.job.as_dict(), manifest.plan_totals(run.plan))


def check_upload_target(run: ResolvedRun) -> None:
    """Raise UserError if `output.upload` holds another dataset; only warn if it cannot be reached."""
    url = run.job.output.upload
    if url is None:
        return
    check_client_installed("output.upload", url)
    content = _content(run)
    errors: list[BaseException] = []

    def check() -> None:
        try:
            remote = open_remote("output.upload", url)
            _check_outside(run.directory, remote, "output.upload")
            sender = Push(run.directory, remote, attempts=2)
            refuse_other(sender, sender.listing(), content, "output.upload")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(CHECK_TIMEOUT_S)
    if errors and isinstance(errors[0], UserError):
        raise errors[0]
    if errors and is_hopeless(errors[0].__cause__ or errors[0]):
        raise UserError(f"output.upload={url} cannot be used: {describe_error(errors[0].__cause__ or errors[0])}")
    if (errors or thread.is_alive()) and rank() == 0:
        why = describe_error(errors[0].__cause__ or errors[0]) if errors else f"no answer in {CHECK_TIMEOUT_S:.0f} s"
        logger.warning(
            f"output.upload={url} cannot be reached now ({why}); sampling continues, and uploads are retried"
        )
