"""Commands that load no weights import none of the libraries that take seconds to import."""

import os
import shutil
import subprocess
import sys

import pytest
from forks import WAIT_S

from madgen.utils.resources import resource

HEAVY = ("transformers", "diffusers", "lightning", "pandas", "datasets", "torchvision", "scipy", "wandb")
RUN = """
import sys

class Refuse:
    def find_spec(self, name, path, target=None):
        if name in {heavy} or name.startswith("torch."):
            raise AssertionError(f"imports {{name}}")

sys.meta_path.insert(0, Refuse())
sys.argv = ["madgen", *{arguments}]
from madgen.__main__ import main
main()
"""


def run(*arguments):
    """Run the command line in an interpreter that refuses to import heavy libraries; torch is a deferred import."""
    code = RUN.format(heavy=HEAVY, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A dataset directory with nothing but its manifest: what `status` shows before the first panorama."""
    from madgen.config.loader import load_job
    from madgen.dataset import manifest
    from madgen.planning.resolved_run import ResolvedRun

    directory = tmp_path_factory.mktemp("startup") / "demo"
    run = ResolvedRun.of(load_job(["jobs/demo.yaml"], [f"output.dir={directory}"])).on("cpu")
    manifest.create(run.directory, run.manifest)
    run.directory.make_in_work(run.directory.plans)
    run.plan.save(run.directory.plans)
    return directory


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--help"], "generate"),
        (["generate", "--help"], "Examples"),
        (["plan", "jobs/demo.yaml"], "24 prompts"),
        (["plan", "jobs/demo.yaml", "sampling.scheduler=null", "method.mad.blocks=[mid]"], "24 prompts"),
        (["plan", "jobs/demo.yaml", "prompts.shuffle=true"], "24 prompts"),
        (["config", "jobs/demo.yaml"], "backbone:"),
        (["submit", "jobs/demo.yaml", "--dry-run"], "#SBATCH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_starts_without_heavy_libraries(arguments, shows):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout


def test_init_and_status_start_without_heavy_libraries(tmp_path, dataset):
    done = run("init", str(tmp_path / "new.yaml"))
    assert done.returncode == 0, done.stderr
    done = run("status", str(dataset))
    assert done.returncode == 0, done.stderr
    assert "0 of 24" in done.stdout


@pytest.mark.parametrize("place", [0, 24])
def test_plan_of_a_growing_dataset_starts_without_heavy_libraries(tmp_path, dataset, place):
    """With new prompts before and behind the old ones."""
    directory = shutil.copytree(dataset, tmp_path / "demo")
    lines = resource("jobs").joinpath("prompts/demo.txt").read_text(encoding="utf-8").splitlines()
    lines.insert(place, "a new prompt")
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    words = [f"output.dir={directory}", f"prompts.source={tmp_path}/p.txt", "output.resume=extend"]
    done = run("plan", "jobs/demo.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "adds 1 panorama, as generation 2" in done.stdout


def test_describing_a_backbone_does_not_load_torch():
    """`plan` needs the shapes, layers and schedulers of every family."""
    code = "\n".join(
        (
            "import pkgutil, sys",
            "from madgen.utils.deferred_import import defer_import",
            "defer_import('torch')",
            "import madgen.backbones as b",
            "names = [m.name for m in pkgutil.iter_modules(b.__path__) if m.name[0] != '_' and not m.ispkg]",
            "[b.backbone_module(name) for name in names]",
            "assert 'sd' in names and 'flux' in names",
            f"print([name for name in {(*HEAVY, 'torch._C')} if name in sys.modules])",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("generate", "jobs/demo.yaml", "output.dir={folder}/out"), ("sample", "a hill", "-o", "{folder}/hill.png")],
)
def test_models_are_announced_on_a_terminal(arguments, tmp_path):
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "madgen", *(argument.format(folder=tmp_path) for argument in arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=end)
    try:
        os.close(end)
        with open(terminal, encoding="utf-8") as lines:
            assert next(lines).startswith("loading demo from ")
    finally:
        process.kill()
        process.wait()
