"""Shared by all backbones that wrap a diffusers pipeline: loading, prompts, chunks of views, decoding, schedulers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import torch

from madgen.backbones import (
    TEXTS_ONLY,
    Backbone,
    BackboneSpec,
    Checkpoint,
    PromptEmbeddings,
    SchedulerSettings,
    _schedulers,
    _vae,
    quiet_model_libraries,
)
from madgen.backbones._conditioning import Conditioning, Embedded, SharedNegatives, stack
from madgen.backbones._family import Family
from madgen.backbones._loading import check_quantization, load_pipeline, quantization_config
from madgen.backbones._lora import fuse_loras
from madgen.backbones.acceleration.compilation import check_compiler, compiled, replaced_forward
from madgen.backbones.acceleration.cuda_graphs import Graphs
from madgen.diffusion.attention import JointStep, Merging
from madgen.diffusion.guidance import classifier_free
from madgen.hub import tokenizers
from madgen.hub.weights import ModelFiles, single_file
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class PipelineBackbone(Family, Backbone):
    """Network, VAE, text encoders and tokenizers of one checkpoint; see `madgen.backbones.Backbone`."""

    controlled_pipelines: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers pipelines with a ControlNet, of which a loaded one can be used."""
    text_encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Names of the text encoders that every checkpoint has."""
    text_width_key: ClassVar[str]
    """Key of the width of embeddings of prompts, in the network's config."""
    pools = False
    """The network takes a pooled embedding of the prompt."""
    pads = False
    """Embeddings of the prompts of a pass may differ in length."""
    borrowed = False
    """The models belong to a pipeline of the caller; see `_loaded_pipeline`."""
    is_quantized = False
    """Weights of the network are quantized, and cannot be converted to float32."""
    controlnet: Any = None
    """The ControlNet, of backbones that support them."""
    style_adapter: Any = None
    """The IP-Adapter, of backbones that support them."""
    upcasts_vae = False
    """Decode in float32, with weights that are converted meanwhile."""
    graphs: Graphs | None = None
    """CUDA graphs of passes over few views; None: kernels are launched one by one."""
    tokenizers: tuple[Any, ...]
    """Tokenizers that limit the prompt."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.loaded_dtype = dtype
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.models: list[torch.nn.Module] = []
        self.network = self._frozen(getattr(pipeline, self.part))
        self.vae = self._frozen(pipeline.vae)
        self.attention: dict[str, Any] = {}
        """Attention layers that can merge, by name."""
        self.compiled: Any = None
        """The compiled network; see `compile`."""
        self._compiled_decoder: Any = None

    def _frozen(self, model: Any, stays: bool = False) -> Any:
        """Move a model to the device unless it `stays`, weights contiguous.

        Channels last is 1.18 times slower (H200, bfloat16).
        """
        self.models.append(model)
        if self.borrowed:
            return model.eval()
        return (model if stays else model.to(self.device)).eval().requires_grad_(False)

    # Loading

    @classmethod
    def loading_options(cls, files: ModelFiles) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` of the pipeline."""
        return {}

    @classmethod
    def load(cls, pretrained: str, **checkpoint: Unpack[Checkpoint]) -> Self:
        """Load a diffusers folder, a Hub id or a single file; safetensors only, nothing is unpickled."""
        further = cls.arguments(checkpoint.get("max_sequence_length"), checkpoint.get("offload", "none"))
        files = ModelFiles(pretrained, checkpoint.get("revision"), checkpoint.get("config"), checkpoint.get("variant"))
        dtype, device = checkpoint.get("dtype", torch.float32), torch.device(checkpoint.get("device", "cpu"))
        options = cls.loading_options(files)
        if (kind := checkpoint.get("quantization")) is not None:
            cls.check_quantization(kind, pretrained)
            options["quantization_config"] = quantization_config(kind, cls.part, dtype)
        spec, own = cls.describe(files), cls.own_scheduler(files, checkpoint.get("prediction_type"))
        scheduler = None
        if own is not None:  # diffusers' pipelines replace some keys of its config
            scheduler = _schedulers.build_scheduler(cls.scheduler_class(own.get("_class_name", "")), own, {})
        with quiet_model_libraries():
            pipeline = load_pipeline(files, dtype, cls.single_file_parts, **options)
            fuse_loras(pipeline, checkpoint.get("loras", ()))
        if scheduler is not None:
            pipeline.scheduler = scheduler
        backbone = cls(pipeline, spec, dtype, device, **further)
        backbone.is_quantized = kind is not None
        return backbone

    @classmethod
    def check_quantization(cls, kind: str, pretrained: str) -> None:
        """Raise UserError if the weights cannot be quantized."""
        if single_file(pretrained) is not None:
            raise UserError(
                f"backbone.quantization={kind} is not supported for the single file {pretrained}; use a diffusers "
                "folder or a Hub id, or set it to null"
            )
        check_quantization(kind)

    @classmethod
    def check_pipeline(cls, pipeline: Any) -> None:
        """Raise UserError if a loaded pipeline lacks a part, or has one that is not supported."""
        for part in cls.text_encoder_parts:
            if getattr(pipeline, part) is None:
                raise UserError(f"pipe: {type(pipeline).__name__} has no {part}; load it with all its parts")

    @classmethod
    def adopt(cls, pipeline: Any, max_sequence_length: int | None = None) -> Self:
        """Build the backbone of a loaded pipeline; see `madgen.backbones._loaded_pipeline`."""
        further = cls.arguments(max_sequence_length, "none")
        cls.check_pipeline(pipeline)
        network = getattr(pipeline, cls.part)
        spec = cls.spec_of(pipeline.config, network.config, pipeline.vae.config)
        device = torch.device(pipeline._execution_device)
        device = torch.device("cpu") if device.type == "cpu" else device  # CPUs have no index
        backbone = cls.__new__(cls)
        backbone.borrowed = True
        backbone.__init__(pipeline, spec, network.dtype, device, **further)  # type: ignore[misc]
        return backbone

    # Prompts

    @abstractmethod
    def embed_paths(self, texts: Sequence[str], negative: bool) -> list[Embedded]:
        """Encode prompts, or negative prompts, in the network's precision."""

    def embedded_guidance(self, scales_B: Tensor) -> Tensor:
        """Return the guidance as an input of the network, [B] or [B, D]."""
        return scales_B.to(self.device)

    def keys_values(self, hidden_NTD: Tensor) -> dict[str, Any]:
        """Project the prompts to keys and values where that can be done once for all steps."""
        return {}

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Combine predictions [B, V, C, h, w] by classifier-free guidance."""
        return classifier_free(unconditional, conditional, scale)

    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        view_ids: Sequence[Hashable] | None = None,
        embeddings: PromptEmbeddings = TEXTS_ONLY,
    ) -> Conditioning:
        """Encode each prompt, and each negative prompt if guidance needs a second pass.

        Prompts with equal `view_ids` and negative prompts share the unconditional pass.
        """
        with torch.no_grad():
            embedded, negatives, shared = None, 0, None
            given = self._given(embeddings.prompt_embeds, embeddings.pooled_prompt_embeds, "prompt_embeds")
            paths = self.embed_paths(prompts, negative=False) if given is None else [given]
            if self.spec.guidance == "embedded":
                embedded = self.embedded_guidance(torch.full((len(prompts),), guidance_scale, dtype=torch.float32))
            elif self.spec.is_guided(guidance_scale):
                pooled_ND = embeddings.negative_pooled_prompt_embeds
                given = self._given(embeddings.negative_prompt_embeds, pooled_ND, "negative_prompt_embeds")
                keys: Sequence[Hashable] = negative_prompts if given is None else range(len(prompts))
                shared = SharedNegatives(view_ids or range(len(prompts)), keys, self.device)
                distinct = [negative_prompts[first] for first in shared.firsts]
                negatives = len(distinct)
                paths = [*(self.embed_paths(distinct, negative=True) if given is None else [given]), *paths]
            hidden, pooled, lengths = stack(paths, self.pads)
            return Conditioning(
                hidden,
                guidance_scale,
                embedded,
                pooled,
                self.keys_values(hidden),
                negatives,
                shared or None,
                lengths=lengths,
                guide=self.guide,
            )

    def _given(self, hidden_NTD: Tensor | None, pooled_ND: Tensor | None, name: str) -> Embedded | None:
        """Return embeddings that replace texts, the argument `name` of the call. Raises UserError for other shapes."""
        if hidden_NTD is None:
            return None
        if hidden_NTD.shape[-1] != (width := self.network.config[self.text_width_key]):
            raise UserError(f"{name} must be of width {width} for this backbone, got {tuple(hidden_NTD.shape)}")
        if self.pools != (pooled_ND is not None):
            pooled = name.replace("prompt", "pooled_prompt")
            raise UserError(
                f"this backbone needs {pooled} with {name}" if self.pools else f"this backbone takes no {pooled}"
            )
        pooled_ND = None if pooled_ND is None else pooled_ND.to(self.device, self.dtype)
        return Embedded(hidden_NTD.to(self.device, self.dtype), pooled_ND)

    def cut_text(self, prompt: str) -> str | None:
        return tokenizers.cut_texts(self.tokenizers, [prompt])[0]

    # Denoising

    def merged_layers(self, merging: Merging) -> frozenset[str]:
        return self.selected(list(self.attention), merging.blocks)

    def merged_at(self, joint: JointStep) -> frozenset[str]:
        """Return the names of the layers that merge at a step; merging one view changes nothing."""
        if joint.views.count == 1:
            return frozenset()
        layers = self.merged_layers(joint.merging)
        return frozenset(name for name in layers if joint.merging.applies(joint.step, self.crosses(name)))

    @staticmethod
    def crosses(layer: str) -> bool:
        """Return whether a layer attends to the prompt alone."""
        return False

    def run_paths(
        self,
        run: Callable[..., Tensor],
        views_NVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None,
        size: int | None,
    ) -> Tensor:
        """Call `run` once with the views of all paths, or, given a `size`, path after path with `size` views at a time.

        Where attention merges the views of a path, they stay together. The graph of a gradient holds one call, the
        others run again.
        """
        if size is None:
            return run(views_NVChw, timestep, conditioning, joint)
        if joint is not None and self.merged_at(joint):
            size = views_NVChw.shape[1]
        elif joint is None and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            run = partial(checkpoint, run, use_reentrant=False)
        paths = []
        for path, views in enumerate(views_NVChw.split(1)):
            one = conditioning.select(slice(path, path + 1))
            chunks = [
                run(chunk, timestep, one, joint and replace(joint, first=first))
                for first, chunk in zip(range(0, views.shape[1], size), views.split(size, dim=1), strict=True)
            ]
            paths.append(torch.cat(chunks, dim=1))
        return torch.cat(paths)

    def compile(self, backend: str = "inductor") -> None:
        """Denoise and decode in compiled graphs, one for each shape and set of merged layers.

        Shapes are static, so a panorama's graph, and with it the last bit, does not depend on what was sampled before.
        Raises UserError if PyTorch cannot compile on this machine.
        """
        check_compiler(backend, self.device)
        self.compiled = compiled(self.network, backend)
        if not _vae.is_video(self.vae.config):  # caches of frames cannot be compiled to one graph
            self._compiled_decoder = compiled(self.vae.decoder.forward, backend)

    def runs_compiled(self) -> bool:
        """Return whether compiled graphs apply: not to gradients, nor to temporary float32."""
        return self.compiled is not None and not torch.is_grad_enabled() and self.dtype == self.loaded_dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        before = self.dtype
        self.release_memory()  # graphs hold addresses of the current weights
        with weights_in_float32(self.models):
            try:
                self.dtype = torch.float32
                yield
            finally:
                self.dtype = before

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Do nothing: small text encoders run for each batch."""

    def release_memory(self) -> bool:
        """Free the CUDA graphs; return False if there are none."""
        return self.graphs is not None and self.graphs.clear()

    def disable_cuda_graphs(self) -> None:
        """Free CUDA graphs and launch kernels one by one from now on."""
        self.release_memory()
        self.graphs = None

    # Pixels and schedulers

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Decode to pixels in 0..1, float32; `tiled`: in tiles of two views' side. See `_vae.decode`."""
        tile = 2 * self.spec.view_size if tiled else None
        upcast = weights_in_float32([self.vae]) if self.upcasts_vae else nullcontext()
        with upcast, replaced_forward(self.vae.decoder, self._compiled_decoder if self.runs_compiled() else None):
            return _vae.decode(self.vae, self.spec.factor, latents_BCHW, wrap, tile)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        with weights_in_float32([self.vae]) if self.upcasts_vae else nullcontext():
            return _vae.encode(self.vae, pixels_B3HW)

    def new_scheduler(self, settings: SchedulerSettings, view_cells: int | None = None) -> Any:
        """Create the checkpoint's own scheduler, or the diffusers class that `settings` name from its config."""
        tokens = (view_cells or self.spec.view_size**2) // self.spec.patch**2
        return _schedulers.new_scheduler(self.scheduler, settings, self.device, tokens, self.flow)


@contextmanager
def weights_in_float32(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Convert weights of lower precision to float32 within this context, and restore them exactly.

    float32 represents every bfloat16 and float16 number, so the round trip changes none.
    """
    changed = [
        (tensor, tensor.dtype)
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    try:
        for tensor, _ in changed:
            _convert(tensor, torch.float32)
        yield
    finally:
        for tensor, dtype in changed:
            _convert(tensor, dtype)


def _convert(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        tensor.data = tensor.data.to(dtype)
