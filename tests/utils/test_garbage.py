"""Garbage is collected rarely while the command line loads libraries and models, and as usual afterwards."""

import gc

import pytest

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
