"""Which settings change the fingerprint of a job."""

import pytest

from madgen import load_job
from madgen.dataset import manifest
from madgen.dataset.identity import mad_of_record, recorded_mad
from madgen.dataset.plan import build_plan

OPEN = ["sampling.height=128", "sampling.width=768", "sampling.num_inference_steps=20"]


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a hill\n", encoding="utf-8")

    def of(*overrides):
        job = load_job([], ["prompts.source=p.txt", *OPEN, *overrides])
        return manifest.build(job, build_plan(job), "float32").fingerprint

    return of


@pytest.mark.parametrize(
    "override",
    [
        "method.sync.network=random",  # nothing is synchronized
        "method.regions.bootstrapping=3",  # there are no regions
        "output.quality=50",  # of PNG files
        "sampling.batch_size=2",
        "backbone.cuda_graphs=false",
        "backbone.gpu_memory=80",
        "trainer.devices=2",
        "output.dir=elsewhere",
        "monitor.preview_every=3",
    ],
)
def test_settings_without_effect_keep_the_fingerprint(fingerprint, override):
    assert fingerprint(override) == fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "backbone.compile=true",
        "method.mad.steps=3",
        "sampling.guidance_scale=2",
        "sampling.num_inference_steps=21",
        "sampling.loop=true",
        "prompts.seed=1",
        "prompts.samples_per_prompt=2",
        "output.format=jpg",
        "output.samples_per_shard=7",
        "name=other",
    ],
)
def test_settings_that_change_files_change_the_fingerprint(fingerprint, override):
    assert fingerprint(override) != fingerprint()


def test_blocks_without_merged_steps_keep_the_fingerprint(fingerprint):
    blocks, none, whole = "method.mad.blocks=[mid]", "method.mad.steps=0", "method.views.layout=whole"
    assert fingerprint(none, blocks) == fingerprint(none)
    assert fingerprint(none, "method.mad.cross_attention=always", blocks) != fingerprint(none, blocks)
    assert fingerprint(whole, blocks) == fingerprint(whole, none) == fingerprint(whole)
    assert fingerprint(whole) != fingerprint(none)
    assert fingerprint(blocks) != fingerprint()


def test_settings_count_only_where_they_are_used(fingerprint):
    across = "prompts.across=[a lake]"
    assert fingerprint(across) != fingerprint()
    assert fingerprint(across, "method.regions.bootstrapping=3") != fingerprint(across)
    sync = ("method.sync.weight=20", "method.sync.network=random")
    assert fingerprint(*sync) != fingerprint()
    assert fingerprint(*sync, "method.sync.decay=0.5") != fingerprint(*sync)
    assert fingerprint("output.format=jpg", "output.quality=50") != fingerprint("output.format=jpg")


def test_all_blocks_of_a_unet_are_recorded_as_before(fingerprint):
    """`all` is the default; earlier versions had `[down, mid, up]`, and no positions."""
    assert fingerprint() == fingerprint("method.mad.blocks=[down,mid,up]")
    mad = {"steps": 15, "blocks": ("all",), "cross_attention": "scheduled", "positions": "canvas"}
    recorded = recorded_mad(mad, "sd")
    assert recorded == {"steps": 15, "blocks": ["down", "mid", "up"], "cross_attention": "scheduled"}
    assert mad_of_record(recorded)["blocks"] == ("all",)
    assert recorded_mad(mad, "flux")["blocks"] == ("all",)
    assert mad_of_record({**recorded, "blocks": ["up"]})["blocks"] == ("up",)
