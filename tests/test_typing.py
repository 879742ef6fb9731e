"""`mypy --strict` accepts a script that uses the public API, and finds mistakes in it."""

import subprocess
import sys

import pytest
from processes import ROOT, environment

SCRIPT = """
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from madgen import Job, PanoramaSampler, UserError, load_job

job: Job = load_job("jobs/demo.yaml", overrides=["prompts.limit=3"])
sampler = PanoramaSampler.from_pretrained("demo", mad_steps=8, overrides=["sampling.num_inference_steps=20"])
image = sampler("dunes at night", generator=torch.Generator().manual_seed(7)).images[0]
image.save("dunes.png")
arrays = sampler.sample(["dunes"], height=128, width=768, seeds=[7])
Image.fromarray(arrays[0]).save("again.png")
try:
    mine = PanoramaSampler.from_pipe(StableDiffusionPipeline.from_pretrained("folder"), mad_steps=15)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_script_of_the_public_api_is_typed(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = true\n[mypy-diffusers.*,transformers.*,lightning.*]\nfollow_imports = skip\n",
        encoding="utf-8",
    )

    def check(script):
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
        env = environment() | {"MYPYPATH": str(ROOT)}
        return subprocess.run([*command, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout

    assert "Success: no issues found" in check(SCRIPT)
    wrong = check(SCRIPT.replace("mad_steps=8", 'mad_steps="8"').replace("load_job(", "load_jobs("))
    assert 'Argument "mad_steps" to "from_pretrained" of "PanoramaSampler" has incompatible type "str"' in wrong
    assert (ROOT / "madgen/py.typed").exists()
