"""The coherence study: its settings, its cache, and a run of two steps."""

import json

import coherence
import coherence_fidelity
import numpy as np
import pytest
from coherence_report import mean_and_error, pareto_front, values
from coherence_settings import (
    PROMPTS,
    Setting,
    StudyGeometry,
    new_sampler,
    overlap_from,
    settings,
    unet_passes,
    view_evaluations,
)
from demo_backbone.scenes import GROUNDS, HORIZONS, TIMES
from processes import ROOT, Forked, environment

from madgen.backbones import backbone_module
from madgen.config.schema import MadConfig, MethodConfig, ViewsConfig
from madgen.demo import WEIGHTS
from madgen.hub.weights import ModelFiles
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method

STUDY = coherence.Study("demo", "some weights", 20)


def build(setting, steps=20):
    mad = MadConfig(steps=setting.merged_steps(steps), blocks=setting.blocks, cross_attention=setting.cross_attention)
    views = ViewsConfig(layout=setting.layout, stride=setting.stride, overlap_from=overlap_from(setting, steps))
    spec = backbone_module("sd").describe(ModelFiles(str(WEIGHTS)))
    plain = Geometry(spec, Method(MethodConfig(views=views, mad=mad)))
    return StudyGeometry(plain, setting, steps).build(setting.height, setting.width, setting.loop)


@pytest.mark.parametrize("pretrained", ["demo", "demo-dit"])
def test_settings_have_unique_names_and_views_that_can_merge(pretrained):
    names = [(setting.group, setting.name) for setting in settings(pretrained)]
    assert len(set(names)) == len(names)
    for setting in settings(pretrained):
        layout = build(setting)
        assert all(
            layout.at(step).count == 1 or layout.at(step).divisible(4) for step in range(setting.merged_steps(20))
        ), setting


def test_a_transformer_that_merges_in_all_layers_counts_as_the_canvas():
    chosen = {setting.name: setting for setting in settings("demo-dit") if setting.group == "methods"}
    for name in ("direct", "MAD in the first 100% of the steps"):
        sampler = new_sampler(chosen[name], "demo-dit", 20)
        assert view_evaluations(sampler, chosen[name], 20) == unet_passes(sampler, chosen[name], 20) == 4 * 20


def test_prompts_name_attributes_that_are_measurable():
    known = {"time": TIMES, "ground": GROUNDS, "horizon": HORIZONS}
    for prompt, named in PROMPTS.items():
        assert all(value in known[kind] and value in prompt for kind, value in named.items())
        assert len(named) <= 1, "a prompt of the study leaves most open"


def test_shifted_views_overlap_in_the_first_and_last_steps():
    setting = Setting("a", "b", layout="shifted", overlap_first=0.1, overlap_last=0.2)
    counts = [build(setting).at(step).count for step in range(20)]
    assert [count == 13 for count in counts] == [True] * 2 + [False] * 14 + [True] * 4
    fine = build(Setting("a", "b", 0.8, layout="shifted"))
    assert [fine.at(step).divisible(4) for step in range(16)] == [True] * 16
    assert not any(fine.at(step).divisible(2) for step in range(16, 20))  # 15, 7, 11, 3


def test_cache_key_depends_on_all_inputs_of_the_pixels():
    mad, same = Setting("tau", "MAD", 0.3), Setting("methods", "other name", 0.3, share=0.5)
    assert STUDY.key(mad, "hills", 1) == STUDY.key(same, "hills", 1)
    others = [
        STUDY.key(Setting("tau", "MAD", 0.5), "hills", 1),
        STUDY.key(Setting("tau", "MAD", 0.3, loop=True), "hills", 1),
        STUDY.key(mad, "dunes", 1),
        STUDY.key(mad, "hills", 2),
        coherence.Study("demo", "other weights", 20).key(mad, "hills", 1),
        coherence.Study("demo", "some weights", 10).key(mad, "hills", 1),
    ]
    assert len({STUDY.key(mad, "hills", 1), *others}) == 7


def test_settings_share_prompts_and_seeds():
    whole = STUDY.samples(Setting("a", "b"), 64)
    assert len(set(whole)) == 64
    assert {prompt: sum(p == prompt for p, _ in whole) for prompt in PROMPTS} == dict.fromkeys(PROMPTS, 4)
    assert STUDY.samples(Setting("a", "b", share=0.25), 64) == whole[:16]


def test_each_missing_panorama_is_sampled_once():
    mad, same = Setting("tau", "MAD", 0.3), Setting("methods", "other name", 0.3)
    known = dict.fromkeys(STUDY.key(mad, *sample) for sample in STUDY.samples(mad, 3))
    work = list(coherence.missing(STUDY, [mad, same], known, 8, 2))
    assert [len(item.samples) for item in work] == [2, 2, 1]
    assert [sample for item in work for sample in item.samples] == STUDY.samples(mad, 8)[3:]


@pytest.mark.parametrize("torn", ["", '{"key": "half'])
def test_truncated_last_line_of_the_cache_is_dropped(tmp_path, torn):
    cache = tmp_path / "scores.jsonl"
    cache.write_text('{"key": "a", "sky": 1}\n' + torn, encoding="utf-8")
    assert coherence.read_cache(cache) == {"a": {"key": "a", "sky": 1}}
    assert cache.read_text(encoding="utf-8") == '{"key": "a", "sky": 1}\n'


def test_cells_hold_mean_and_standard_error():
    rows = [{"prompt": "a", "summary": [0.0] * 7, "caption": None}, {"prompt": "a", "summary": [2.0] * 7, "caption": 5}]
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
    assert values(rows, "caption") == [5]
    assert values(rows, "variety colour") == pytest.approx([2**0.5])
    assert values(rows[:1], "variety colour") == []


@pytest.mark.slow
def test_script_resumes_after_a_truncated_cache(tmp_path):
    command = ["coherence.py", str(tmp_path), "--panoramas", "3", "--steps", "2", "--only", "methods: shifted, no"]
    folder = str(ROOT / "benchmarks")
    code = f"""
import multiprocessing, runpy, sys
fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: fork  # a fork has no imports to do
sys.argv = {[*command, "--workers", "1"]!r}
sys.path.insert(0, {folder!r})
runpy.run_path({folder!r} + "/coherence.py", run_name="__main__")
"""

    def run():
        process = Forked((), tmp_path, environment(), code)
        assert process.wait() == 0, process.output()

    run()
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["views"] > 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| shifted, no MAD (SpotDiffusion) | 128x512 | 2, 0 | 3 | 10 |" in report
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    (tmp_path / "scores.jsonl").write_text("\n".join(lines)[:-9], encoding="utf-8")  # the last line lost its end
    run()
    again = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["key"] for line in again} == {json.loads(line)["key"] for line in lines}
    assert len(again) == len(lines)


def test_pareto_front_has_the_settings_that_no_other_one_beats():
    costs, scores = [100, 100, 50, 200, 300, 60], [5.0, 4.0, 9.0, 4.0, 3.0, float("nan")]
    assert pareto_front(costs, scores) == [2, 1, 4]


def test_distance_varies_with_the_panoramas_that_are_drawn():
    generator = np.random.default_rng(1)
    same = [generator.normal(size=(4, 3))] * 8
    value, error = coherence_fidelity._distance(same, generator.normal(size=(40, 3)))
    assert (value > 0, error) == (True, 0)
    _, error = coherence_fidelity._distance([part + n for n, part in enumerate(same)], same[0])
    assert error > 0
