"""Shared by diffusion transformers: joint attention, velocity prediction, guidance and decoding.

Where attention merges in all layers, with positions of the canvas, MAD equals the transformer on the canvas: everything
outside attention works token by token. Such a step runs the canvas once, as a single view.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from madgen.backbones import TEXTS_ONLY, BackboneSpec, Guidance, PromptEmbeddings, _precision, _schedulers, _vae
from madgen.backbones._blocks import select_layers, transformer_groups
from madgen.backbones._conditioning import Conditioning, Embedded, SharedNegatives, stack
from madgen.backbones._flow import FlowSchedule
from madgen.backbones.acceleration.compilation import check_compiler, compiled, replaced_forward
from madgen.diffusion.attention import JointStep, Merging, grids_of
from madgen.diffusion.merge import grid_of, merge_cells, split, split_cells
from madgen.diffusion.token_attention import TokenAttention, TokenContext, TokenPass
from madgen.diffusion.views import Views
from madgen.hub import tokenizers
from madgen.hub.model_configs import check_class, read_configs, read_index
from madgen.utils.errors import UserError

FILES = ("model_index.json", "transformer/config.json", "vae/config.json")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def has_part(pretrained: str, index: Mapping[str, Any], part: str) -> bool:
    """Return whether a checkpoint has an optional part, such as a text encoder: in its index and in its folder."""
    folder = Path(pretrained)
    return bool((index.get(part) or [None])[0]) and (not folder.is_dir() or (folder / part).is_dir())


def read_transformer_configs(
    pretrained: str, revision: str | None, config: str | None, name: str, classes: tuple[str, ...]
) -> tuple[dict[str, Any], ...]:
    """Read `FILES`; UserError if the pipeline is none of `classes`, which `backbone.name=<name>` loads."""
    check_class(read_index(pretrained, revision, config), pretrained, name, classes)
    return read_configs(pretrained, revision, config, FILES)


def transformer_spec(
    vae: Mapping[str, Any],
    channels: int,
    view_size: int,
    guidance: Guidance,
    max_side: int | None = None,
) -> BackboneSpec:
    """Return the shapes of a transformer with tokens of 2x2 latent cells."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return BackboneSpec(channels, factor, view_size, 2, guidance, patch=2, joint_attention=True, max_side=max_side)


def check_transformer_blocks(layers: Sequence[str], blocks: Sequence[str]) -> None:
    """Raise UserError for an entry of `method.mad.blocks` that selects none of a transformer's layers."""
    select_layers(layers, transformer_groups(layers), blocks)


def check_sequence_length(length: int | None, default: int, limit: int) -> int:
    """Return `backbone.max_sequence_length` or its default; UserError if it exceeds the model family's limit."""
    if length is not None and not 0 < length <= limit:
        raise UserError(
            f"backbone.max_sequence_length={length} must be in 1..{limit} tokens for this backbone; null is {default}"
        )
    return default if length is None else length


