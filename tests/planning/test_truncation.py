"""Prompts that the text encoder truncates are counted before anything is sampled."""

import json
import tarfile

import pytest

from madgen import PanoramaSampler, load_job
from madgen.planning import truncation
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.truncation import count_truncated

FITS = " ".join(["mountains"] * 30)  # of 32 tokens, two mark the beginning and the end
LONG = f"{FITS} at dawn"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def count(lines, *overrides):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        job = load_job([], ["prompts.source=p.jsonl", "sampling.height=128", "sampling.width=768", *overrides])
        return count_truncated(ResolvedRun.of(job))

    return count


def test_long_prompts_are_counted_and_the_first_is_located(counted):
    found = counted([{"prompt": "a hill"}, {"prompt": FITS}, {"prompt": LONG}, {"prompt": LONG + " x"}])
    assert (found.tokens, found.prompts, found.checked, found.candidates) == (32, 2, 3, 3)
    (line,) = found.warnings(4)
    assert line == (
        "2 of 4 prompts are longer than 32 tokens and will be truncated; the first is p.jsonl:3, of 34 tokens, which "
        "loses 'at dawn'"
    )


def test_a_long_rest_is_shortened(counted):
    (line,) = counted([{"prompt": f"{FITS} {'at dawn ' * 20}"}]).warnings(1)
    assert line.endswith("p.jsonl:1, of 72 tokens, which loses 'at dawn at dawn at dawn at dawn at dawn ...'")


def test_regions_and_negative_prompts_of_a_line_count(counted):
    lines = [{"prompt": "a", "across": [LONG]}, {"prompt": "b", "negative_prompt": LONG}, {"prompt": "c", "seed": 1}]
    assert counted(lines).prompts == 2


def test_negative_prompt_of_the_job_is_reported_once(counted):
    found = counted([{"prompt": "a"}, {"prompt": "b", "seed": 1}], f"prompts.negative_prompt={LONG}")
    assert (found.prompts, found.shared) == (0, True)
    assert found.warnings(2) == [
        "the job's negative prompt, or a prompt of its regions, is longer than 32 tokens and will be truncated"
    ]


def test_number_of_checked_prompts_is_limited(counted, monkeypatch):
    monkeypatch.setattr(truncation, "MAX_CHECKED", 2)
    found = counted([{"prompt": f"{LONG} {number}"} for number in range(5)])
    (line,) = found.warnings(5)
    assert line == (
        "at least 2 of 5 prompts are longer than 32 tokens and will be truncated; the first is p.jsonl:1, of 35 "
        "tokens, which loses 'at dawn 0' (checked the first 2 of 5 long prompts)"
    )


def test_no_tokenizer_is_loaded_for_short_prompts(counted, monkeypatch):
    monkeypatch.setattr("madgen.hub.tokenizers.TextLimit.load", lambda self: pytest.fail("it was loaded"))
    found = counted([{"prompt": "a hill"}])
    assert (found.prompts, found.warnings(1)) == (0, [])


@pytest.mark.parametrize("pretrained", ["nobody/nothing", "/no/folder"])
def test_unknown_without_the_tokenizer(counted, pretrained):
    assert counted([{"prompt": LONG}], f"backbone.pretrained={pretrained}") is None


def test_plan_and_generate_warn_once_on_stderr(madgen, job_file, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a hill\n{LONG}\n", encoding="utf-8")
    done = madgen("plan", job_file, "--json")
    assert json.loads(done.out)["prompts_cut"] == 1
    warning = (
        "madgen: 1 of 2 prompts is longer than 32 tokens and will be truncated; the first is prompts.txt:2, of 34 "
        "tokens, which loses 'at dawn'\n"
    )
    assert done.err == warning
    done = madgen("generate", job_file)
    assert (done.code, done.err.count("truncated"), done.err.startswith(warning)) == (0, 1, True)
    cut = {}
    for path in (tmp_path / "out/shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    metadata = json.load(tar.extractfile(member))
                    cut.setdefault(metadata["prompt"], set()).add(metadata.get("cut_text"))
    assert cut == {"a hill": {None}, LONG: {"at dawn"}}


def test_sampler_warns_of_truncated_text(tiny, tiny_xl, capfd):
    for folder, name in ((tiny, "sd"), (tiny_xl, "sdxl")):
        sampler = PanoramaSampler.from_pretrained(str(folder), name=name, mad_steps=0)
        assert sampler.cut_text(FITS) is None
        assert sampler.cut_text(LONG) == "at dawn"
        assert sampler.cut_text(f"{FITS}  Ünd DAWN") == "Ünd DAWN"
        capfd.readouterr()
        for _ in range(2):
            sampler.sample([LONG], height=32, width=64, num_inference_steps=1, seeds=[0])
        assert capfd.readouterr().err == "madgen: a prompt is too long for the text encoder, which ignores 'at dawn'\n"
