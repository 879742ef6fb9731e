"""Garbage is collected rarely while the command line loads libraries and models, and as usual afterwards."""

import gc
import subprocess
import sys

import pytest
from forks import WAIT_S

from madgen.config.loader import load_job
from madgen.sampling.sampler import PanoramaSampler
from madgen.utils.garbage import RARELY, USUALLY, collect_rarely, collect_usually


@pytest.fixture(autouse=True)
def restored():
    yield
    gc.set_threshold(*USUALLY)


def test_a_loaded_sampler_ends_the_start(tiny):
    collect_rarely()
    assert gc.get_threshold() == RARELY
    PanoramaSampler.from_job(load_job([], [f"backbone.pretrained={tiny}"]))
    assert gc.get_threshold() == USUALLY


def test_other_settings_of_a_program_stay(tiny):
    gc.set_threshold(123, 4, 5)
    PanoramaSampler.from_job(load_job([], [f"backbone.pretrained={tiny}"]))
    collect_usually()
    assert gc.get_threshold() == (123, 4, 5)


def test_objects_are_freed_at_the_end():
    code = """
import atexit, gc
from madgen.utils.garbage import collect_rarely, collect_usually
atexit.register(lambda: print(gc.get_freeze_count()))
collect_rarely()
collect_usually()
print(gc.get_freeze_count() > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout.split() == ["True", "0"]
