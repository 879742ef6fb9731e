"""Shared by diffusion transformers: joint attention of prompt and image, velocity prediction and offloading.

Where attention merges in all layers, with positions of the canvas, MAD equals the transformer on the canvas: everything
outside attention works token by token. Such a step runs the canvas once, as a single view.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones import BackboneSpec
from madgen.backbones._backbone import PipelineBackbone
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._family import TEXT_ENCODERS
from madgen.backbones._tokens import canvas_of, pack, unpack
from madgen.backbones._transformer_family import TransformerFamily
from madgen.diffusion.attention import JointStep, grids_of
from madgen.diffusion.merge import split
from madgen.diffusion.token_attention import TokenAttention, TokenContext, TokenPass
from madgen.diffusion.views import Views
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class TransformerBackbone(TransformerFamily, PipelineBackbone):
    """A transformer that denoises by flow matching.

    Subclasses describe their family, embed prompts, run the transformer and place its tokens.
    """

    text_width_key = "joint_attention_dim"
    text_first = True
    """In layers with one stream the tokens of the prompt precede those of the image."""
    runs_canvas_once = True
    """Run steps in which all layers merge as one view."""

    def __init__(
        self,
        pipeline: Any,
        spec: BackboneSpec,
        dtype: torch.dtype,
        device: torch.device,
        max_sequence_length: int | None = None,
        offload: str = "none",
    ):
        self.offload = offload
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
        self.max_sequence_length, self.tokenizers = self.limited(max_sequence_length)
        self.context = TokenContext()
        self.attention = self._wrapped_attention()

    def _frozen(self, model: Any, stays: bool = False) -> Any:
        return super()._frozen(model, stays or self.offload == "model")

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

    def limited(self, max_sequence_length: int | None) -> tuple[int, tuple[Any, ...]]:
        """Return how many tokens the text encoder reads, and the tokenizers that limit prompts, with that maximum."""
        tokenizer = copy(getattr(self.pipeline, self.limiting_part))  # the pipeline's own stays as it is
        length = self.used_length(max_sequence_length, tokenizer.model_max_length)
        tokenizer.model_max_length = length - self.template_tokens
        return length, (tokenizer,)

    def embed(self, prompt: str) -> Embedded:
        """Encode one prompt, or negative prompt, in the transformer's precision."""
        length = self.max_sequence_length
        hidden, _ = self.pipeline.encode_prompt([prompt], device=self.device, max_sequence_length=length)
        return Embedded(hidden.to(self.dtype))

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

    def predict_noise(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None = None,
        chunk_views: int | None = None,
    ) -> Tensor:
        merged = frozenset() if joint is None else self.merged_at(joint)
        all_merge = self.runs_canvas_once and len(merged) == len(self.attention)
        if joint is not None and all_merge and joint.merging.positions == "canvas":
            canvas_BCHW = canvas_of(views_BVChw, joint.views)
            if torch.equal(split(canvas_BCHW, joint.views), views_BVChw):  # SyncDiffusion moves views apart
                canvas_N1CHW = conditioning.views(canvas_BCHW[:, None])
                noise_N1CHW = self.run_paths(self._pass, canvas_N1CHW, timestep, conditioning, None, chunk_views)
                return conditioning.guided(split(noise_N1CHW[:, 0], joint.views))
        views_NVChw, merging = conditioning.views(views_BVChw), joint if merged else None
        return conditioning.guided(
            self.run_paths(self._pass, views_NVChw, timestep, conditioning, merging, chunk_views)
        )

    def _pass(
        self, views_NVChw: Tensor, timestep: Tensor, conditioning: Conditioning, joint: JointStep | None
    ) -> Tensor:
        """Run the transformer once: the velocity of each path, float32 [N, V, C, h, w]. `joint`: a step that merges."""
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


class PackedTransformerBackbone(TransformerBackbone):
    """A transformer whose tokens are 2x2 latent cells with their channels side by side, as in FLUX."""

    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        count, (height, width) = len(cells_MChw) // conditioning.paths, cells_MChw.shape[-2:]
        velocity: Tensor = network(
            hidden_states=pack(cells_MChw),
            timestep=timestep / 1000,
            encoder_hidden_states=conditioning.embeddings_NTD.repeat_interleave(count, 0),
            return_dict=False,
            **self.inputs(conditioning, count, height // 2, width // 2),
        )[0]
        return unpack(velocity, height, width)

    @abstractmethod
    def inputs(self, conditioning: Conditioning, views: int, height: int, width: int) -> dict[str, Any]:
        """Return further inputs of the transformer: `views` of each path, with `height` x `width` tokens."""
