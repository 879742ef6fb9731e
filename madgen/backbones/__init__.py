"""Pretrained diffusion models. The file name is the registry key: `backbones/sd.py` is `backbone.name: sd`.

A backbone is one module with the functions of `BackboneModule`, of which `load` returns a `Backbone`, or with a class
`BACKBONE` that has them. Modules whose names begin with `_` hold code shared by several backbones. diffusers and
transformers are imported here, in `madgen.models` and in `madgen.demo` only.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack, cast

import torch

from madgen.diffusion.attention import JointStep, Merging
from madgen.hub.adapters import IpAdapterFiles
from madgen.hub.model_size import Parameters
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Guidance = Literal["cfg", "embedded", "none"]


@dataclass(frozen=True)
class BackboneSpec:
    """The shapes of a backbone, read from its config files."""

    channels: int
    """Channels of the latents."""
    factor: int
    """Pixels per latent cell, in each direction."""
    view_size: int
    """Size of a view in latent cells: the size that the network was trained at."""
    coarsest: int
    """Latent cells per cell of the network's lowest resolution: views that are merged start at multiples of it."""
    guidance: Guidance = "cfg"
    """`cfg`: classifier-free guidance, a second pass with the negative prompt. `embedded`: guidance is an input of the
    network (consistency models, FLUX.1 [dev]). `none`: the network was distilled without guidance."""
    patch: int = 1
    """Latent cells per token, in each direction: views and canvases consist of whole tokens."""
    joint_attention: bool = False
    """Prompt and image share the attention layers (transformers): there is no separate cross-attention, and
    `method.mad.positions` applies."""
    max_side: int | None = None
    """Largest side of a canvas, in latent cells, for which the network has positions; None: no limit."""
    unguided_scale: float = 1.0
    """Guidance scale up to which classifier-free guidance is off: 1, or 0 where the scale is 0 without guidance."""
    noise_patch: int = 1
    """Side of the patches of latent cells whose initial noise is drawn as channels, as in diffusers' pipeline."""

    def is_guided(self, guidance_scale: float) -> bool:
        """Return whether guidance needs a second pass, with the negative prompt."""
        return self.guidance == "cfg" and guidance_scale > self.unguided_scale

    def check_guidance(self, guidance_scale: float, negative_prompts: Sequence[str]) -> None:
        """Raise UserError for a guidance scale, or a negative prompt, without effect."""
        if self.guidance == "none" and guidance_scale > 1:
            raise UserError(
                f"guidance_scale={guidance_scale} has no effect: the backbone was distilled without guidance; set it "
                "to 0"
            )
        if any(negative_prompts) and not self.is_guided(guidance_scale):
            reasons = {"embedded": "the backbone embeds its guidance", "none": "the backbone takes no guidance"}
            reason = reasons.get(self.guidance, f"guidance_scale={guidance_scale} is <= {self.unguided_scale:g}")
            raise UserError(f"a negative prompt has no effect: {reason}; leave negative_prompt empty")


@dataclass(frozen=True)
class ModelSize:
    """What a backbone keeps in GPU memory: parameters of its models, and numbers that are alive in a pass."""

    network: Parameters
    vae: Parameters
    text_encoders: tuple[Parameters, ...]
    per_cell: float
    """Activations per latent cell of all views of a pass of the network, at its peak."""
    per_pixel: float
    """Activations per pixel that is decoded, at the decoder's peak."""
    per_token: float = 0.0
    """Activations per token of the prompt, for each view of a pass."""
    text_tokens: int = 0
    """Tokens of a prompt."""
    upcasts_vae: bool = False
    """The VAE runs in float32 in place of float16."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adaptation that is fused into a backbone's weights when it is loaded."""

    weights: str
    """A `.safetensors` file, a folder that holds one, or a hub id."""
    scale: float = 1.0


