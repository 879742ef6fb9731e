"""`madgen plan` refuses what `madgen generate` would refuse."""

import json

import pytest

from madgen import load_job
from madgen.dataset import manifest
from madgen.planning.resolved_run import ResolvedRun


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.mad.steps=2"], "holds a dataset of another job (method.mad.steps: 1 there, 2 here)"),
        (["prompts.limit=1"], "holds a dataset of another job"),
        (["output.resume=never"], "holds a dataset already and output.resume=never"),
    ],
)
def test_plan_refuses_the_directory_of_another_job_as_generate_does(
    madgen_here, job_file, finished, overrides, message
):
    planned = madgen_here("plan", job_file, *overrides)
    generated = madgen_here("generate", job_file, *overrides)
    assert (planned.code, planned.out) == (2, "")
    assert (planned.code, planned.err) == (generated.code, generated.err)
    assert message in planned.err


def test_plan_accepts_a_finished_dataset_of_the_same_job(madgen_here, job_file, finished):
    result = madgen_here("plan", job_file)
    assert result.code == 0, result.err
    assert "  0 shards left: nothing to generate\n" in result.out
    again = madgen_here("generate", job_file)
    assert (again.code, again.err) == (0, "10 of 10 panoramas in out/shards; 0 generated\n")


def test_plan_counts_the_panoramas_that_will_be_kept(madgen_here, job_file, tmp_path):
    open_shards = tmp_path / "out" / "work" / "open"
    run = ResolvedRun.of(load_job(job_file, [f"output.dir={tmp_path}/out"])).on("cpu")
    manifest.create(run.directory, run.manifest)
    open_shards.mkdir(parents=True)
    (open_shards / "job-000001.a.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert "  2 panoramas of open shards will be kept\n" in madgen_here("plan", job_file).out
    assert json.loads(madgen_here("plan", job_file, "--json").out)["samples_kept"] == 2
    assert "2 kept of stopped workers" in madgen_here("status", "out").out


def test_plan_says_that_generate_needs_a_licence_accepted(madgen_here, job_file):
    words = [job_file, "backbone.pretrained=black-forest-labs/FLUX.1-dev", "backbone.name=flux", "method.mad.steps=0"]
    words += ["sampling.height=1024", "sampling.width=2048", "sampling.num_inference_steps=4"]
    note = "; madgen generate needs backbone.accept_licence=true\n"
    planned = madgen_here("plan", *words)
    assert (planned.code, planned.out.count(note)) == (0, 1), planned.err
    assert note not in madgen_here("plan", *words, "backbone.accept_licence=true").out


@pytest.mark.parametrize("word", ["method.mad.steps=9", "method.regions.bootstrapping=9"])
def test_steps_beyond_the_schedule_are_named(madgen_here, job_file, word):
    """The number is not clipped silently; `share` cannot be beyond the schedule."""
    note = f"madgen: {word} is more than sampling.num_inference_steps=2: "
    for command in (("plan", job_file, word), ("generate", job_file, word), ("sample", "dunes", "--job", job_file)):
        done = madgen_here(*command, *([word] if command[0] == "sample" else []))
        assert (done.code, done.err.count(note)) == (0, 1), done.err
    assert madgen_here("plan", job_file, "method.mad.share=1", "output.dir=new").err == ""
