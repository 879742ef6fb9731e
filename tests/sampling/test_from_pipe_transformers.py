"""`PanoramaSampler.from_pipe` and `sampler(...)` with diffusion transformers."""

import numpy as np
import pytest
import torch
from processes import ROOT
from test_diffusers_call import quiet, seeded

from madgen import PanoramaSampler, UserError

FOLDERS = {"flux": ROOT / "tests/parity/golden/dit/tiny-flux-dev", "sd3": ROOT / "tests/parity/golden/dit/tiny-sd3"}
LENGTH = {"flux": 32, "sd3": 24}
PROMPT = "mountains over the sea"


def load(name):
    import diffusers

    return quiet(diffusers.DiffusionPipeline.from_pretrained(FOLDERS[name]))


@pytest.fixture(scope="module", params=list(FOLDERS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return load(family)


@pytest.fixture(scope="module")
def words(family):
    return [f"backbone.max_sequence_length={LENGTH[family]}", "sampling.guidance_scale=3.5"]


def attributes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    return [dict(vars(module)) for module in modules], pipe.tokenizer_2.model_max_length


def test_a_pipeline_samples_as_its_folder_and_stays_as_it_was(family, pipe, words):
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": LENGTH[family]}
    pipe(PROMPT, **call)  # libraries set attributes at the first call
    before = attributes(pipe)
    borrowed = PanoramaSampler.from_pipe(pipe, mad_steps=1, overrides=words)
    loaded = PanoramaSampler.from_pretrained(FOLDERS[family], name=family, mad_steps=1, overrides=words)
    side = loaded.default_size[0]
    size = {"height": side, "width": 2 * side, "num_inference_steps": 2, "output": "latent"}
    made = borrowed.sample([PROMPT], seeds=[1], **size)
    assert torch.equal(made, loaded.sample([PROMPT], seeds=[1], **size))
    assert np.array_equal(borrowed.decode(made), loaded.decode(made))
    assert borrowed.cut_text("sea " * 60) == loaded.cut_text("sea " * 60) != None  # noqa: E711
    assert attributes(pipe) == before


def test_whole_layout_equals_the_pipeline(family, pipe, words):
    sampler = quiet(PanoramaSampler.from_pipe(pipe, layout="whole", mad_steps=0, overrides=words))
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5, "output_type": "np"}
    call = {"max_sequence_length": LENGTH[family], **options}
    reference = pipe(PROMPT, generator=seeded(), **call).images
    assert np.abs(sampler(PROMPT, generator=seeded(), **options).images - reference).max() < 1e-4
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if family == "flux":
        names = ("prompt_embeds", "pooled_prompt_embeds")
    others = {"prompt_2": None} if family == "flux" else {"prompt_2": None, "prompt_3": None}
    encoded = pipe.encode_prompt(PROMPT, **others, max_sequence_length=LENGTH[family])
    embeddings = dict(zip(names, encoded, strict=False))
    assert np.abs(sampler(**embeddings, generator=seeded(), **options).images - reference).max() < 1e-4
    other = {name: tensor + 0.5 for name, tensor in embeddings.items()}
    assert np.abs(sampler(**other, generator=seeded(), **options).images - reference).max() > 1e-4
    with pytest.raises(UserError, match="this backbone needs pooled_prompt_embeds with prompt_embeds"):
        sampler(prompt_embeds=embeddings["prompt_embeds"], **options)


def test_an_offloaded_pipeline_samples_the_same(family, words):
    pipe = load(family)
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = PanoramaSampler.from_pipe(pipe, mad_steps=1, overrides=words)
    loaded = PanoramaSampler.from_pretrained(FOLDERS[family], name=family, mad_steps=1, overrides=words)
    side = loaded.default_size[0]
    size = {"height": side, "width": 2 * side, "num_inference_steps": 2, "output": "latent"}
    for _ in range(2):
        assert torch.equal(offloaded.sample([PROMPT], seeds=[1], **size), loaded.sample([PROMPT], seeds=[1], **size))