class TransformerBackbone:
    """Transformer, VAE, text encoders and tokenizers of one checkpoint; see `madgen.backbones.Backbone`.

    Subclasses list the attention layers, embed prompts, run the transformer and place its tokens.
    """

    borrowed = False
    """The models belong to a pipeline of the caller; see `_borrowed`."""
    pools = True
    """The transformer takes a pooled embedding of the prompt."""
    flow = FlowSchedule()
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
        max_sequence_length: int,
        offload: str = "none",
    ):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.loaded_dtype = dtype
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.max_sequence_length = max_sequence_length
        self.models: list[torch.nn.Module] = []
        self._offload = offload
        self.transformer = self._frozen(pipeline.transformer)
        self.vae = self._frozen(pipeline.vae)
        encoders = [getattr(pipeline, name, None) for name in TEXT_ENCODERS]
        self.text_encoders = [self._frozen(encoder, True) for encoder in encoders if encoder is not None]
        self._kept: dict[str, Embedded] = {}
        """Embeddings of prompts of coming batches, on the CPU."""
        if self._offload == "model" and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        self.tokenizers = self.limiting_tokenizers()
        self.context = TokenContext()
        self.attention = self._attention()
        self.compiled: Any = None
        """The compiled transformer; see `compile`."""
        self._compiled_decoder: Any = None

    def _frozen(self, model: Any, encodes_text: bool = False) -> Any:
        self.models.append(model)
        if self.borrowed:
            return model.eval()
        stays = self._offload == "model" or (encodes_text and self._offload == "text_encoders")
        return (model if stays else model.to(self.device)).eval().requires_grad_(False)

    @torch.no_grad()
    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode each distinct prompt once, and keep the embeddings on the CPU until the next call."""
        kept, distinct = self._kept, list(dict.fromkeys(prompts))
        self._kept = {text: kept[text] for text in distinct if text in kept}
        encoded = self._encode_texts([text for text in distinct if text not in kept])
        self._kept |= {text: embedded.to(torch.device("cpu")) for text, embedded in encoded.items()}

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Embedded]:
        """Encode texts; offloaded text encoders are on the device only meanwhile."""
        moves = self._offload == "text_encoders" and bool(texts)
        try:
            for encoder in self.text_encoders if moves else ():
                encoder.to(self.device)
            return {text: self.embed(text) for text in texts}
        finally:
            for encoder in self.text_encoders if moves else ():
                encoder.to("cpu")

    def _embeddings(self, texts: Sequence[str]) -> dict[str, Embedded]:
        """Return the embeddings of distinct texts: those that are kept, others are encoded."""
        kept = self._kept if self.dtype == self.loaded_dtype else {}  # a temporary float32 encodes again
        encoded = self._encode_texts([text for text in texts if text not in kept])
        return {text: kept[text].to(self.device) if text in kept else encoded[text] for text in texts}

    def _attention(self) -> dict[str, Any]:
        """Install `TokenAttention` in all attention layers; return the layers by name, in the order they run in."""
        names, modules = self.layer_names(self.transformer.config), dict(self.transformer.named_modules())
        actual = {name for name, module in modules.items() if hasattr(module, "to_q")}
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
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        """Return the names of the attention layers that can merge, in the order they run in."""
        raise NotImplementedError

    @staticmethod
    def separate_layers(config: Mapping[str, Any]) -> list[str]:
        """Return the names of attention layers that never merge, such as those of the prompt alone."""
        return []

    def limiting_tokenizers(self) -> tuple[Any, ...]:
        """Return the tokenizers that limit the prompt, with `max_sequence_length` as their maximum length."""
        raise NotImplementedError

    def embed(self, prompt: str) -> Embedded:
        """Encode one prompt, or negative prompt, in the transformer's precision."""
        raise NotImplementedError

    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer on the views of all paths, M = N * V: the velocity [M, C, h, w]."""
        raise NotImplementedError

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the fields `rotary` and `embedding` of the `TokenPass` of a step that merges.

        `tokens`: the views in tokens. `positions`: see `method.mad.positions`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        view_ids: Sequence[Hashable] | None = None,
        embeddings: PromptEmbeddings = TEXTS_ONLY,
    ) -> Conditioning:
        """Encode each prompt, and each negative prompt if guidance needs a second pass.

        Prompts are encoded one by one, so that their embeddings do not depend on the batch. Prompts with equal
        `view_ids` and negative prompts share the unconditional pass.
        """
        embedded, shared, encoded = None, None, dict[str, Embedded]()
        hidden_NTD, pooled_ND = embeddings.prompt_embeds, embeddings.pooled_prompt_embeds
        paths = self._embedded_paths(prompts, encoded, hidden_NTD, pooled_ND, "prompt_embeds")
        if self.spec.guidance == "embedded":
            embedded = torch.full((len(prompts),), guidance_scale, device=self.device, dtype=torch.float32)
        elif self.spec.guidance == "cfg" and guidance_scale > 1:
            hidden_NTD, pooled_ND = embeddings.negative_prompt_embeds, embeddings.negative_pooled_prompt_embeds
            keys: Sequence[Hashable] = negative_prompts if hidden_NTD is None else range(len(prompts))
            shared = SharedNegatives(view_ids or range(len(prompts)), keys, self.device)
            distinct = [negative_prompts[first] for first in shared.firsts]
            name = "negative_prompt_embeds"
            paths = [*self._embedded_paths(distinct, encoded, hidden_NTD, pooled_ND, name), *paths]
        hidden, pooled = stack(paths)
        return Conditioning(
            hidden,
            guidance_scale,
            embedded,
            pooled,
            negatives=len(paths) - len(prompts),
            shared=shared or None,
        )

    def _embedded_paths(
        self,
        texts: Sequence[str],
        encoded: dict[str, Embedded],
        hidden_NTD: Tensor | None,
        pooled_ND: Tensor | None,
        name: str,
    ) -> list[Embedded]:
        """Return the embedding of each text, or those given in their place as the argument `name` of the call.

        `encoded` keeps the texts that are encoded. Raises UserError if the pooled embeddings do not fit.
        """
        if hidden_NTD is None:
            encoded.update(self._embeddings([text for text in dict.fromkeys(texts) if text not in encoded]))
            return [encoded[text] for text in texts]
        if self.pools != (pooled_ND is not None):
            pooled = name.replace("prompt", "pooled_prompt")
            raise UserError(
                f"this backbone needs {pooled} with {name}" if self.pools else f"this backbone takes no {pooled}"
            )
        hidden_NTD = hidden_NTD.to(self.device, self.dtype)
        if pooled_ND is None:
            return [Embedded(hidden_1TD) for hidden_1TD in hidden_NTD.split(1)]
        pairs = zip(hidden_NTD.split(1), pooled_ND.to(self.device, self.dtype).split(1), strict=True)
        return [Embedded(hidden_1TD, pooled_1D) for hidden_1TD, pooled_1D in pairs]

    def cut_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that every text encoder truncates, None if the prompt fits."""
        return tokenizers.cut_texts(self.tokenizers, [prompt])[0]

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
        merged = self._merged(joint)
        if joint is not None and self._equals_canvas(joint, merged):
            canvas_BCHW = canvas_of(views_BVChw, joint.views)
            if torch.equal(split(canvas_BCHW, joint.views), views_BVChw):  # SyncDiffusion moves views apart
                noise_NCHW = self._paths(canvas_BCHW[:, None], timestep, conditioning, None, chunk_views)[:, 0]
                return conditioning.guided(split(noise_NCHW, joint.views))
        return conditioning.guided(
            self._paths(views_BVChw, timestep, conditioning, joint if merged else None, chunk_views)
        )

    def _merged(self, joint: JointStep | None) -> frozenset[str]:
        """Return the names of the layers that merge at this step."""
        if joint is None or joint.views.count == 1 or not joint.merging.applies(joint.step, crosses=False):
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
        size = chunk_views if joint is None else views_NVChw.shape[1]
        run: Any = self._pass
        if joint is None and torch.is_grad_enabled():
            run = partial(checkpoint, self._pass, use_reentrant=False)
        paths = []
        for path, views in enumerate(views_NVChw.split(1)):
            one = conditioning.select(slice(path, path + 1))
            paths.append(torch.cat([run(chunk, timestep, one, joint) for chunk in views.split(size, dim=1)], dim=1))
        return torch.cat(paths)

    def _pass(
        self, views_NVChw: Tensor, timestep: Tensor, conditioning: Conditioning, joint: JointStep | None
    ) -> Tensor:
        """Run the transformer once, float32 [N, V, C, h, w]."""
        network = self.transformer if joint is not None or not self._runs_compiled() else self.compiled
        cells_MChw = views_NVChw.flatten(0, 1).to(self.dtype)
        with self.context.running(None if joint is None else self._token_pass(joint, conditioning)):
            noise = self.run(network, cells_MChw, timestep, conditioning)
        return noise.float().unflatten(0, views_NVChw.shape[:2])

    def _token_pass(self, joint: JointStep, conditioning: Conditioning) -> TokenPass:
        tokens = joint.views.scaled(self.spec.patch)
        size = tokens.rows.size * tokens.columns.size
        grid = grids_of(joint.views, self.device)[size]
        placed = self.place(tokens, joint.merging.positions, conditioning)
        return TokenPass(conditioning.paths, self.merged_layers(joint.merging), grid, **placed)

    def compile(self, backend: str = "inductor") -> None:
        """Denoise views on their own, canvases as one view, and decode in compiled graphs, one for each shape.

        Raises UserError if PyTorch cannot compile on this machine.
        """
        check_compiler(backend, self.device)
        self.compiled = compiled(self.transformer, backend)
        self._compiled_decoder = compiled(self.vae.decoder.forward, backend)

    def _runs_compiled(self) -> bool:
        """Return whether compiled graphs apply: not to gradients, nor to temporary float32."""
        return self.compiled is not None and not torch.is_grad_enabled() and self.dtype == self.loaded_dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run all models in float32 within this context, then restore their precision."""
        before = self.dtype
        with _precision.in_float32(self.models):
            try:
                self.dtype = torch.float32
                yield
            finally:
                self.dtype = before

    def release_memory(self) -> bool:
        """Return False: transformers have no performance caches."""
        return False

    def disable_cuda_graphs(self) -> None:
        """Do nothing: transformers use no CUDA graphs."""

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Decode to pixels in 0..1, float32; `tiled`: in tiles of two views' side. See `_vae.decode`."""
        tile = 2 * self.spec.view_size if tiled else None
        with replaced_forward(self.vae.decoder, self._compiled_decoder if self._runs_compiled() else None):
            return _vae.decode(self.vae, self.spec.factor, latents_BCHW, wrap, tile)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode pixels in 0..1 to latents, float32 [B, C, H / factor, W / factor]."""
        return _vae.encode(self.vae, pixels_B3HW)

    def new_scheduler(
        self,
        name: str | None,
        num_inference_steps: int,
        original_inference_steps: int | None = None,
        view_cells: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Create the checkpoint's own scheduler, or the diffusers class `name` with the checkpoint's shift."""
        tokens = (view_cells or self.spec.view_size**2) // self.spec.patch**2
        return _schedulers.new_scheduler(
            self.scheduler,
            name,
            num_inference_steps,
            original_inference_steps,
            self.device,
            options,
            tokens=tokens,
            schedule=self.flow,
        )


