"""Shared by diffusion transformers: joint attention of prompt and image, velocity prediction and offloading.

Where attention merges in all layers, with positions of the canvas, MAD equals the transformer on the canvas: everything
outside attention works token by token. Such a step runs the canvas once, as a single view.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from madgen.backbones import BackboneSpec, Guidance, ModelSize, _vae
from madgen.backbones._backbone import TEXT_ENCODERS, PipelineBackbone
from madgen.backbones._blocks import select_layers, transformer_groups
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._tokens import canvas_of
from madgen.diffusion.attention import JointStep, Merging, grids_of
from madgen.diffusion.merge import split
from madgen.diffusion.token_attention import TokenAttention, TokenContext, TokenPass
from madgen.diffusion.views import Views
from madgen.hub import tokenizers
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VIEW_SIZE = 128
"""Latent cells of 1024 px, for transformers whose config does not name the size that they were trained at."""


def has_part(pretrained: str, index: Mapping[str, Any], part: str) -> bool:
    """Return whether a checkpoint has an optional part, such as a text encoder: in its index and in its folder."""
    folder = Path(pretrained)
    return bool((index.get(part) or [None])[0]) and (not folder.is_dir() or (folder / part).is_dir())


def transformer_spec(
    channels: int,
    view_size: int,
    guidance: Guidance,
    vae: Mapping[str, Any] | None = None,
    max_side: int | None = None,
    unguided_scale: float = 1.0,
    noise_patch: int = 1,
) -> BackboneSpec:
    """Return the shapes of a transformer with tokens of 2x2 latent cells; `vae` None: cells of 8x8 pixels."""
    factor = 8 if vae is None else _vae.factor_of(vae)
    return BackboneSpec(channels, factor, view_size, 2, guidance, 2, True, max_side, unguided_scale, noise_patch)


def stream_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the attention layers of double stream blocks, then those of single stream ones."""
    return [
        *(f"transformer_blocks.{i}.attn" for i in range(config["num_layers"])),
        *(f"single_transformer_blocks.{i}.attn" for i in range(config["num_single_layers"])),
    ]


