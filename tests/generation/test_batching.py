import json

import pytest

from madgen.backbones import BackboneSpec
from madgen.config.schema import MethodConfig, SamplingConfig, ViewsConfig
from madgen.generation.batch_size import MAX_BATCH, BatchSizes, BatchSplit
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method
from madgen.types import Prompt, Region

SD2 = BackboneSpec(channels=4, factor=8, view_size=64, coarsest=8, guidance="cfg")
SDXL = BackboneSpec(channels=4, factor=8, view_size=128, coarsest=4, guidance="cfg")
LCM = BackboneSpec(channels=4, factor=8, view_size=64, coarsest=8, guidance="embedded")


def sizes(asked="auto", device="cuda", spec=SD2, layout="overlapping", overlap_from=None, **sampling):
    method = Method(MethodConfig(views=ViewsConfig(layout=layout, overlap_from=overlap_from)))
    return BatchSizes(SamplingConfig(batch_size=asked, **sampling), Geometry(spec, method), device)


def prompt(width, height=512, regions=()):
    return Prompt("0", "hills", "", height, width, regions=regions)


@pytest.mark.parametrize(
    ("width", "views", "batch"),
    [(512, 1, 32), (640, 2, 16), (1024, 5, 7), (3072, 21, 2), (4736, 34, 1), (8192, 61, 1)],
)
def test_auto_fills_a_gpu_with_views(width, views, batch):
    made = sizes()
    assert made.geometry.build(512, width).at(0).count == views
    assert made(prompt(width)) == batch


def test_auto_counts_the_evaluations_of_a_step():
    assert sizes(layout="whole")(prompt(1024)) == 16  # as much as two views
    assert sizes(layout="shifted")(prompt(1024)) == 16
    assert sizes(layout="shifted", overlap_from=40)(prompt(1024)) == 7, "the last steps have five views"
    assert sizes(loop=True)(prompt(1024)) == 4, "eight views, which wrap around"
    assert sizes(guidance_scale=1.0)(prompt(1024)) == 13, "half as much without guidance"
    assert sizes(spec=LCM)(prompt(1024)) == 13
    assert sizes(spec=SDXL)(prompt(1024, 1024)) == 8, "a view is four of Stable Diffusion 2"
    assert sizes(layout="whole")(prompt(64, 64)) == MAX_BATCH


def test_auto_counts_the_prompts_on_a_panorama():
    region = Region((0, 0, 8, 8), "a hut")
    assert sizes()(prompt(1024, regions=(region,) * 4)) == 2


def test_auto_is_one_on_a_cpu_and_a_number_is_used_as_given():
    assert sizes(device="cpu")(prompt(512)) == 1
    assert sizes(3)(prompt(8192)) == 3


def test_run_samples_batches_of_the_chosen_size(madgen_here, job_file, tmp_path, monkeypatch):
    """10 panoramas in shards of 3; five views of 8 x 8 cells each, twice for guidance."""
    from madgen.generation.robust_sampler import RobustSampler

    monkeypatch.setattr("madgen.generation.batch_size.BUSY_CELLS", {"cpu": 2 * 5 * 64 + 1})
    seen, make = [], RobustSampler.__call__
    monkeypatch.setattr(RobustSampler, "__call__", lambda self, tasks: seen.append(len(tasks)) or make(self, tasks))
    assert madgen_here("generate", job_file, "sampling.batch_size=auto").code == 0
    assert seen == [2, 1, 2, 1, 2, 1, 1]
    assert (
        json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))["job"]["sampling"]["batch_size"]
        == "auto"
    )


def test_split_batches_are_reported_with_a_smaller_setting():
    assert [(split.panoramas, split.chunk_views) for split in BatchSplit(7).smaller()] == [
        (4, None), (2, None), (1, None), (1, 4), (1, 1)
    ]  # fmt: skip
    assert list(BatchSplit(1, 4).smaller()) == [BatchSplit(1, 1)]
    assert list(BatchSplit(1, 1).smaller()) == []
    assert BatchSplit(3).groups("abcdefg") == ["abc", "def", "g"]
    assert str(BatchSplit(2)) == "2 panoramas at a time"
    assert (
        str(BatchSplit(1, 4))
        == "one panorama and 4 views at a time (all views of a prompt where attention merges them)"
    )