class SchedulerSettings(Protocol):
    """The keys of `sampling` of the job that a scheduler is created with; `SamplingParams` has them."""

    @property
    def scheduler(self) -> str | None:
        """Name of a diffusers class; None: the checkpoint's own."""

    @property
    def scheduler_options(self) -> Mapping[str, Any]:
        """Keys of the scheduler's config to replace."""

    @property
    def num_inference_steps(self) -> int: ...

    @property
    def original_inference_steps(self) -> int | None: ...


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts in place of texts, by the names of diffusers; None: the texts are encoded."""

    prompt_embeds: Tensor | None = None
    """[B, T, D], as `negative_prompt_embeds`."""
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    """[B, P], as `negative_pooled_prompt_embeds`; of backbones with pooled embeddings."""
    negative_pooled_prompt_embeds: Tensor | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


TEXTS_ONLY = PromptEmbeddings()


class Conditioning(Protocol):
    """The encoded prompts of a batch."""

    def regrouped(self, view_ids: Sequence[Hashable]) -> Conditioning:
        """Return the same prompts for steps in which fewer of them share views; `view_ids`: see `encode_prompts`."""

    def unguided(self) -> Conditioning:
        """Return the same prompts without guidance."""


class Backbone(Protocol):
    """Everything that madgen calls on a loaded model."""

    spec: BackboneSpec
    device: torch.device
    dtype: torch.dtype
    """Precision of the denoising network."""

    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        view_ids: Sequence[Hashable] | None = None,
        embeddings: PromptEmbeddings = TEXTS_ONLY,
    ) -> Any:
        """Encode the prompts of a batch once, for all views and steps; returns a `Conditioning`.

        Prompts with equal `view_ids` are denoised on the same views and may share computation. None: all differ.
        `embeddings` replace texts; a backbone that does not support them has no such argument.
        """

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, and negative prompts, for coming batches, and forget earlier ones.

        A backbone may do nothing. What it keeps must not change the embeddings.
        """

    def cut_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that a text encoder truncates, None if the prompt fits."""

    def merged_layers(self, merging: Merging) -> AbstractSet[str]:
        """Return the attention layers that `merging.blocks` selects; UserError if an entry selects none."""

    def predict_noise(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Any,
        joint: JointStep | None = None,
        chunk_views: int | None = None,
    ) -> Tensor:
        """Predict the noise of views, guidance applied, float32 [B, V, C, h, w].

        `joint`: the V views are all views of this canvas, and attention merges as it says; None: each view on its own.
        `chunk_views` bounds the memory: one prompt at a time, and at most that many views where attention merges none.
        Gradients flow unless the caller disables them.
        """

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode pixels in 0..1 to latents, float32 [B, C, H / factor, W / factor]."""

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Decode latents to pixels in 0..1, float32 [B, 3, H * factor, W * factor].

        `wrap`: for a loop, the number of cells that each end sees of the other one. `tiled` bounds the memory by
        decoding tile by tile. Gradients flow unless the caller disables them.
        """

    def new_scheduler(self, settings: SchedulerSettings, view_cells: int | None = None) -> Any:
        """Return a new diffusers scheduler with its timesteps set.

        `view_cells`: latent cells of a view, for timesteps that depend on the image size; None: of a view of
        `spec.view_size`. Raises UserError for settings with which it cannot sample.
        """

    def compile(self) -> None:
        """Denoise and decode in compiled graphs from now on; each is compiled when a size first occurs."""

    def in_float32(self) -> AbstractContextManager[None]:
        """Compute in float32 within this context; afterwards restore precision and weights exactly."""

    def release_memory(self) -> bool:
        """Free performance caches; return False if there are none."""

    def disable_cuda_graphs(self) -> None:
        """Free CUDA graphs and use none from now on."""


class Checkpoint(TypedDict, total=False):
    """Arguments of `BackboneModule.load` beside `pretrained`; the keys are those of `backbone` in the job."""

    revision: str | None
    variant: str | None
    config: str | None
    loras: Sequence[Lora]
    prediction_type: str | None
    """Replaces the one in the scheduler's config."""
    dtype: torch.dtype
    """Default: float32."""
    device: str | torch.device
    """Default: the CPU."""
    offload: str
    """`none`, `text_encoders` or `model`, see `backbone.offload` of the job. Default: `none`."""
    max_sequence_length: int | None
    """Tokens of the prompt that the text encoder reads, where it is a choice; None: the pipeline's default."""
    quantization: str | None
    """`nf4`, `int8` or `fp8` weights of the network; None: weights in `dtype`."""
    controlnet: str | None
    """Weights of a ControlNet: a folder, a Hub id or a `.safetensors` file; None: none."""
    ip_adapter: IpAdapterFiles | None
    """Location of an IP-Adapter; None: none."""


