"""Run `madgen evaluate` and `madgen compare` on the tiny backbone and a random CLIP."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic import PROMPTS, textures, write_dataset

from madgen.dataset.layout import DatasetDir

ROOT = Path(__file__).resolve().parents[2]
FEW = "clip_score,intra_style,fid,kid,coherence"


def report_of(folder):
    return json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def extractor(madgen, madgen_here, job_file, tmp_path, clip_folder):
    """Evaluate a dataset and another one of the same job with different images; return the extractor."""
    networks = f"{clip_folder},vgg=random"
    made = madgen("generate", job_file, "output.dir=md", "prompts.limit=2")
    assert made.code == 0, made.err
    entries = list(DatasetDir(tmp_path / "md").entries())
    images = [image for _, _, image in textures(PROMPTS, 2, 32, 64)]
    others = [(entry.key, entry.prompt, image) for entry, image in zip(entries, images, strict=True)]
    write_dataset(tmp_path / "mad", others, name=DatasetDir(tmp_path / "md").read_manifest().name)
    shutil.copy(tmp_path / "md" / "dataset.json", tmp_path / "mad" / "dataset.json")
    for name in ("md", "mad"):
        done = madgen_here("evaluate", name, "--metrics", FEW, "--extractor", networks, "--references", 3)
        assert done.code == 0, done.err
    return networks


@pytest.mark.slow
def test_compare_of_two_reports_with_a_shared_reference(extractor, madgen_here, tmp_path):
    reports = [report_of(tmp_path / name) for name in ("md", "mad")]
    references = sorted(tmp_path.glob("reference-*/dataset.json"))
    assert len(references) == 1
    content = json.loads(references[0].read_text(encoding="utf-8"))
    sampling, method = content["job"]["sampling"], content["job"]["method"]
    assert (sampling["height"], sampling["width"], method["views"]["layout"]) == (32, 32, "whole")
    assert content["plan"]["samples"] == 2 * 3
    for report in reports:
        protocol = report["metrics"]["fid"]["protocol"]
        assert protocol["reference"]["fingerprint"] == content["fingerprint"]
        assert protocol["crops"]["side_px"] == 32  # a view of the tiny backbone
        assert set(report["metrics"]) == set(FEW.split(","))
    for name in ("report.md", "prompts.png", "trade-off.png"):
        assert (tmp_path / "md" / "report" / name).stat().st_size > 500

    compared = madgen_here("compare", "MultiDiffusion=md", "MAD=mad", "-o", "table.md")
    assert compared.code == 0, compared.err
    rows = {line.split("|")[1].strip(): line for line in compared.out.splitlines() if line.startswith("|")}
    for name, report, other in (("MultiDiffusion", *reports), ("MAD", *reversed(reports))):
        cells = [cell.strip() for cell in rows[name].split("|")[2:-1]]
        for cell, metric in zip(cells, FEW.split(","), strict=True):
            mine, theirs = report["metrics"][metric], other["metrics"][metric]["mean"]
            best = mine["mean"] > theirs if mine["higher_is_better"] else mine["mean"] < theirs
            assert cell.startswith("**" if best else "<u>")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == compared.out
    assert (tmp_path / "table.png").stat().st_size > 500

    again = madgen_here("evaluate", "mad", "--extractor", extractor, "--metrics", FEW, "--references", 3, "--seed", 1)
    assert again.code == 0, again.err
    refused = madgen_here("compare", "md", "mad")
    assert refused.code == 2
    assert "clip_score: crops.seed is 0 in md, 1 in mad" in refused.err
    assert len(refused.err.splitlines()) == 1
    mixed = madgen_here("compare", "md", "mad", "--mixed")
    assert mixed.code == 0
    assert "- fid: crops.seed is 0 in md, 1 in mad" in mixed.out


@pytest.mark.slow
def test_two_torchrun_ranks_write_the_same_report(tmp_path, clip_folder, madgen_here, start, monkeypatch):
    write_dataset(tmp_path / "a", textures(PROMPTS, 4, 32, 96))
    write_dataset(tmp_path / "squares", textures(PROMPTS, 9, 32, 32, seed=1))
    options = ["--reference", "squares", "--extractor", f"{clip_folder},vgg=random", "--crop", "32", "--device", "cpu"]
    options += ["--metrics", "clip_score,fid,giqa"]
    done = madgen_here("evaluate", "a", *options, "-o", "alone")
    assert done.code == 0, done.err
    expected = (tmp_path / "alone" / "report.json").read_bytes()
    for parts in ("a", "squares"):
        for path in (tmp_path / parts / "report").rglob("*.npy"):
            path.unlink()
    other = start("evaluate", "a", *options, "-o", "shared", WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = madgen_here("evaluate", "a", *options, "-o", "shared")
    assert done.code == 0, done.err
    assert other.wait() == 0, other.output()
    assert (tmp_path / "shared" / "report.json").read_bytes() == expected


@pytest.mark.slow
def test_scores_are_logged_to_wandb(tmp_path, clip_folder, madgen_here, wandb_here):
    from madgen.monitoring.wandb_values import summary

    write_dataset(tmp_path / "a", textures(PROMPTS, 2, 32, 96))
    content = json.loads((tmp_path / "a" / "dataset.json").read_text(encoding="utf-8"))
    wandb = {"mode": "offline", "project": "p", "entity": None, "group": None, "id": "scores"}
    content["job"] |= {"monitor": {"wandb": wandb}, "backbone": {"pretrained": "demo"}}
    (tmp_path / "a" / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    options = ["--extractor", f"{clip_folder},vgg=random", "--crop", "32", "--metrics", "clip_score", "--wandb"]
    done = madgen_here("evaluate", "a", *options)
    assert done.code == 0, done.err
    assert list((tmp_path / "wandb").glob("offline-run-*-scores/run-scores.wandb"))
    report = report_of(tmp_path / "a")
    assert summary(report)["scores/clip_score"] == report["metrics"]["clip_score"]["mean"]
    assert summary(report)["scores/clip_score_protocol"] == report["metrics"]["clip_score"]["protocol_id"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere holds no madgen dataset"),
        (["evaluate", "a", "--metrics", "fidd"], "unknown metric 'fidd'; known: clip_score"),
        (["evaluate", "a", "--extractor", "alex"], "--extractor alex: neither paper, demo"),
        (["evaluate", "a", "--pool", "all"], "--pool must be prompts or dataset, got 'all'"),
        (["evaluate", "a", "--halves", "--reference", "b"], "leave --reference out"),
        (["evaluate", "a", "--reference", "b", "--metrics", "fid"], "b holds no madgen dataset"),
        (["evaluate", "a", "--device", "tpu"], "--device tpu is not available"),
        (["compare", "a"], "a contains no report.json; run madgen evaluate a"),
        (["compare", "=a"], "'=a' is neither a path nor name=PATH"),
        (["compare", "MAD="], "'MAD=' is neither a path nor name=PATH"),
    ],
)
def test_invalid_input_exits_2_with_one_line_and_writes_nothing(arguments, message, tmp_path, refused, clip_folder):
    write_dataset(tmp_path / "a", textures(PROMPTS, 2, 32, 96))
    content = json.loads((tmp_path / "a" / "dataset.json").read_text(encoding="utf-8"))
    content["job"]["backbone"] = {"pretrained": str(clip_folder)}
    (tmp_path / "a" / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    more = ["--crop", "32"] if arguments[0] == "evaluate" else []
    if "--extractor" not in arguments and more:
        more += ["--extractor", f"{clip_folder},vgg=random"]
    assert message in refused(*arguments, *more)
