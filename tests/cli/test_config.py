"""`madgen config` and `madgen init`."""

import yaml

from madgen.config.loader import load_job


def test_config_prints_a_job_file_of_the_same_job(madgen, tmp_path):
    result = madgen("config", "demo", "fast", "sampling.width=1024", "prompts.negative_prompt='a: b'")
    assert result.code == 0, result.err
    (tmp_path / "copy.yaml").write_text(result.out, encoding="utf-8")
    original = load_job(["demo", "fast"], ["sampling.width=1024", "prompts.negative_prompt='a: b'"])
    assert load_job(tmp_path / "copy.yaml").as_dict() == original.as_dict()


def test_config_names_the_origin_of_each_value(madgen):
    lines = [line.strip() for line in madgen("config", "demo", "fast", "sampling.width=1024").out.splitlines()]
    assert "width: 1024  # command line" in lines
    assert "height: 128  # configs/backbone/demo.yaml" in lines
    assert "steps: 20  # configs/method/fast.yaml" in lines
    assert "name: demo  # jobs/demo.yaml" in lines
    assert "dtype: auto  # default" in lines


def test_init_writes_a_job_that_plans(madgen, tmp_path):
    result = madgen("init", "alps.yaml")
    assert result.code == 0, result.err
    assert "#" in (tmp_path / "alps.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "alps.yaml").read_text(encoding="utf-8"))["prompts"]["source"] == "alps.txt"
    planned = madgen("plan", "alps.yaml")
    assert planned.code == 0, planned.err
    assert planned.out.startswith("alps: 3 prompts, 6 panoramas in 2 shards")


def test_init_never_overwrites(madgen, tmp_path):
    (tmp_path / "a.txt").write_text("mine", encoding="utf-8")
    result = madgen("init", "a.yaml")
    assert (result.code, result.err) == (2, "madgen: a.txt exists already; choose another name\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "a.yaml").exists()
    assert madgen("init", "a.json").code == 2
    assert madgen("init", "missing/a.yaml").code == 2
