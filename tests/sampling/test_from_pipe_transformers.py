"""`PanoramaSampler.from_pipe` and `sampler(...)` with diffusion transformers."""

import numpy as np
import pytest
import torch
from test_diffusers_call import quiet, seeded
from tiny_transformers import FAMILIES, folder_of

from madgen import PanoramaSampler, UserError

LENGTH = {"flux": 32, "sd3": 24, "flux2": 24, "z_image": 24, "qwen_image": 24}
PROMPT = "mountains over the sea"


def load(name):
    import diffusers

    return quiet(diffusers.DiffusionPipeline.from_pretrained(folder_of(name)))


@pytest.fixture(scope="module", params=FAMILIES)
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
    tokenizer = getattr(pipe, "tokenizer_2", pipe.tokenizer)
    return [dict(vars(module)) for module in modules], tokenizer.model_max_length


VIEWS = ["method.views.size=16", "method.views.stride=8"]
SIZE = {"height": 32, "width": 64, "num_inference_steps": 2}


def call(pipe, family, **options):
    """Call a pipeline with the names of its own arguments."""
    if family == "qwen_image":
        options = {**options, "true_cfg_scale": options.pop("guidance_scale"), "negative_prompt": ""}
    return pipe(prompt=PROMPT, max_sequence_length=LENGTH[family], **options).images


def test_a_pipeline_samples_as_its_folder_and_stays_as_it_was(family, pipe, words):
    call(pipe, family, height=32, width=32, num_inference_steps=1, guidance_scale=2.0)  # sets attributes
    before = attributes(pipe)
    borrowed = PanoramaSampler.from_pipe(pipe, mad_steps=1, overrides=[*words, *VIEWS])
    loaded = PanoramaSampler.from_pretrained(folder_of(family), name=family, mad_steps=1, overrides=[*words, *VIEWS])
    made = borrowed.sample([PROMPT], seeds=[1], output="latent", **SIZE)
    assert torch.equal(made, loaded.sample([PROMPT], seeds=[1], output="latent", **SIZE))
    assert np.array_equal(borrowed.decode(made), loaded.decode(made))
    assert borrowed.cut_text("sea " * 60) == loaded.cut_text("sea " * 60) != None  # noqa: E711
    assert attributes(pipe) == before


def encoded(pipe, family):
    """Return the embeddings of `PROMPT`, and of an empty negative prompt, by their names in the call."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    length = LENGTH[family]
    if family == "flux":
        result = pipe.encode_prompt(PROMPT, None, max_sequence_length=length)
        return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), result, strict=False))
    if family == "sd3":
        return dict(zip(names, pipe.encode_prompt(PROMPT, None, None, max_sequence_length=length), strict=True))
    if family == "z_image":
        lists = pipe.encode_prompt(PROMPT, max_sequence_length=length)
        return {name: torch.stack(each) for name, each in zip(names, lists, strict=False)}
    results = (pipe.encode_prompt(text, max_sequence_length=length)[0] for text in (PROMPT, ""))
    return dict(zip(names, results, strict=False))


def test_whole_layout_equals_the_pipeline(family, pipe, words):
    sampler = quiet(PanoramaSampler.from_pipe(pipe, layout="whole", mad_steps=0, overrides=words))
    options = {**SIZE, "guidance_scale": 3.5, "output_type": "np"}
    reference = call(pipe, family, generator=seeded(), **options)
    assert np.abs(sampler(PROMPT, generator=seeded(), **options).images - reference).max() < 1e-4
    embeddings = encoded(pipe, family)
    assert np.abs(sampler(**embeddings, generator=seeded(), **options).images - reference).max() < 1e-4
    # More than an offset, which a normalization of the prompt may remove.
    other = {name: tensor + 0.5 * tensor.flip(-1) + 0.5 for name, tensor in embeddings.items()}
    assert np.abs(sampler(**other, generator=seeded(), **options).images - reference).max() > 1e-4
    pools = "pooled_prompt_embeds" in embeddings
    given = {"prompt_embeds": embeddings["prompt_embeds"]}
    given |= {} if pools else {"pooled_prompt_embeds": torch.zeros(1, 4)}
    message = "needs pooled_prompt_embeds with prompt_embeds" if pools else "takes no pooled_prompt_embeds"
    with pytest.raises(UserError, match=f"this backbone {message}"):
        sampler(**given, **options)
    with pytest.raises(UserError, match=r"prompt_embeds must be of width \d+ for this backbone, got \(1, 8, 5\)"):
        sampler(prompt_embeds=torch.zeros(1, 8, 5), **options)


def test_an_offloaded_pipeline_samples_the_same(family, words):
    pipe = load(family)
    pipe.enable_model_cpu_offload(device="cpu")
    options = {"mad_steps": 1, "overrides": [*words, *VIEWS]}
    offloaded = PanoramaSampler.from_pipe(pipe, **options)
    loaded = PanoramaSampler.from_pretrained(folder_of(family), name=family, **options)
    run = {**SIZE, "seeds": [1], "output": "latent"}
    for _ in range(2):
        assert torch.equal(offloaded.sample([PROMPT], **run), loaded.sample([PROMPT], **run))
