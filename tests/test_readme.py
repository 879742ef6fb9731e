"""The README's promises, run: its job, its commands, its Python."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, Forked, begin, environment

README = (ROOT / "README.md").read_text()


def run(command: list[str], cwd: Path, timeout: float = 600):
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def madgen(line: str, cwd: Path):
    """As a fork: the one command that starts from nothing is the demo job's."""
    process = begin(tuple(shlex.split(line)), cwd, environment())
    code = process.wait(600)
    return subprocess.CompletedProcess(line, code, *process.said())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the checkout's jobs and configs, where the README's demo job has been run."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "jobs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    command = re.search(r"<!-- command: run -->\s*```bash\n(.*?)```", README, re.DOTALL).group(1)
    started = time.monotonic()
    arguments = shlex.split(command.split(".venv/bin/madgen ")[1])
    result = run([sys.executable, "-m", "madgen", *arguments], folder)
    assert result.returncode == 0, result.stderr
    print(f"the demo job took {time.monotonic() - started:.0f} s")
    return folder


def test_the_demo_job_makes_24_panoramas_as_planned(workplace):
    result = madgen("verify out/demo", workplace)
    assert (result.returncode, result.stdout) == (0, "24 of 24 panoramas present: as planned\n")


def test_the_pictures_are_landscapes_not_noise(workplace):
    """Sky above ground: the rows' colours change far more down the picture than along it."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    for path in sorted((workplace / "out/demo/shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    image = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))).astype(float)
                    assert image.shape == (128, 768, 3)
                    rows = np.median(image, axis=1)
                    along = np.abs(np.diff(image, axis=1)).mean()
                    assert rows.std(axis=0).mean() > 4 * along, member.name


def test_the_commands_on_a_dataset(workplace):
    commands = re.findall(r"^    madgen (\w+ +/scratch/alps[^#\n]*)", README, re.MULTILINE)
    commands = [line for line in commands if not line.startswith("study")]  # which takes two datasets
    assert [line.split()[0] for line in commands] == ["status", "verify", "preview", "index", "filter", "push"]
    for line in commands:
        place = (workplace / "copy").as_uri()
        result = madgen(line.replace("/scratch/alps", "out/demo").replace("s3://bucket/alps", place), workplace)
        assert result.returncode == 0, result.stderr
    assert len(list((workplace / "out/demo-best/shards").glob("*.tar"))) >= 1
    made, copied = ({path.name for path in (workplace / of / "shards").iterdir()} for of in ("out/demo", "copy"))
    assert made == copied != set()
    for line in re.findall(r"`madgen (verify DIR --repair|regenerate DIR KEY -o F)`", README):
        key = json.loads((workplace / "out/demo/shards/demo-000000.json").read_text())["samples"][0]["key"]
        result = madgen(line.replace("DIR", "out/demo").replace("KEY", key).replace(" F", " again.png"), workplace)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (workplace / "again.png").exists()
    assert (workplace / "out/demo/preview.html").stat().st_size > 100_000
    assert (workplace / "out/demo/preview.png").exists()


def test_the_example_job_loads_and_plans(workplace, tmp_path):
    yaml = re.search(r"```yaml\n(# jobs/alps.yaml.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "jobs/prompts").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "jobs/alps.yaml").write_text(yaml)
    (tmp_path / "jobs/prompts/alps.txt").write_text("a glacier\na hut at dusk\n")
    result = madgen("plan jobs/alps.yaml sampling.width=4096", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "20 of 512x4096 px" in result.stdout


def test_the_sample_commands(workplace):
    commands = re.findall(r"^    madgen (sample .*)$", README, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        result = madgen(line, workplace)
        assert result.returncode == 0, result.stderr
    pictures = [(workplace / name).read_bytes() for name in ("mad.png", "multidiffusion.png", "region.png")]
    assert len(set(pictures)) == 3


def test_the_python_examples(workplace):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        process = Forked((), workplace, environment(), example)
        assert process.wait(600) == 0, process.said()
    assert len(list((workplace / "out/from-python/shards").glob("*.tar"))) == 1


def test_the_other_configs_of_the_demo_run(workplace):
    """Law 7: methods and trainers on the demo backbone."""
    for method in sorted(path.stem for path in (ROOT / "configs/method").glob("*.yaml")):
        job = f"configs/backbone/demo.yaml configs/method/{method}.yaml configs/trainer/cpu.yaml"
        options = "prompts.source=jobs/prompts/demo.txt prompts.limit=1 sampling.num_inference_steps=2 "
        options += "sampling.width=256 method.sync.network=random"  # VGG16's trained weights may be out of reach
        result = madgen(f"generate {job} {options} output.dir=out/{method}", workplace)
        assert result.returncode == 0, result.stderr
