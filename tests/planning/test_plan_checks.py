"""`madgen plan` refuses what `madgen generate` would refuse."""

import pytest


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
    assert "0 shards left" in result.out
