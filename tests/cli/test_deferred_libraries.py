"""The command line loads libraries when they are used, and PyTorch's compiler then knows what it would have known."""

import subprocess
import sys

import pytest
from forks import WAIT_S

UNUSED = ("torch._dynamo", "torch._inductor", "scipy.stats", "scipy.integrate", "boto3", "trio")


def run(code, *arguments):
    """Run code in an interpreter; return its last line of output."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


COMMAND = f"""
import sys
from madgen.__main__ import main
from madgen.utils.deferred_import import is_loaded

try:
    main()
except SystemExit as end:
    assert end.code in (None, 0)
print([name for name in {(*UNUSED, "torchmetrics", "wandb.sdk.launch")} if is_loaded(name)])
"""
SMALL = ("sampling.num_inference_steps=1", "sampling.width=256", "method.mad.share=1.0")


@pytest.mark.slow
def test_a_panorama_is_sampled_without_unused_libraries(tmp_path):
    assert run(COMMAND, "sample", "a lake", "-o", str(tmp_path / "lake.png"), *SMALL) == "[]"


@pytest.mark.slow
def test_a_dataset_is_generated_without_unused_libraries(tmp_path):
    words = ("prompts.limit=1", f"output.dir={tmp_path}/out", *SMALL)
    assert run(COMMAND, "generate", "jobs/demo.yaml", *words) == "[]"


COMPILER = """
from madgen.cli.deferred_libraries import defer_libraries
from madgen.utils.deferred_import import is_loaded
{defer}
import lightning.fabric.wrappers, torch, torchvision
from diffusers.models.attention import BasicTransformerBlock
from lightning.fabric.wrappers import OptimizedModule
from torchvision.ops.roi_align import is_compile_supported
from transformers.integrations.deepgemm import torch as _

@torch.compiler.disable
def plain(x):
    return x + 1

block = torch.nn.Linear(2, 2)
results = [isinstance(block, OptimizedModule), plain(1), hasattr(block, "path")]
assert is_loaded("torch._dynamo") == {loaded}
compiled = torch.compile(lambda x: plain(x) * 2, backend="eager")
results += [
    compiled(torch.ones(2)).tolist(),
    isinstance(torch.compile(block), OptimizedModule),
    isinstance(block, OptimizedModule),
    id(BasicTransformerBlock) in torch._dynamo.trace_rules._allowed_callable_ids,
    is_compile_supported("cpu"),
    is_compile_supported("meta"),
    torch._dynamo.utils.is_compile_supported("cpu"),
]
assert is_loaded("torch._dynamo")
print(results)
"""


@pytest.mark.slow
def test_the_compiler_knows_what_was_marked_before_it_was_loaded():
    deferred = run(COMPILER.format(defer="defer_libraries()", loaded=False))
    assert deferred == run(COMPILER.format(defer="", loaded=True))
    assert "[4.0, 4.0], True, False, True, True" in deferred


METRICS = """
from madgen.cli.deferred_libraries import defer_libraries
from madgen.utils.deferred_import import is_loaded
defer_libraries()
from lightning.pytorch.core.module import Metric, MetricCollection
assert not is_loaded("torchmetrics")
import torchmetrics
from torchmetrics.classification import BinaryAccuracy
assert not is_loaded("torchmetrics")
accuracy = torchmetrics.MeanMetric()
assert is_loaded("torchmetrics")
print(isinstance(accuracy, Metric), isinstance(BinaryAccuracy(), Metric),
      MetricCollection is torchmetrics.MetricCollection)
"""


@pytest.mark.slow
def test_metrics_of_lightning_are_those_of_torchmetrics():
    assert run(METRICS) == "True True True"
