"""oneDNN products on a CPU equal PyTorch, and are used where they are faster."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from madgen import PanoramaSampler
from madgen.diffusion.attention import JointStep, Merging
from madgen.diffusion.kernels import onednn
from madgen.diffusion.views import Axis, Views

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN, and madgen does without"
)
RUN = {"height": 128, "width": 320, "num_inference_steps": 2, "guidance_scale": 3.0, "output": "latent"}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


@pytest.fixture(autouse=True)
def threads():
    """As many as its attention is for, and of which all results here are then."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def processor(monkeypatch):
    """Another one than this."""

    def be(maker="AuthenticAMD", capability="AVX512"):
        monkeypatch.setattr(onednn, "_vendor", lambda: maker)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        onednn.is_faster.cache_clear()

    yield be
    onednn.is_faster.cache_clear()


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (300, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_pytorch(shape, bias):
    numbers, weight, bias = random(*shape), random(40, 24), random(40) if bias else None
    torch.testing.assert_close(onednn.linear(numbers, weight, bias), F.linear(numbers, weight, bias))
    strided = random(*shape[:-1], 48)[..., ::2]
    torch.testing.assert_close(onednn.linear(strided, weight, bias), F.linear(strided, weight, bias))


@pytest.mark.parametrize(("queries", "keys"), [(1, 256), (100, 300), (90, 257)])
@pytest.mark.parametrize(("scores", "rows"), [(2**19, 64), (2**15, 64), (1, 64), (2**15, 1), (1, 1)])
def test_attention_equals_pytorch(queries, keys, scores, rows, monkeypatch):
    """Whether a head's queries are one part, some parts with a rest, or parts of one."""
    monkeypatch.setattr(onednn, "SCORES", scores)
    monkeypatch.setattr(onednn, "MIN_ROWS", rows)
    query = random(2, queries, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2)
    key, value = (random(2, keys, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2) for _ in range(2))
    ours = onednn.attention(query, key, value + 1, 0.3)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value + 1, scale=0.3))


def test_attention_does_not_overflow():
    query = key = 100 * random(1, 1, 300, 16)
    ours = onednn.attention(query, key, random(1, 1, 300, 16), 1.0)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, random(1, 1, 300, 16), scale=1.0))


def test_supports_float32_on_a_cpu_without_gradients_only():
    numbers = random(4, 4)
    assert onednn.takes(numbers, numbers)
    assert not onednn.takes(numbers, numbers.bfloat16())
    assert not onednn.takes(numbers.to("meta"))
    wanted = random(4, 4).requires_grad_()
    assert not onednn.takes(numbers, wanted)
    with torch.no_grad():
        assert onednn.takes(numbers, wanted)


def test_attention_is_used_within_the_measured_keys_and_threads(processor, threads):
    def attends(keys):
        key = torch.zeros(1, 1, 1, 4).expand(1, 1, keys, 4)
        return onednn.attends(key, key, key)

    assert [attends(keys) for keys in (77, 511, 512, 2**16, 2**16 + 1)] == [False, False, True, True, False]
    processor()
    assert onednn.is_faster_in_attention()
    threads(3)
    assert onednn.is_faster()
    assert not onednn.is_faster_in_attention()


def test_is_used_on_processors_where_mkl_is_slower(processor):
    processor()
    assert onednn.is_faster()
    processor(maker="GenuineIntel")
    assert not onednn.is_faster()
    processor(maker=None)
    assert not onednn.is_faster()
    processor(capability="AVX2")
    assert not onednn.is_faster()


@pytest.mark.parametrize("broken", [AttributeError, RuntimeError, TypeError, None])
def test_missing_changed_or_wrong_operation_falls_back(processor, broken, monkeypatch):
    def operation(numbers, weight, bias):
        if broken and bias is None:
            raise broken("not so")
        return torch.zeros(*numbers.shape[:-1], len(weight)) if not broken else F.linear(numbers, weight, bias)

    processor()
    monkeypatch.setattr(onednn, "_linear", operation)
    assert not onednn.is_faster()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_self_test_does_not_depend_on_global_settings(processor, dtype):
    processor()
    torch.set_default_dtype(dtype)
    try:
        assert onednn.is_faster()
    finally:
        torch.set_default_dtype(torch.float32)


def test_processor_is_unknown_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **options: (_ for _ in ()).throw(FileNotFoundError(self)))
    assert onednn._vendor() is None


def counting(function, name, counts):
    def call(*given):
        counts[name] += 1
        return function(*given)

    return call


@pytest.fixture
def used(monkeypatch):
    """How often each of the two is called."""
    counts = dict.fromkeys(("_linear", "_attention"), 0)
    for name in counts:
        monkeypatch.setattr(onednn, name, counting(getattr(onednn, name), name, counts))
    return counts


@pytest.mark.parametrize(("maker", "calls"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_panoramas_use_it_where_it_is_faster(processor, used, maker, calls):
    processor(maker)
    sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=1)
    layers = [layer for layer in sampler.backbone.unet.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) > 50
    assert all(("forward" in vars(layer)) == calls for layer in layers)
    for name in used:
        used[name] = 0
    layers[0](random(1, layers[0].in_features))
    assert used["_linear"] == calls
    sampler.sample(["a hill"], seeds=[1], **RUN)
    assert (used["_attention"] > 0) == calls


@pytest.mark.slow
def test_panoramas_are_equal_with_and_without(processor):
    made = []
    for maker in ("AuthenticAMD", "GenuineIntel"):
        processor(maker)
        sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=1)
        made.append(sampler.sample(["a hill"], seeds=[1], **RUN))
    assert 0 < float((made[0] - made[1]).norm() / made[1].norm()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("joint", [True, False])
def test_gradients_equal_pytorch(processor, joint, one_block):
    """Within joint attention, and by the network's own, as SyncDiffusion takes them."""
    gradients = []
    for maker in ("AuthenticAMD", "GenuineIntel"):
        processor(maker)
        backbone = PanoramaSampler.from_pretrained(str(one_block), dtype="float32", mad_steps=0).backbone
        conditioning = backbone.encode_prompts(["a hill"], [""], 3.0)
        views = random(1, 1, 4, 32, 32).requires_grad_()
        single = Views(Axis(32, 32, (0,)), Axis(32, 32, (0,)))
        merging = Merging(1, ("down", "mid", "up"), "scheduled")
        together = JointStep(single, 0, merging) if joint else None
        backbone.predict_noise(views, torch.tensor(500), conditioning, together).square().sum().backward()
        gradients.append(views.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_use_it(processor, one_block):
    """With views of 24x24 latent cells, that is, 576 keys."""
    import torch._dynamo

    processor()
    torch._dynamo.reset()
    sampler = PanoramaSampler.from_pretrained(str(one_block), dtype="float32", mad_steps=1, view_size=24)
    run = {**RUN, "height": 96, "width": 192}
    plain = sampler.sample(["a hill"], seeds=[1], **run)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    sampler.backbone.compile(backend)
    compiled = sampler.sample(["a hill"], seeds=[1], **run)
    torch._dynamo.reset()
    assert {"madgen.linear.default", "madgen.attention.default"} <= set(seen)
    assert float((compiled - plain).norm() / plain.norm()) <= 1e-5
