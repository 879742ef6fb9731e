import pytest

from madgen.backbones import BackboneSpec
from madgen.engine.batching import BatchSizes
from madgen.engine.ladder import Rung
from madgen.geometry import Geometry
from madgen.types import Prompt

SPEC = BackboneSpec(channels=4, factor=8, view_size=64, coarsest=8, guidance_embedded=False)


def sizes(asked, device="cuda", layout="overlapping", loop=False):
    return BatchSizes(asked, Geometry(SPEC, layout, None, None, None), loop, device)


def prompt(width, height=512):
    return Prompt("0", "hills", "", height, width)


@pytest.mark.parametrize(
    ("width", "views", "batch"),
    [(512, 1, 32), (640, 2, 16), (1024, 5, 7), (3072, 21, 2), (4736, 34, 1), (8192, 61, 1)],
)
def test_auto_fills_a_gpu_with_views(width, views, batch):
    geometry = Geometry(SPEC, "overlapping", None, None, None)
    assert geometry.build(512, width).at(0).count == views
    assert sizes("auto")(prompt(width)) == batch


def test_auto_counts_what_a_step_computes():
    assert sizes("auto", layout="whole")(prompt(1024)) == 16  # as much as two views
    assert sizes("auto", layout="shifted")(prompt(1024)) == 11  # three views, moved by some cells
    assert sizes("auto", loop=True)(prompt(1024)) == 4  # eight views, which wrap around


def test_on_a_cpu_auto_is_one_and_a_number_is_that_number():
    assert sizes("auto", device="cpu")(prompt(512)) == 1
    assert sizes(3)(prompt(8192)) == 3


def test_a_rung_says_what_is_done_and_what_takes_less():
    assert [(rung.panoramas, rung.chunk_views) for rung in Rung(7).below()] == [
        (4, None), (2, None), (1, None), (1, 4), (1, 1)
    ]  # fmt: skip
    assert list(Rung(1, 4).below()) == [Rung(1, 1)]
    assert list(Rung(1, 1).below()) == []
    assert Rung(3).groups("abcdefg") == ["abc", "def", "g"]
    assert str(Rung(2)) == "2 panoramas at a time"
    assert str(Rung(1, 4)) == "one panorama and 4 views at a time, all of a prompt's where attention merges them"
