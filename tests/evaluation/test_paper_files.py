"""Load and plan every file in `jobs/paper` in every variant, and run its quick variant end to end."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madgen.cli.app import main
from madgen.evaluation.paper.plan import load_paper
from madgen.evaluation.paper.tsne import coverage
from madgen.evaluation.reference import generate
from madgen.generation.outcome import Outcome
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "jobs" / "paper").glob("*.yaml"))
NAMES = ["fig10", "fig3", "fig4", "fig8", "fig9", "table1", "table2", "table3", "table4"]


def test_all_tables_and_figures_are_present():
    assert sorted(path.stem for path in FILES) == NAMES


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="real"),
        pytest.param({"demo": True}, id="demo", marks=pytest.mark.slow),
        pytest.param({"quick": True}, id="quick", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_plans(path, variant, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = ROOT / "jobs" / "prompts" / "paper-demo.json"  # GPT1k may not be redistributed
    overrides = [f"prompts.source={source}"] if path.stem == "table3" and not variant else []
    paper = load_paper(path, **variant, overrides=overrides)
    assert len({setting.name for setting in paper.settings if not setting.squares}) >= 2
    for setting in paper.settings:
        evaluations = forecast(ResolvedRun.of(setting.job), assume_spec=True).shapes.evaluations
        assert min(each.texts for each in evaluations.values()) > 0
        assert (setting.job.backbone.pretrained == "demo") == bool(variant)


def test_job_file_without_settings_is_refused():
    with pytest.raises(UserError, match=r"demo.yaml has no settings, so it is not a table"):
        load_paper(ROOT / "jobs/demo.yaml", demo=True)


@pytest.mark.parametrize(("devices", "subprocess"), [("auto", False), (1, False), (2, True)])
def test_generate_with_several_devices_runs_in_a_subprocess(devices, subprocess, tmp_path, monkeypatch):
    """Lightning starts further processes by repeating the command line, which must be that of `generate`."""
    ran = []
    monkeypatch.setattr("madgen.generation.outcome.finished", lambda run: ran.append("here") or Outcome(0, {}, 0.0, 0))
    monkeypatch.setattr(
        "madgen.evaluation.reference._generate_in_subprocess", lambda file: ran.append("subprocess") or 0
    )
    job = load_paper(ROOT / "jobs/paper/fig10.yaml", quick=True).settings[0].job
    job = replace(job, trainer=replace(job.trainer, devices=devices))
    generate(job, tmp_path / "job.yaml")
    assert ran == ["subprocess" if subprocess else "here"]


def test_settings_match_the_paper():
    table = load_paper(ROOT / "jobs/paper/table1.yaml")
    jobs = {setting.label: setting.job for setting in table.settings}
    assert (table.references, table.extractor, table.pool) == (500, "paper", "prompts")
    for job in jobs.values():
        assert (job.sampling.height, job.sampling.width, job.sampling.num_inference_steps) == (512, 3072, 50)
        assert (job.sampling.guidance_scale, job.prompts.samples_per_prompt) == (7.5, 500)
    assert [jobs[f"MAD (τ={tau})"].method.mad.steps for tau in (5, 15, 25, 40, 50)] == [5, 15, 25, 40, 50]
    assert (jobs["MD"].method.mad.steps, jobs["SyncD"].method.sync.weight) == (0, 20.0)
    assert jobs["SD-L"].method.views.layout == "whole"
    widths = {setting.value for setting in load_paper(ROOT / "jobs/paper/fig8.yaml").settings}
    assert widths == {1024, 2048, 3072, 4096, 5120}
    lcm = load_paper(ROOT / "jobs/paper/table4.yaml").settings
    assert {(s.job.sampling.num_inference_steps, s.job.method.mad.steps) for s in lcm if "MAD" in s.label} == {
        (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (4, 0), (4, 2), (4, 4),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["madgen", "paper", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_quick_variant_runs_end_to_end(path, folder, monkeypatch, capsys):
    options = ["--quick", "-o", folder, "trainer.accelerator=cpu"]
    assert run(monkeypatch, path, *options) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed
    for file in printed:
        assert file.parent == folder / path.stem
        if file.suffix == ".png":
            assert np.asarray(Image.open(file).convert("L")).std() > 1
    paper = load_paper(path, quick=True)
    text = "".join(file.read_text(encoding="utf-8") for file in printed if file.suffix == ".md")
    if paper.draw["kind"] != "pictures":
        assert all(setting.label in text for setting in paper.settings)
    if paper.draw["kind"] == "table":
        assert "**" in text
        assert "demo CLIP" in text

    if path.stem in ("table1", "fig9"):  # a second run regenerates nothing
        made = {file: file.stat().st_mtime_ns for suffix in ("tar", "npy") for file in folder.rglob(f"*.{suffix}")}
        assert run(monkeypatch, path, *options) == 0
        assert {file: file.stat().st_mtime_ns for file in made} == made


def test_coverage_is_the_share_of_squares_near_a_crop():
    squares = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert coverage(np.array([[0.5]]), squares, 1) == 0.5
    assert coverage(np.array([[0.5], [10.2]]), squares, 1) == 1.0
    assert coverage(np.array([[100.0]]), squares, 1) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: [{label: a}]\ndraw: {kind: tabel}", "draw.kind must be one of table, pictures, lines, tsne"),
        ("settings: [{label: a}]\ndraw: {kind: table}\nmetrics: [fidd]", "unknown metric 'fidd'; did you mean 'fid'"),
        ("settings: [{label: a, methd: {}}]\ndraw: {kind: table}", "a: unknown key 'methd'; did you mean 'method'"),
        ("settings: [{label: a, method: {mad: {step: 1}}}]\ndraw: {kind: table}", "method.mad.step"),
        ("settings: [{label: a}, {label: a}]\ndraw: {kind: table}", "two settings have the same label"),
        ("setings: []\ndraw: {kind: table}", "unknown key 'setings'; did you mean 'settings'"),
        ("settings: a", "settings must be a list"),
        (
            "settings: [{label: a}]\ndraw: {kind: table}\nreferences: many",
            "references must be an integer >= 1, got 'many'",
        ),
        ("settings: [{label: a}]\ndraw: {kind: table}\nvary: {sampling.width: 64}", "vary must be one key"),
        ("settings: [{label: a}]\ndraw: {kind: table}\npool: all", "pool must be prompts or dataset, got 'all'"),
        ("settings: [{label: a}]\ndraw: {kind: table}\njob: 3", "job must hold keys and values, got 3"),
        ("settings: [{label: a}]\ndraw: {kind: pictures, samples: x}", "draw.samples must be an integer >= 1, got 'x'"),
        ("- a", "must hold keys and values"),
        ("a: [", "cannot read"),
    ],
)
def test_invalid_file_is_refused(text, message, tmp_path):
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_paper(tmp_path / "p.yaml")