class TransformerBackbone(PipelineBackbone):
    """A transformer that denoises by flow matching.

    Subclasses list the attention layers, embed prompts, run the transformer and place its tokens.
    """

    part = "transformer"
    flow: ClassVar[FlowSchedule | None] = FlowSchedule()
    sequence_length: ClassVar[int]
    """Tokens of the prompt that the text encoder reads by default, as in diffusers' pipeline."""
    max_length: ClassVar[int] = 512
    """Largest `backbone.max_sequence_length`."""
    limiting_part: ClassVar[str] = "tokenizer"
    """Name of the tokenizer that limits the prompt."""
    template_tokens: ClassVar[int] = 0
    """Tokens of `max_sequence_length` that a template puts before the prompt."""
    text_first = True
    """In layers with one stream the tokens of the prompt precede those of the image."""
    completes_single_files = True
    runs_canvas_once = True
    """Run steps in which all layers merge as one view."""
    widths_alive: ClassVar[float]
    """Activations of a token at the peak of a pass, in units of the transformer's width; measured."""

    def __init__(
        self,
        pipeline: Any,
        spec: BackboneSpec,
        dtype: torch.dtype,
        device: torch.device,
        max_sequence_length: int,
        offload: str = "none",
    ):
        self.offload, self.max_sequence_length = offload, max_sequence_length
        super().__init__(pipeline, spec, dtype, device)
        self.transformer = self.network
        encoders = [getattr(pipeline, name, None) for name in TEXT_ENCODERS]
        self.text_encoders = [
            self._frozen(encoder, stays=offload == "text_encoders") for encoder in encoders if encoder is not None
        ]
        self._kept: dict[str, Embedded] = {}
        """Embeddings of prompts of coming batches, on the CPU."""
        if offload == "model" and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        self.tokenizers = self.limiting_tokenizers()
        self.context = TokenContext()
        self.attention = self._wrapped_attention()

    def _frozen(self, model: Any, stays: bool = False) -> Any:
        return super()._frozen(model, stays or self.offload == "model")

    @classmethod
    def check_blocks(
        cls, blocks: Sequence[str], pretrained: str, revision: str | None = None, config: str | None = None
    ) -> None:
        """Raise UserError for an entry that selects no attention layer, from the config files alone."""
        layers = cls.layer_names(cls.configs(pretrained, revision, config)[1])
        select_layers(layers, transformer_groups(layers), blocks)

    @classmethod
    def text_limit(
        cls,
        pretrained: str,
        revision: str | None = None,
        config: str | None = None,
        max_sequence_length: int | None = None,
    ) -> TextLimit | None:
        """Return how many tokens of a prompt are used; None if the tokenizer's files are not available locally."""
        length = cls.arguments(max_sequence_length, "none")["max_sequence_length"]
        tokens = max(0, length - cls.template_tokens)
        return tokenizers.chosen_limit(cls.limiting_part, tokens, pretrained, revision, config)

    @classmethod
    def size(cls, files: ModelFiles, variant: str | None, max_sequence_length: int | None) -> ModelSize:
        """Return what the models keep in memory, with as many tokens of the prompt as the text encoder may read."""
        return replace(
            super().size(files, variant, max_sequence_length), text_tokens=max_sequence_length or cls.sequence_length
        )

    @classmethod
    def activations(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
        """Return the activations per latent cell and per token of the prompt."""
        return cls.activations_of_width(network["num_attention_heads"] * network["attention_head_dim"])

    @classmethod
    def activations_of_width(cls, width: int) -> dict[str, Any]:
        """Return the activations of a transformer with tokens of 2x2 latent cells."""
        return {"per_cell": cls.widths_alive * width / 4, "per_token": cls.widths_alive * width}

    @classmethod
    def arguments(cls, max_sequence_length: int | None, offload: str) -> dict[str, Any]:
        """Return the arguments of the constructor. Raises UserError for a length that the family does not support."""
        if max_sequence_length is not None and not cls.template_tokens < max_sequence_length <= cls.max_length:
            raise UserError(
                f"backbone.max_sequence_length={max_sequence_length} must be in {cls.template_tokens + 1}.."
                f"{cls.max_length} tokens for this backbone; null is {cls.sequence_length}"
            )
        length = cls.sequence_length if max_sequence_length is None else max_sequence_length
        return {"max_sequence_length": length, "offload": offload}

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode each distinct prompt once, and keep the embeddings on the CPU until the next call."""
        with torch.no_grad():
            kept, distinct = self._kept, list(dict.fromkeys(prompts))
            self._kept = {text: kept[text] for text in distinct if text in kept}
            encoded = self._encode_texts([text for text in distinct if text not in kept])
            self._kept |= {text: embedded.to(torch.device("cpu")) for text, embedded in encoded.items()}

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Embedded]:
        """Encode texts; offloaded text encoders are on the device only meanwhile."""
        moves = self.offload == "text_encoders" and bool(texts)
        try:
            for encoder in self.text_encoders if moves else ():
                encoder.to(self.device)
            return {text: self.embed(text) for text in texts}
        finally:
            for encoder in self.text_encoders if moves else ():
                encoder.to("cpu")

    def embed_paths(self, texts: Sequence[str], negative: bool) -> list[Embedded]:
        """Return the embedding of each text: of those that are kept, others are encoded, one by one.

        So embeddings do not depend on the batch.
        """
        kept = self._kept if self.dtype == self.loaded_dtype else {}  # a temporary float32 encodes again
        encoded = self._encode_texts([text for text in dict.fromkeys(texts) if text not in kept])
        return [kept[text].to(self.device) if text in kept else encoded[text] for text in texts]

    @property
    def text_width(self) -> int:
        """Width of the embeddings of prompts."""
        return int(self.transformer.config.joint_attention_dim)

    def _wrapped_attention(self) -> dict[str, Any]:
        """Install `TokenAttention` in all attention layers; return the layers by name, in the order they run in."""
        names, modules = self.layer_names(self.transformer.config), dict(self.transformer.named_modules())
        actual = {name for name, module in modules.items() if hasattr(module, "processor") and name}
        if not set(names) <= set(modules) or not actual <= {*names, *self.separate_layers(self.transformer.config)}:
            raise UserError(
                f"the attention layers of this {type(self.transformer).__name__} are not those of its config; this "
                "version of diffusers is not supported"
            )
        layers = {name: modules[name] for name in names}
        for name, layer in layers.items():
            layer.processor = self.processor(name, layer.processor)
        return layers

    def processor(self, name: str, original: Any) -> Any:
        """Return the attention processor of a layer, around the layer's `original` one."""
        return TokenAttention(name, original, self.context, self.text_first)

    @staticmethod
    @abstractmethod
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        """Return the names of the attention layers that can merge, in the order they run in."""

    @staticmethod
    def separate_layers(config: Mapping[str, Any]) -> list[str]:
        """Return the names of attention layers that never merge, such as those of the prompt alone."""
        return []

    def limiting_tokenizers(self) -> tuple[Any, ...]:
        """Return the tokenizers that limit the prompt, with the number of tokens that are used as maximum length."""
        tokenizer = getattr(self.pipeline, self.limiting_part)
        tokenizer.model_max_length = self.max_sequence_length - self.template_tokens
        return (tokenizer,)

    @abstractmethod
    def embed(self, prompt: str) -> Embedded:
        """Encode one prompt, or negative prompt, in the transformer's precision."""

    @abstractmethod
    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer on the views of all paths, M = N * V: the velocity [M, C, h, w].

        `timestep`: of each view, float32 [M].
        """

    @abstractmethod
    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the fields `rotary` and `embedding` of the `TokenPass` of a step that merges.

        `tokens`: the views in tokens. `positions`: see `method.mad.positions`.
        """

    def disable_cuda_graphs(self) -> None:
        """Do nothing: transformers use no CUDA graphs."""

    def merged_layers(self, merging: Merging) -> frozenset[str]:
        """Return the attention layers that `merging.blocks` selects; UserError if an entry selects none."""
        layers = list(self.attention)
        return select_layers(layers, transformer_groups(layers), merging.blocks)

    def predict_noise(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None = None,
        chunk_views: int | None = None,
    ) -> Tensor:
        """Predict the velocity with guidance, float32 [B, V, C, h, w].

        `chunk_views` takes more passes and less memory: path after path, `chunk_views` views at a time, or all of a
        path's views where attention merges them. The graph of a gradient then holds one pass, the others run again.
        """
        merged = frozenset() if joint is None else self.merged_at(joint)
        if joint is not None and self._equals_canvas(joint, merged):
            canvas_BCHW = canvas_of(views_BVChw, joint.views)
            if torch.equal(split(canvas_BCHW, joint.views), views_BVChw):  # SyncDiffusion moves views apart
                noise_NCHW = self._paths(canvas_BCHW[:, None], timestep, conditioning, None, chunk_views)[:, 0]
                return conditioning.guided(split(noise_NCHW, joint.views))
        return conditioning.guided(
            self._paths(views_BVChw, timestep, conditioning, joint if merged else None, chunk_views)
        )

    def merged_at(self, joint: JointStep) -> frozenset[str]:
        """Return the names of the layers that merge at a step."""
        if joint.views.count == 1 or not joint.merging.applies(joint.step, crosses=False):
            return frozenset()
        return self.merged_layers(joint.merging)

    def _equals_canvas(self, joint: JointStep, merged: frozenset[str]) -> bool:
        """Return whether a step of views equals a step of the canvas as one view."""
        return self.runs_canvas_once and len(merged) == len(self.attention) and joint.merging.positions == "canvas"

    def _paths(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None,
        chunk_views: int | None,
    ) -> Tensor:
        """Predict the velocity of each path, float32 [N, V, C, h, w]; `joint`: a step that merges."""
        views_NVChw = conditioning.views(views_BVChw)
        if chunk_views is None:
            return self._pass(views_NVChw, timestep, conditioning, joint)
        return self.by_path(self._pass, views_NVChw, timestep, conditioning, joint, chunk_views)

    def _pass(
        self, views_NVChw: Tensor, timestep: Tensor, conditioning: Conditioning, joint: JointStep | None
    ) -> Tensor:
        """Run the transformer once, float32 [N, V, C, h, w]."""
        network = self.transformer if joint is not None or not self.runs_compiled() else self.compiled
        cells_MChw = views_NVChw.flatten(0, 1).to(self.dtype)
        with self.context.running(None if joint is None else self._token_pass(joint, conditioning)):
            times_M = timestep.to(self.device).expand(len(cells_MChw))
            noise = self.run(network, cells_MChw, times_M, conditioning)
        return noise.float().unflatten(0, views_NVChw.shape[:2])

    def _token_pass(self, joint: JointStep, conditioning: Conditioning) -> TokenPass:
        tokens = joint.views.scaled(self.spec.patch)
        size = tokens.rows.size * tokens.columns.size
        grid = grids_of(joint.views, self.device)[size]
        placed = self.place(tokens, joint.merging.positions, conditioning)
        return TokenPass(conditioning.paths, self.merged_layers(joint.merging), grid, **placed)
