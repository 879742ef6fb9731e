"""Progress of commands in log files and on terminals."""

import os
import pty
import subprocess
import sys

import pytest

from madgen.monitoring import progress as monitor
from madgen.utils import progress
from madgen.utils.progress import showing_progress


def test_lines_are_logged_at_intervals(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with caplog.at_level("INFO", "madgen"), showing_progress("uploading to s3://[b]/x", "shards") as show:
        show(1, 2, "4.0 MB sent")
        show(2, 2)
    assert caplog.messages == [
        "uploading to s3://[b]/x: 1 of 2 shards, 4.0 MB sent",
        "uploading to s3://[b]/x: 2 of 2 shards",
    ]


def test_quick_commands_log_nothing(caplog):
    with caplog.at_level("INFO", "madgen"), showing_progress("indexing out", "shards") as show:
        show(1, 1)
    assert not caplog.messages


def test_a_terminal_gets_a_bar():
    code = """
from madgen.utils.progress import showing_progress
with showing_progress("verifying [b]out", "shards") as show:
    show(3, 7, "1.2 GB read")
"""
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=follower, check=True, env={**os.environ, "COLUMNS": "120"})
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    os.close(follower)
    for text in ("verifying [b]out", "3/7", "shards", "1.2 GB read"):
        assert text in shown, shown


@pytest.mark.parametrize("command", [("verify", "out"), ("index", "out"), ("push", "out")])
def test_commands_that_read_all_shards_show_progress(madgen_here, job_file, tmp_path, monkeypatch, command):
    assert madgen_here("generate", job_file, "prompts.limit=2").code == 0
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    url = [(tmp_path / "copy").as_uri()] if command[0] == "push" else []
    result = madgen_here(*command, *url)
    assert result.code == 0, result.err
    assert "out: 2 of 2 shards" in result.err or "copy: 2 of 2 shards" in result.err


def test_steps_of_the_first_batch_are_shown(madgen_here, job_file, monkeypatch):
    monkeypatch.setattr(monitor, "LOG_EVERY_S", 0.0)
    result = madgen_here("generate", job_file, "prompts.limit=1", "sampling.num_inference_steps=3")
    lines = [line.partition("panoramas, ")[2] for line in result.err.splitlines() if "0/2 panoramas" in line]
    assert lines[:2] == ["starting", "sampling the first batch, step 1 of 3"]
    assert result.code == 0, result.err


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_log_files_have_no_escape_sequences(madgen_here, job_file, monkeypatch, variable):
    """Notebooks set these variables for the processes that they start."""
    monkeypatch.setenv(variable, "1")
    for command in (("generate", job_file, "prompts.limit=1"), ("verify", "out"), ("index", "out"), ("preview", "out")):
        result = madgen_here(*command)
        assert result.code == 0, result.err
        assert "\x1b" not in result.err + result.out
