"""Estimate the GPU memory of a job from config files and headers of weights: weights are exact, activations are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from madgen.backbones import ModelSize, SizedModule, backbone_module
from madgen.config.schema.backbone import BackboneConfig
from madgen.hub.adapters import ip_adapter_files
from madgen.hub.model_size import Parameters, count_file
from madgen.hub.repository import without_retries
from madgen.hub.weights import ModelFiles, resolve_dtype
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.shapes import Shapes
from madgen.sampling.postprocess import decodes_tiled
from madgen.utils.errors import UserError

GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BLOCK = 64
"""Weights that share a float32 scale in nf4."""


@dataclass(frozen=True)
class Work:
    """Activations of a job: of its passes as configured, and of the smallest ones that it can be split into."""

    cells: int
    """Latent cells of all views and prompts of the largest pass."""
    texts: int
    """Views and prompts of that pass, each with the tokens of its prompt."""
    pixels: int
    """Pixels that are decoded at a time."""

    def numbers(self, size: ModelSize) -> tuple[float, float]:
        """Return how many numbers are alive at the peak of the network and of the decoder."""
        return size.per_cell * self.cells + size.per_token * size.text_tokens * self.texts, size.per_pixel * self.pixels


@dataclass(frozen=True)
class GpuMemory:
    """GPU memory of a job in bytes."""

    size: ModelSize
    work: Work
    smallest: Work
    dtype: str
    offload: str
    quantization: str | None
    adapters: int = 0
    """Parameters of the ControlNet and the IP-Adapter."""
    gradients: bool = False
    """SyncDiffusion computes gradients, which need further memory that is not estimated."""

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return ITEM_BYTES[self.dtype]

    @property
    def network(self) -> int:
        """Weights of the denoising network and its adapters."""
        return self._quantized(self.size.network) + self.adapters * self.item

    @property
    def vae(self) -> int:
        """Weights of the VAE."""
        return self.size.vae.total * self._vae_item

    @property
    def text_encoders(self) -> int:
        """Weights of all text encoders."""
        return sum(self._encoders)

    def peak(self, work: Work) -> int:
        """Return the memory at the peak of a job; offloaded models are there only while they run."""
        network, decoder = self.activations(work)
        if self.offload == "model":
            return max(self.network + network, self.vae + decoder, *self._encoders)
        resident = self.network + self.vae
        if self.offload == "text_encoders":
            return resident + max(network, decoder, self.text_encoders)
        return resident + self.text_encoders + max(network, decoder)

    def activations(self, work: Work) -> tuple[int, int]:
        """Return the activations of the network and of the decoder."""
        network, decoder = work.numbers(self.size)
        return round(network * self.item), round(decoder * self._vae_item)

    @property
    def required(self) -> int:
        """The peak with the smallest batches."""
        return self.peak(self.smallest)

    def check(self, limit: str, size: float, alternatives: Iterator[tuple[str, GpuMemory]]) -> None:
        """Raise UserError if the job does not fit into `size` bytes, the GPU memory that `limit` describes.

        The message names the first of the alternatives that fits.
        """
        if self.required <= size:
            return
        fits = next((f"{name} ({_gib(one.required)})" for name, one in alternatives if one.required <= size), "")
        fix = f"set {fits}" if fits else "use a GPU with more memory, smaller panoramas or a smaller model"
        raise UserError(
            f"{limit} is too little: at least {_gib(self.required)} are needed in {self.dtype} "
            f"({self.summary(self.smallest)}); {fix}"
        )

    def summary(self, work: Work) -> str:
        """Describe the parts."""
        parts = {
            "network": self.network,
            "text encoders": self.text_encoders,
            "VAE": self.vae,
            "activations": max(self.activations(work)),
        }
        return ", ".join(f"{name} {_gib(value)}" for name, value in parts.items())

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `plan --json`, in bytes."""
        return {
            "dtype": self.dtype,
            "network": self.network,
            "text_encoders": self.text_encoders,
            "vae": self.vae,
            "activations": max(self.activations(self.work)),
            "activations_at_least": max(self.activations(self.smallest)),
            "peak": self.peak(self.work),
            "peak_at_least": self.required,
        }

    def lines(self) -> Iterator[str]:
        """Describe the memory as text; models of less than 1 GiB, such as the demo, fit everywhere."""
        if self.peak(self.work) < GIB:
            return
        least = "" if self.peak(self.work) == self.required else f", at least {_gib(self.required)} in smaller batches"
        offloaded = "" if self.offload == "none" else f", with offload={self.offload}"
        yield f"GPU memory: about {_gib(self.peak(self.work))}{least} ({self.dtype}{offloaded})"
        yield f"  {self.summary(self.work)}"
        if self.gradients:
            yield "  not estimated: the gradients of SyncDiffusion"

    @property
    def _vae_item(self) -> int:
        return 4 if self.dtype == "float16" and self.size.upcasts_vae else self.item

    @property
    def _encoders(self) -> tuple[int, ...]:
        wider = 2 if self.dtype == "float16" else 0
        return tuple(encoder.total * self.item + encoder.float32 * wider for encoder in self.size.text_encoders)

    def _quantized(self, network: Parameters) -> int:
        others = (network.total - network.linear) * self.item
        if self.quantization == "nf4":
            return others + network.linear // 2 + network.linear // NF4_BLOCK * 4
        if self.quantization is not None:  # each row has a scale in float32, with int8 also a zero point
            return others + network.linear + network.rows * (5 if self.quantization == "int8" else 4)
        return network.total * self.item