def canvas_of(views_BVChw: Tensor, views: Views) -> Tensor:
    """Return the canvas [B, C, H, W] that views were split from: the first view's value for each cell."""
    grid = grid_of(views, views_BVChw.device)
    rows, columns = grid.rows, grid.columns
    cells = views_BVChw.unflatten(1, (rows.count, columns.count)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if rows.cells is not None:
        cells = cells.index_select(2, rows.positions[0])
    if columns.cells is not None:
        cells = cells.index_select(3, columns.positions[0])
    return cells.contiguous()


def split_positions(table_1HWD: Tensor, tokens: Views) -> Tensor:
    """Return the views' part of a table of the canvas's tokens: [1, H, W, D] to [V, h * w, D]."""
    return split_cells(table_1HWD, grid_of(tokens, table_1HWD.device))[0].flatten(1, 2)


def pack(cells_MChw: Tensor) -> Tensor:
    """Turn 2x2 latent cells into tokens: [M, C, h, w] to [M, h / 2 * w / 2, 4 * C], as diffusers' FLUX pipelines."""
    count, channels, height, width = cells_MChw.shape
    cells = cells_MChw.reshape(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpack(tokens_MLD: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack` for views of `height` x `width` latent cells."""
    cells = tokens_MLD.reshape(len(tokens_MLD), height // 2, width // 2, -1, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens_MLD), -1, height, width)


def token_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return FLUX's ids (0, row, column) of `height` x `width` tokens [L, 3]."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.zeros(1, device=device, dtype=torch.int64), rows, columns).float()


def canvas_ids(tokens: Views, positions: str, device: torch.device) -> Tensor:
    """Return FLUX's ids of the canvas's tokens in merged layers [H * W, 3].

    `canvas`: their place on the canvas. `fit`: the same, scaled into the range of a view. `local`: the mean of their
    places in the views that cover them.
    """
    rows, columns = tokens.rows, tokens.columns
    if positions == "local":
        local = token_ids(rows.size, columns.size, device).expand(1, tokens.count, -1, -1)
        cells = local.unflatten(2, (rows.size, columns.size))
        return merge_cells(cells, grid_of(tokens, device)).flatten(1, 2)[0]
    ids = token_ids(rows.extent, columns.extent, device)
    if positions == "fit":
        ids = ids * ids.new_tensor([1, rows.size / rows.extent, columns.size / columns.extent])
    return ids