class ControlledBackbone(Backbone, Protocol):
    """A backbone that may have a ControlNet and an IP-Adapter."""

    controlnet: Any
    """The ControlNet, which needs control pictures; None: none."""

    def controlled(
        self,
        conditioning: Any,
        canvases_P3HW: Tensor,
        panoramas: Sequence[int],
        scale: float,
        steps: Container[int],
    ) -> Any:
        """Return the encoded prompts with control pictures.

        `canvases_P3HW`: one picture for each panorama in 0..1, as large as the canvas; `panoramas`: the panorama of
        each encoded prompt; `scale` and `steps`: how strongly, and in which denoising steps, the pictures act.
        """

    style_adapter: Any
    """The IP-Adapter, which needs style pictures; None: none."""

    def styled(self, conditioning: Any, pictures: Sequence[Any], panoramas: Sequence[int], scale: float) -> Any:
        """Return the encoded prompts with style pictures (PIL), one for each panorama; see `controlled`."""


class BackboneModule(Protocol):
    """The functions of a module in `madgen/backbones/`, or of its `BACKBONE`.

    All but `load` and `download` serve planning: they read config files only and load no weights.
    """

    def load(self, pretrained: str, **checkpoint: Unpack[Checkpoint]) -> Backbone:
        """Load the weights; UserError if they cannot be loaded."""

    def download(self, files: ModelFiles) -> list[Path]:
        """Download the files that `load` reads; return their folders in the hub cache, none for local files."""

    def describe(self, files: ModelFiles) -> BackboneSpec:
        """Read the shapes from the config files; UserError for a model that `load` cannot load."""

    def family_spec(self, pretrained: str) -> BackboneSpec:
        """Return the shapes that most checkpoints of this family share, for planning without config files."""

    def check_blocks(self, blocks: Sequence[str], files: ModelFiles) -> None:
        """Raise UserError for an entry of `method.mad.blocks` that selects no attention layer."""

    def text_limit(self, files: ModelFiles, max_sequence_length: int | None = None) -> TextLimit | None:
        """Return how many tokens of a prompt are used; None if the tokenizer's files are not available locally.

        Raises UserError for a `max_sequence_length` that the text encoder does not support.
        """

    def scheduler_class(self, name: str) -> Any:
        """Return a diffusers scheduler class by its name; UserError if it is unknown."""

    def own_scheduler(self, files: ModelFiles, prediction_type: str | None = None) -> dict[str, Any] | None:
        """Read the config of the checkpoint's own scheduler; None if it is not available."""

    def evaluated_steps(self, own: dict[str, Any] | None, settings: SchedulerSettings) -> list[int]:
        """Return the denoising step of each evaluation of the network; `own` as `own_scheduler` returns it."""


class SizedModule(BackboneModule, Protocol):
    """A module that states what its models keep in memory; others are planned without their GPU memory."""

    def size(self, files: ModelFiles, max_sequence_length: int | None) -> ModelSize:
        """Return what the models keep in memory, from config files and from the headers of weights.

        Models that are not on this machine count as those that the family shares.
        """


def backbone_names() -> list[str]:
    """Return the values of `backbone.name`: the public modules of this package."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_" and not module.ispkg
    )


def backbone_module(name: str) -> BackboneModule:
    """Import `madgen.backbones.<name>`; UserError lists the known names."""
    known = backbone_names()
    if name not in known:
        raise UserError(f"backbone.name must be one of {', '.join(known)}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(BackboneModule, getattr(module, "BACKBONE", module))


def backbones_by_pipeline() -> dict[str, Any]:
    """Return the backbone of each class of diffusers pipelines that is supported, also of those with a ControlNet."""
    backbones: list[Any] = [backbone_module(name) for name in backbone_names()]
    return {
        pipeline: backbone
        for backbone in backbones
        if hasattr(backbone, "pipelines")
        for pipeline in (*backbone.pipelines, *backbone.controlled_pipelines)
    }


@contextmanager
def quiet_model_libraries(level: int = logging.ERROR) -> Iterator[None]:
    """Let diffusers and transformers report only messages of `level` within this context.

    Their warnings, of classes of text encoders and of prompts that are truncated, say less than madgen's checks.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(max(level, library.get_verbosity()))
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def silence_model_libraries() -> None:
    """Make diffusers and transformers report errors only, without progress bars."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import, which warns of its own use
