"""Products on a CPU: oneDNN's are PyTorch's own, and are used where and when they should."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from madgen import PanoramaSampler, onednn

RUN = {"height": 128, "width": 192, "num_inference_steps": 2, "guidance_scale": 3.0, "output": "latent"}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


@pytest.fixture
def processor(monkeypatch):
    """Another one than this."""

    def be(maker="AuthenticAMD", capability="AVX512"):
        monkeypatch.setattr(onednn, "_maker", lambda: maker)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        onednn.is_faster.cache_clear()

    yield be
    onednn.is_faster.cache_clear()


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (300, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_pytorchs(shape, bias):
    numbers, weight, bias = random(*shape), random(40, 24), random(40) if bias else None
    torch.testing.assert_close(onednn.linear(numbers, weight, bias), F.linear(numbers, weight, bias))
    strided = random(*shape[:-1], 48)[..., ::2]
    torch.testing.assert_close(onednn.linear(strided, weight, bias), F.linear(strided, weight, bias))


@pytest.mark.parametrize(("queries", "keys"), [(1, 256), (300, 300), (900, 257)])
@pytest.mark.parametrize("scores", [2**19, 600, 1])
def test_attention_is_pytorchs(queries, keys, scores, monkeypatch):
    """Whether a head's queries are one part, some parts with a rest, or parts of one."""
    monkeypatch.setattr(onednn, "SCORES", scores)
    query = random(2, queries, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2)
    key, value = (random(2, keys, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2) for _ in range(2))
    ours = onednn.attention(query, key, value + 1, 0.3)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value + 1, scale=0.3))


def test_attention_does_not_overflow():
    query = key = 100 * random(1, 1, 300, 16)
    ours = onednn.attention(query, key, random(1, 1, 300, 16), 1.0)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, random(1, 1, 300, 16), scale=1.0))


def test_it_takes_float32_on_a_cpu_without_gradients():
    numbers = random(4, 4)
    assert onednn.takes(numbers, numbers)
    assert not onednn.takes(numbers, numbers.bfloat16())
    assert not onednn.takes(numbers.to("meta"))
    wanted = random(4, 4).requires_grad_()
    assert not onednn.takes(numbers, wanted)
    with torch.no_grad():
        assert onednn.takes(numbers, wanted)


def test_it_is_for_processors_on_which_mkl_is_slower(processor):
    processor()
    assert onednn.is_faster()
    processor(maker="GenuineIntel")
    assert not onednn.is_faster()
    processor(maker=None)
    assert not onednn.is_faster()
    processor(capability="AVX2")
    assert not onednn.is_faster()


@pytest.mark.parametrize("broken", [AttributeError, RuntimeError, TypeError, None])
def test_an_operation_that_is_gone_changed_or_wrong_is_done_without(processor, broken, monkeypatch):
    def operation(numbers, *_):
        if broken:
            raise broken("not so")
        return numbers @ torch.zeros(32, 64)

    processor()
    monkeypatch.setattr(onednn, "_linear", operation)
    assert not onednn.is_faster()


def test_where_there_is_no_proc_the_maker_is_unknown(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError(self)))
    assert onednn._maker() is None


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
def test_panoramas_are_made_by_it_where_it_is_faster(processor, used, maker, calls):
    processor(maker)
    sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=1)
    for name in used:
        used[name] = 0
    sampler.sample(["a hill"], seeds=[1], **RUN)
    assert [count > 0 for count in used.values()] == [calls, calls]


def test_panoramas_are_the_same_by_it(processor):
    made = []
    for maker in ("AuthenticAMD", "GenuineIntel"):
        processor(maker)
        sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=1)
        made.append(sampler.sample(["a hill"], seeds=[1], **RUN))
    assert 0 < float((made[0] - made[1]).norm() / made[1].norm()) <= 1e-5


def test_gradients_flow_by_pytorch(processor, used):
    processor()
    backbone = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=0).backbone
    conditioning = backbone.encode_prompts(["a hill"], [""], 3.0)
    used["_linear"] = 0
    views = random(1, 1, 4, 16, 16).requires_grad_()
    backbone.predict_noise(views, torch.tensor(500), conditioning).sum().backward()
    assert views.grad.abs().sum() > 0
    assert used["_attention"] == 0


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_have_it_too(processor):
    import torch._dynamo

    processor()
    torch._dynamo.reset()
    sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=1)
    plain = sampler.sample(["a hill"], seeds=[1], **RUN)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    sampler.backbone.compile(backend)
    compiled = sampler.sample(["a hill"], seeds=[1], **RUN)
    torch._dynamo.reset()
    assert {"madgen.linear.default", "madgen.attention.default"} <= set(seen)
    assert float((compiled - plain).norm() / plain.norm()) <= 1e-5
