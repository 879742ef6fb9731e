"""CUDA graph captures: foreign reads, compilation before a capture, and the calls of `CudaCapture` in order."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from recorder import RUN, Recorder, with_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from madgen import PanoramaSampler
from madgen.backbones.acceleration import cuda_graphs as _graphs
from madgen.backbones.acceleration.cuda_graphs import CudaCapture, Graphs, mapped, tensors
from madgen.types import Box, Region


@pytest.fixture
def cuda(monkeypatch):
    """What `CudaCapture` asks of `torch.cuda`, in order; `trouble`: a capture ends with it."""
    asked, trouble = [], []

    @contextmanager
    def graph(made, pool, stream, capture_error_mode):
        asked.append(("capture", pool, _graphs.CAPTURING.locked()))
        yield
        if trouble:
            raise trouble.pop()

    handles = iter("abc")
    pretended = {
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: "the current one",
        "Stream": lambda: "its own",
        "graph_pool_handle": lambda: next(handles),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: asked.append("replay")),
        "graph": graph,
        "synchronize": lambda: asked.append(("synchronize", _graphs.CAPTURING.locked())),
        "empty_cache": lambda: asked.append(("empty_cache", _graphs.CAPTURING.locked())),
    }
    for name, pretence in pretended.items():
        monkeypatch.setattr(torch.cuda, name, pretence)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked.append("workspaces"), raising=False)
    return asked, trouble


def test_captures_share_a_pool_until_it_is_freed(cuda):
    """Without a GPU: the order of things, and that no two threads capture, or wait for the device, at once."""
    asked, trouble = cuda
    capture = CudaCapture(torch.device("cuda"))
    replay, output = capture(lambda: torch.ones(1))
    replay()
    trouble.append(RuntimeError("no room"))
    with pytest.raises(RuntimeError, match="no room"):
        capture(lambda: torch.ones(1))
    assert not _graphs.CAPTURING.locked()
    capture.forget()
    capture(lambda: torch.ones(1))
    given_back = [("synchronize", True), "workspaces", ("empty_cache", True)]
    assert asked == [("capture", "a", True), "replay", ("capture", "a", True), *given_back, ("capture", "b", True)]
    assert output.tolist() == [1]


class Reads(TorchDispatchMode):
    """Operations that read memory which was neither `known` before nor made by an earlier one."""

    def __init__(self, known):
        super().__init__()
        self.known, self.kept, self.foreign = {storage(tensor) for tensor in known}, [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if any(storage(tensor) not in self.known for tensor in read):
            self.foreign.append(str(operation))
        made = operation(*args, **kwargs or {})
        self.kept.append(made)  # so that its memory is not another tensor's later
        self.known |= {storage(tensor) for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)}
        return made


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Watching(Recorder):
    """Looks at what a pass reads while it is captured."""

    def __init__(self, monkeypatch, weights=()):
        super().__init__()
        self.weights, self.own, self.reads = list(weights), [], []
        monkeypatch.setattr(_graphs, "mapped", self.copied)

    def copied(self, inputs, function):
        self.own = list(tensors(copy := mapped(inputs, function)))
        return copy

    def __call__(self, run):
        self.reads.append(Reads([*self.weights, *self.own]))
        with self.reads[-1]:
            run()
        return super().__call__(run)


@pytest.mark.parametrize("family", ["tiny", "tiny_xl"])
def test_captured_pass_reads_only_its_copies_weights_and_own_tensors(request, monkeypatch, family):
    """Anything else may have moved, or be another panorama's, when it is launched again."""
    name, folder = "sdxl" if "xl" in family else "sd", str(request.getfixturevalue(family))
    mad = PanoramaSampler.from_pretrained(folder, name=name, dtype="bfloat16", mad_steps=4, region_bootstrapping=2)
    unet = mad.backbone.unet
    watching = Watching(monkeypatch, [*unet.parameters(), *unet.buffers()])
    regions = [[Region(Box(0, 0, 20, 32), "a lake")], []]
    options = {**RUN, "num_inference_steps": 10, "width": 64, "seeds": [1, 2], "guidance_steps": (0, 7)}
    with_graphs(mad, watching).sample(["a hill", "the sea"], regions=regions, **options)
    assert len(watching.reads) == len(mad.backbone.graphs) == 4
    assert [reads.foreign for reads in watching.reads] == [[]] * 4
    assert all(len(reads.kept) > 100 for reads in watching.reads)


def test_reads_of_other_memory_are_detected(monkeypatch):
    watching, elsewhere, given = Watching(monkeypatch), torch.ones(2), (torch.ones(2),)
    graphs = Graphs(watching)
    for _ in range(2):
        graphs(lambda inputs: inputs[0] + inputs[0] * elsewhere, "plus", given)
    assert [reads.foreign for reads in watching.reads] == [["aten.mul.Tensor"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_kernels_are_not_compiled_during_a_capture(tiny):
    """PyTorch refuses to: all that a pass needs is compiled when it is first met."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    class Counting(Recorder):
        compiled = 0

        def __call__(self, run):
            before = counters["stats"]["unique_graphs"]
            made = super().__call__(run)
            self.compiled += counters["stats"]["unique_graphs"] - before
            return made

    torch._dynamo.reset()
    counters.clear()
    mad, counting = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=3), Counting()
    options = {"width": 64, **RUN}
    expected = [mad.sample(["a hill"], seeds=[seed], **options) for seed in (1, 2)]
    mad.backbone.compile("eager")
    with_graphs(mad, counting)
    for seed, plain in enumerate(expected, 1):
        made = mad.sample(["a hill"], seeds=[seed], **options)
        assert float((made - plain).norm() / plain.norm()) <= 1e-4
    assert counters["stats"]["unique_graphs"] >= 2
    assert counting.captured == len(mad.backbone.graphs) == 2
    assert counting.compiled == 0
    torch._dynamo.reset()
