"""The documentation's commands, examples, keys and paths. Each page works on a copy of the same small datasets."""

import json
import re
import shlex
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import typer
from documentation import PAGES, blocks, inline_code
from PIL import Image
from processes import ROOT, Forked, Started, begin, environment

from madgen.cli.app import app
from madgen.config.loader import load_job
from madgen.config.schema import Job

ELSEWHERE = {  # commands that cannot run here, and where they run; all of the SLURM guide runs in tests/slurm
    "python3 -m venv": ".ci/run installs the package in a new environment",
    "source .venv": "the tests' own environment is active",
    ".venv/bin/": ".ci/run calls these",
    "apt-get": ".ci/run installs these packages",
    "squeue": "tests/slurm",
    "scancel": "tests/slurm",
    "sbatch": "tests/slurm",
    "madgen paper": "tests/evaluation/test_paper_files.py runs --quick of every file",
    "cp slurm/env.example.sh": "tests/slurm",
}
SMALLER = {  # in a command: as in the job files of `prepared`
    "sampling.width=4096": "sampling.width=256",
    "coherence > 0.8": "coherence > 0.1",
    "num_inference_steps=20": "num_inference_steps=2",
}
SMALL_JOBS = {
    "demo": """
base: {root}/jobs/demo.yaml
sampling: {{width: 256, num_inference_steps: 2}}
prompts: {{limit: 3}}
output: {{samples_per_shard: 1}}
monitor: {{wandb: {{mode: disabled}}}}
""",
    "alps": """
base: demo.yaml
name: alps
prompts: {{source: jobs/prompts/alps.txt, samples_per_prompt: 2}}
output: {{dir: out/alps, samples_per_shard: 4}}
""",
    "md": "{{base: alps.yaml, name: md, method: {{mad: {{steps: 0}}}}, output: {{dir: out/md}}}}",
}


def run(line: str, folder: Path) -> str:
    """Run `madgen ...` or `python FILE ...`; return what it prints."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "madgen":
        return finish(begin(tuple(arguments), folder, environment()), line)
    return run_python(
        f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path({arguments[0]!r}, {{}}, '__main__')", folder
    )


def run_python(code: str, folder: Path) -> str:
    """Run Python code; return what it prints."""
    return finish(Forked((), folder, environment(), code), code)


def finish(process: Started, what: str) -> str:
    status, (out, err) = process.wait(600), process.output()
    assert status == 0, f"{what}\n{out}\n{err}"
    return out


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A folder with the repository's jobs in a small form."""
    folder = tmp_path_factory.mktemp("docs") / "prepared"
    (folder / "jobs").mkdir(parents=True)
    for name in ("configs", "slurm", "docs", "jobs/paper"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "jobs/prompts", folder / "jobs/prompts")
    (folder / "jobs/prompts/alps.txt").write_text(
        "a glacier over a meadow\na hut at dusk\nmountains at noon\n", encoding="utf-8"
    )
    for name, text in SMALL_JOBS.items():
        (folder / f"jobs/{name}.yaml").write_text(text.format(root=ROOT), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(jobs):
    """The same folder, with the datasets that the pages mention."""
    for name in SMALL_JOBS:
        run(f"madgen generate jobs/{name}.yaml", jobs)
    shutil.copytree(jobs / "out/alps", jobs / "out/mad")
    return jobs


@pytest.fixture
def job_folder(jobs, tmp_path):
    return Path(shutil.copytree(jobs, tmp_path / "work", symlinks=True))


@pytest.fixture
def workplace(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "work", symlinks=True))


def examples(page: Path) -> list[tuple[str, str]]:
    """Return the (language, text) of commands and Python examples that run here, in the order of the page."""
    found = [block for block in blocks(page, "bash", "python") if not block.note.startswith("not run: ")]
    texts = [(block.language, text) for block in found for text in block.commands]
    return [] if page.stem == "slurm" else [pair for pair in texts if not pair[1].startswith(tuple(ELSEWHERE))]


def smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def runnable(line: str, folder: Path) -> str:
    """Return the command on small jobs, with a folder as the bucket and without SLURM."""
    key = json.loads((folder / "out/alps/shards/alps-000000.json").read_text(encoding="utf-8"))["samples"][0]["key"]
    line = smaller(line).replace("s3://bucket", (folder / "bucket").as_uri()).replace(" KEY ", f" {key} ")
    command = re.split(r"\s+# ", line)[0]
    if command.startswith("madgen sample"):
        command += "" if re.search("--image|sampling.width", command) else " sampling.width=512"
        command += "" if "inference_steps" in command else " sampling.num_inference_steps=3"
    elif command.startswith("madgen generate configs"):
        command += " prompts.limit=1 sampling.num_inference_steps=2"
    elif command.startswith("madgen submit"):
        command += " --dry-run"  # tests/slurm submits
    elif command.startswith("madgen evaluate") and "--metrics" not in command:
        command += " --metrics clip_score,coherence"
    return command


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_of_a_page_run(page, workplace):
    """In their order, because later ones read what earlier ones write."""
    for language, text in examples(page):
        if language == "python":
            run_python(smaller(text), workplace)
        else:
            run(runnable(text, workplace), workplace)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "yaml")], ids=lambda block: block.page.stem
)
def test_yaml_examples_load(block, job_folder):
    path = job_folder / "jobs/example.yaml"
    path.write_text(block.text, encoding="utf-8")
    assert load_job(path) != Job(name="example")


def test_example_job_plans(job_folder):
    """The job of README and guide is the packaged one, and plans without weights."""
    readme, guide = (next(blocks(ROOT / name, "yaml")).text for name in ("README.md", "docs/jobs.md"))
    comment, _, packaged = (ROOT / "jobs/alps.yaml").read_text(encoding="utf-8").partition("\n")
    assert comment.startswith("#")
    assert readme == guide == packaged
    (job_folder / "jobs/alps.yaml").write_text(readme, encoding="utf-8")
    assert "30 of 512x4096 px" in run("madgen plan jobs/alps.yaml sampling.width=4096 output.dir=out/new", job_folder)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "json")], ids=lambda block: block.page.stem
)
def test_json_examples_are_lines_of_a_prompt_file(block, job_folder):
    (job_folder / "lines.jsonl").write_text(block.text, encoding="utf-8")
    options = "output.dir=out/new prompts.source=lines.jsonl sampling.width=512"
    if '"image"' in block.text:
        options += " sampling.init.strength=0.5 prompts.on_duplicate=rename"
        picture = Image.new("RGB", (512, 128), "white")
        picture.paste("black", (0, 0, 256, 128))
        for name in re.findall(r'"(?:image|mask)": "([^"]+)"', block.text):
            (job_folder / name).parent.mkdir(exist_ok=True)
            picture.save(job_folder / name)
    run(f"madgen plan jobs/demo.yaml {options}", job_folder)


def test_commands_and_options_in_the_docs_exist():
    """Also of commands in the text, and of those that are not run."""
    root = typer.main.get_command(app)
    checked = 0
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.commands] + inline_code(page)
        for line in filter(re.compile(r"madgen [a-z]").match, lines):
            name, *arguments = line.partition("#")[0].split()[1:]
            command = root.commands.get(name)
            assert command is not None, f"{page.name}: {line}"
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            given = {argument.partition("=")[0] for argument in arguments if re.match(r"-{1,2}[a-z]", argument)}
            assert given <= options, f"{page.name}: {line}: {given - options}"
            checked += 1
    assert checked > 50


def keys(group, prefix=""):
    for field in fields(group):
        value = getattr(group, field.name)
        yield prefix + field.name
        yield from keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else ()


def test_job_keys_in_the_docs_exist():
    known = set(keys(Job()))
    sections = "|".join(field.name for field in fields(Job) if is_dataclass(field.default_factory))
    pattern = re.compile(rf"((?:{sections})(?:\.[a-z_]+)+)(?:[=:].*)?$")
    other = {"trainer.predict", "quarantine.jsonl"}
    given = {(page.name, match[1]) for page in PAGES for code in inline_code(page) if (match := pattern.match(code))}
    assert len(given) > 30
    assert {item for item in given if item[1] not in known | other} == set()


def test_paths_in_the_docs_exist():
    """Paths from the root of the repository, and modules by the end of their path."""
    folders = ("madgen", "tests", "benchmarks", "configs", "docs", "jobs", "slurm", "tools", r"\.ci")
    path = re.compile(rf"(?:python |pytest -s )?((?:{'|'.join(folders)})/[\w./-]*)(?: .*)?$")
    module = re.compile(r"[\w/]+\.py$")
    modules = [f"/{file.relative_to(ROOT)}" for name in folders[:3] for file in (ROOT / name).rglob("*.py")]
    absent = {"jobs/paper/NAME.yaml"}
    for page in PAGES:
        for code in inline_code(page):
            if match := path.match(code):
                assert match[1] in absent or (ROOT / match[1]).exists(), f"{page.name}: {code}"
            elif module.match(code):
                assert any(file.endswith(f"/{code}") for file in modules), f"{page.name}: {code}"


def test_links_exist_on_pages_outside_the_site():
    """MkDocs checks the others."""
    for page in (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        assert targets
        assert [target for target in targets if not (page.parent / target).exists()] == []
