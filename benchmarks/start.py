"""Measure the CPU time until the first denoising step: `python benchmarks/start.py`.

Starts `madgen sample` and `madgen generate` on the demo backbone, as they are, and with no library deferred but PyTorch
and garbage collected as usual; and Python that imports PyTorch alone. Each process ends at its first call of the UNet.
Prints the medians of the CPU seconds, and the number of modules that are imported.

`--checkout DIR` measures another version of madgen as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from measured_commands import ROOT, environment

SCRIPT = """
import importlib.machinery, json, os, sys, time

def end(*arguments, **options):
    print(json.dumps([time.process_time(), len(sys.modules)]), file=sys.__stderr__, flush=True)
    os._exit(0)

if sys.argv[1] == "torch":
    import torch
    end()
execute = importlib.machinery.SourceFileLoader.exec_module
def ending_at_the_unet(self, module):
    execute(self, module)
    if module.__name__ == "diffusers.models.unets.unet_2d_condition":
        module.UNet2DConditionModel.forward = end
importlib.machinery.SourceFileLoader.exec_module = ending_at_the_unet
if os.environ.get("START") == "plain":
    from madgen.cli import app
    from madgen.utils.deferred_import import defer_import
    app.defer_libraries, app.collect_rarely = lambda: defer_import("torch"), lambda: None
from madgen.__main__ import main
main()
"""
SETTINGS = ("sampling.num_inference_steps=1", "sampling.width=256")


def commands(checkout: Path, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of the measured commands."""
    prompts, output = f"prompts.source={folder}/prompts.txt", f"output.dir={folder}/out"
    return {
        "sample": ["sample", "a lake at dusk", "--output", f"{folder}/lake.png", *SETTINGS],
        "generate": ["generate", str(checkout / "jobs/demo.yaml"), prompts, output, *SETTINGS],
    }


def start(arguments: list[str], checkout: Path, **variables: str) -> tuple[float, int]:
    """Return the CPU seconds of a process until the first denoising step, and its number of modules."""
    env = environment(PYTHONPATH=str(checkout), **variables)
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
    seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return seconds, modules


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="starts of each kind [default: 5]")
    parser.add_argument("--checkout", type=Path, help="another version of madgen")
    options = parser.parse_args()
    kinds = [("as it is", ROOT, {}), ("only PyTorch deferred, garbage collected as usual", ROOT, {"START": "plain"})]
    if options.checkout:
        kinds.append((options.checkout.name, options.checkout.resolve(), {}))
    results = defaultdict(list)
    for _ in range(options.repeats):
        results["import torch", ""].append(start(["torch"], ROOT))
        for kind, checkout, variables in kinds:
            for command in ("sample", "generate"):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    (folder / "prompts.txt").write_text("a lake at dusk\n", encoding="utf-8")
                    results[command, kind].append(start(commands(checkout, folder)[command], checkout, **variables))
    print("| command | start | CPU, s | modules |\n|---|---|---|---|")
    for (command, kind), starts in results.items():
        seconds, modules = zip(*starts, strict=True)
        print(f"| {command} | {kind} | {statistics.median(seconds):.1f} | {modules[0]:,} |")


if __name__ == "__main__":
    main()
