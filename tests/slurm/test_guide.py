"""The commands of the SLURM guide."""

import json
import re

import pytest
from documentation import blocks
from processes import ROOT, environment
from slurm_cluster import Cluster

pytestmark = pytest.mark.slurm
GUIDE = ROOT / "docs/slurm.md"
SCORES = "--metrics clip_score"
SMALL = "prompts.limit=2 sampling.num_inference_steps=2 sampling.width=256 monitor.wandb.mode=disabled "


def test_commands_of_the_slurm_guide_run(cluster, conf, tmp_path):
    """In their order; jobs with GPUs are only tested with `sbatch --test-only`."""
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/prompts").symlink_to(ROOT / "jobs/prompts")
    demo = (ROOT / "jobs/demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "jobs/demo.yaml").write_text(demo, encoding="utf-8")
    (tmp_path / "jobs/alps.yaml").write_text("base: demo.yaml\noutput: {dir: out/alps}\n", encoding="utf-8")
    here = Cluster(conf, tmp_path)
    here.env = environment(**{**here.env, "SLURM_CONF": conf})
    lines = [line for block in blocks(GUIDE, "bash") if not block.note for line in block.commands]
    assert len(lines) > 12
    job, verified = "", False
    for line in lines:
        if "--gpus-per-node" in line:
            script = line.partition(" > ")[0]
            if line.startswith("madgen"):
                shown = here.run("bash", "-c", f"{script} --dry-run".replace("--dry-run --dry-run", "--dry-run"))
                (tmp_path / "rendered.sbatch").write_text(shown.stdout, encoding="utf-8")
                script = "sbatch rendered.sbatch"
            here.run("bash", "-c", script.replace("sbatch ", "sbatch --test-only ", 1))
            if "evaluate.sbatch" in line:
                evaluation = line.replace("--gpus-per-node 1 ", "--parsable ").replace("out/alps", f"out/demo {SCORES}")
                number = here.run("bash", "-c", evaluation).stdout.strip()
                here.until_ended(number)
                said = (tmp_path / f"madgen-evaluate-{number}.log").read_text(encoding="utf-8")
                assert here.state(number)["JobState"] == "COMPLETED", said
                assert json.loads((tmp_path / "out/demo/report/report.json").read_text(encoding="utf-8"))["metrics"][
                    "clip_score"
                ]
        elif line.startswith("madgen submit"):
            said = here.run(
                "bash", "-c", line.replace("demo.yaml ", f"demo.yaml {SMALL} trainer.accelerator=cpu ")
            ).stderr
            job = re.findall(r"submitted job (\d+)", said)[0]
            here.ids.append(job)
        else:
            verified = verified or line.startswith("madgen verify")
            if line.startswith("madgen status"):
                here.until_ended(job)
            line = line.replace("generate jobs/alps.yaml ", f"generate jobs/alps.yaml {SMALL} trainer.accelerator=cpu ")
            here.run("bash", "-c", line.replace("1234", job))
    assert verified
    here.until_ended()
    assert here.state(job)["JobState"] == "COMPLETED"