def gpu_memory(shapes: Shapes) -> GpuMemory | None:
    """Estimate the GPU memory; None for jobs on a CPU and for backbones that do not state their size."""
    run, backbone = shapes.run, shapes.run.job.backbone
    size = None if "cpu" in (run.job.trainer.accelerator, run.device) else _size(backbone, run.files)
    if size is None:
        return None
    dtype = "bfloat16" if run.dtype == "auto" else run.dtype
    works = [_work(shapes, *size) for size in shapes.layouts]
    work, smallest = (_largest([pair[which] for pair in works]) for which in (0, 1))
    gradients = shapes.method.sync is not None
    return GpuMemory(
        size, work, smallest, dtype, backbone.offload, backbone.quantization, _adapters(backbone), gradients
    )


def check_gpu_memory(run: ResolvedRun, memory: GpuMemory | None) -> None:
    """Raise UserError if the job does not fit into `backbone.gpu_memory`."""
    backbone = run.job.backbone
    if backbone.gpu_memory is not None and memory is not None:
        limit = f"backbone.gpu_memory={backbone.gpu_memory:g} GiB"
        memory.check(limit, backbone.gpu_memory * GIB, _alternatives(backbone, memory))


def check_weights(backbone: BackboneConfig, gpu: str, total: int) -> None:
    """Raise UserError if the models alone do not fit into the GPU `gpu`, which has `total` bytes."""
    size = _size(backbone, ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config, backbone.variant))
    if size is None:
        return
    dtype = resolve_dtype(backbone.dtype, "cuda")
    nothing = Work(0, 0, 0)
    memory = GpuMemory(size, nothing, nothing, dtype, backbone.offload, backbone.quantization, _adapters(backbone))
    memory.check(f"{gpu} with {_gib(total)}", total, _alternatives(backbone, memory))


def _size(backbone: BackboneConfig, files: ModelFiles) -> ModelSize | None:
    """Return what the models keep in memory; None for backbones that do not state it."""
    module = backbone_module(backbone.name)
    if not hasattr(module, "size"):
        return None
    with without_retries():
        return cast(SizedModule, module).size(files, backbone.max_sequence_length)


def _alternatives(backbone: BackboneConfig, memory: GpuMemory) -> Iterator[tuple[str, GpuMemory]]:
    """Yield settings that save memory, those that cost the least first."""
    dtype, kinds = "", [memory.quantization]
    if memory.dtype == "float32":
        dtype, memory = "backbone.dtype=bfloat16 ", replace(memory, dtype="bfloat16")
        yield dtype.strip(), memory
    is_transformer = memory.size.text_tokens > 0
    if is_transformer and not Path(backbone.pretrained).is_file() and not backbone.loras:
        kinds += ["int8", "nf4"]
    for kind in kinds:
        quantized = "" if kind == memory.quantization else f"backbone.quantization={kind} "
        for offload in ("none", "text_encoders", "model"):
            moved = "" if offload == memory.offload else f"backbone.offload={offload}"
            yield f"{dtype}{quantized}{moved}".strip(), replace(memory, offload=offload, quantization=kind)


def _work(shapes: Shapes, height: int, width: int) -> tuple[Work, Work]:
    """Return the work of one size as configured, and in the smallest batches."""
    job, spec, canvas_steps = shapes.run.job, shapes.spec, shapes.canvas_steps
    views = shapes.layouts[height, width].at(canvas_steps)
    cell, canvas = views.rows.size * views.columns.size, height * width // spec.factor**2
    passes, smallest = [], []
    if canvas_steps:
        passes.append((canvas, 1))
        smallest.append((canvas, 1))
    if canvas_steps < job.denoising_steps:
        passes.append((views.count * cell, views.count))
        smallest.append((views.count * cell, views.count) if canvas_steps < shapes.method.merging.steps else (cell, 1))
    batch = job.sampling.batch_size if isinstance(job.sampling.batch_size, int) else 1
    paths = batch * (1 + spec.is_guided(job.sampling.guidance_scale)) * _texts(shapes.run)
    pixels, tile = height * width, min(height * width, (2 * spec.view_size * spec.factor) ** 2)
    decoded = tile if decodes_tiled(height, width, job.sampling.decode) else pixels
    cells, texts = max(passes or [(cell, 1)])
    return Work(paths * cells, paths * texts, decoded), Work(*max(smallest or [(cell, 1)]), tile)


def _texts(run: ResolvedRun) -> int:
    """Return the largest number of prompts of a panorama, including those of its regions."""
    prompts = run.plan.prompts
    return 1 + max((len(prompts[row].regions) for row in prompts.rows_with_regions()), default=0)


def _largest(works: list[Work]) -> Work:
    return Work(*(max(getattr(work, name) for work in works) for name in ("cells", "texts", "pixels")))


def _adapters(backbone: BackboneConfig) -> int:
    """Return the parameters of the ControlNet and the IP-Adapter, as far as they are on this machine."""
    places = []
    if backbone.controlnet.weights is not None:
        places.append(Path(backbone.controlnet.weights).expanduser())
    if (files := ip_adapter_files(backbone.ip_adapter)) is not None:
        folder = Path(files.source)
        places += [folder / files.subfolder / files.weight_name, folder / files.image_encoder]
    return sum(count_file(place).total for place in places if place.exists())


def _gib(size: float) -> str:
    """Format a number of bytes in GiB, or in MiB if it is less than one."""
    if size < GIB:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"
