"""Law 7: every shipped YAML loads and plans, and every method runs on the demo backbone."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from madgen.config.loader import load_job

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))  # for jobs/paper see tests/evaluation


@pytest.mark.parametrize("path", [*CONFIGS, *JOBS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_yaml_loads_and_plans(path, madgen, tmp_path):
    (tmp_path / "prompts.txt").write_text("a hill\na lake\n", encoding="utf-8")
    prompts = load_job(path).prompts.source if path in JOBS else "prompts.txt"
    overrides = [f"prompts.source={prompts}"]
    if path.stem == "upscale":  # of a panorama of the demo
        overrides = [f"prompts.source=dataset://{one_panorama(tmp_path / 'demo.tar')}"]
    if path.parent.name in ("method", "trainer"):
        overrides += ["sampling.height=128", "sampling.width=768"]
    result = madgen("plan", path, *overrides, "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["samples"] == ({"alps": 100, "demo": 24, "template": 6, "upscale": 1}[path.stem] if path in JOBS else 2)
    assert plan["view_evaluations"] > 0
    assert not (tmp_path / "out").exists()


def one_panorama(path):
    """Write a WebDataset with one panorama in the size of the demo."""
    Image.new("RGB", (768, 128)).save(path.with_name("a.png"))
    path.with_name("a.txt").write_text("a hill", encoding="utf-8")
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(path.with_name(name), name)
    return path


METHODS = sorted((ROOT / "configs/method").glob("*.yaml"))
QUICK = ("direct", "mad", "safa")


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        *(
            pytest.param("demo", path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
            for path in METHODS
        ),
        pytest.param("demo-dit", ROOT / "configs/method/mad.yaml", id="demo-dit"),
    ],
)
def test_every_method_generates_on_the_demo_backbone(backbone, method, madgen, tmp_path):
    (tmp_path / "prompts.txt").write_text("a hill\n", encoding="utf-8")
    files = [ROOT / f"configs/backbone/{backbone}.yaml", method, ROOT / "configs/trainer/cpu.yaml"]
    small = ["sampling.num_inference_steps=2", "sampling.width=256", "monitor.wandb.mode=disabled"]
    network = "method.sync.network=random"  # trained VGG16 weights may not be available
    result = madgen("generate", *files, "prompts.source=prompts.txt", *small, network, "output.dir=out")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out/shards").glob("*.tar"))) == 1


def test_presets_have_the_settings_of_the_paper():
    job = load_job([ROOT / "configs/backbone/sd2.yaml", ROOT / "configs/method/mad.yaml"])
    assert (job.sampling.height, job.sampling.width, job.sampling.num_inference_steps) == (512, 3072, 50)
    assert (job.sampling.guidance_scale, job.method.mad.steps, job.sampling.scheduler) == (7.5, 15, "DDIMScheduler")
    assert job.method.mad.blocks == ("all",)
    xl = load_job([ROOT / "configs/backbone/sdxl.yaml", ROOT / "configs/method/mad.yaml"])
    assert (xl.sampling.height, xl.sampling.width, xl.method.views.stride, xl.method.mad.steps) == (1024, 4096, 16, 15)
    direct = load_job([ROOT / "configs/backbone/sdxl.yaml", ROOT / "configs/method/direct.yaml"])
    assert (direct.method.views.layout, direct.method.views.stride) == ("whole", None)
    lcm = load_job([ROOT / "configs/backbone/lcm-dreamshaper.yaml"])
    assert (lcm.sampling.num_inference_steps, lcm.method.mad.steps) == (4, 2)
