"""Sample with a loaded diffusers pipeline that belongs to the caller, and leave it as it was.

A backbone changes attributes of the pipeline's modules (attention processors, forward methods). They are recorded when
the backbone is built, and are present only while it runs. Weights, LoRA layers, quantised layers and hooks that offload
models stay the pipeline's: what its owner changes later, such as the scale of a LoRA, has an effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from madgen.backbones import Backbone, backbones_by_pipeline
from madgen.backbones._loading import models_of
from madgen.utils.errors import UserError

Change = tuple[Any, str, Any]
"""A module or a tokenizer, the name of one of its attributes, and its value; `MISSING` if it has none."""
MISSING = object()


class Borrowed:
    """A pipeline, and the backbone that was built from it."""

    def __init__(self, pipeline: Any, backbone: Backbone, changes: list[Change]):
        self.pipeline, self.backbone, self._changes = pipeline, backbone, changes
        self._depth = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Apply the backbone's changes to the pipeline's modules within this context; may be nested."""
        before = [] if self._depth else _apply(self._changes)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                _apply(before)
                self.pipeline.maybe_free_model_hooks()


def borrow(pipeline: Any, max_sequence_length: int | None = None) -> Borrowed:
    """Build the backbone of a loaded pipeline. Raises UserError if something in it is not supported."""
    module = _family(pipeline)
    _check_pipeline(pipeline)
    modules: list[Any] = [each for model in models_of(pipeline).values() for each in model.modules()]
    modules += [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None]
    before = [dict(vars(each)) for each in modules]
    try:
        backbone: Backbone = module.adopt(pipeline, max_sequence_length)
    finally:
        restoring = [
            (each, name, old.get(name, MISSING))
            for each, old in zip(modules, before, strict=True)
            for name in {**old, **vars(each)}
            if old.get(name, MISSING) is not vars(each).get(name, MISSING)
        ]
        changes = _apply(restoring)
    return Borrowed(pipeline, backbone, changes)


def is_offloaded(model: torch.nn.Module) -> bool:
    """Return whether hooks move weights of a model, or of its parts, when its `forward` is called."""
    return any(hasattr(each, "_hf_hook") or hasattr(each, "_diffusers_hook") for each in model.modules())


def _apply(changes: list[Change]) -> list[Change]:
    """Set the attributes; return the changes that restore them."""
    before = [(module, name, module.__dict__.get(name, MISSING)) for module, name, _ in changes]
    for module, name, value in changes:
        if value is MISSING:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value
    return before


def _family(pipeline: Any) -> Any:
    """Return the backbone module of a pipeline's class, or of one that it is derived from."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        raise UserError(
            f"pipe must be a loaded diffusers pipeline, got {type(pipeline).__name__}; for a folder or a Hub id use "
            "PanoramaSampler.from_pretrained"
        )
    families = backbones_by_pipeline()
    for cls in type(pipeline).__mro__:
        if cls.__name__ in families:
            return families[cls.__name__]
    name = type(pipeline).__name__
    related = next((known for known in families if name.startswith(known.removesuffix("Pipeline"))), None)
    hint = f"; convert it by diffusers.{related}.from_pipe(pipe)" if related else ""
    raise UserError(f"pipe: {name} is not supported{hint}; supported are {', '.join(sorted(families))}")


def _check_pipeline(pipeline: Any) -> None:
    """Raise UserError for what no backbone supports."""
    if getattr(pipeline, "safety_checker", None) is not None:
        raise UserError(
            "pipe: the safety checker is made for single images and would be skipped; load the pipeline with "
            "safety_checker=None, or set pipe.safety_checker = None, and check the panoramas yourself"
        )
    if getattr(pipeline, "watermark", None) is not None:
        raise UserError("pipe: watermarks are not applied to panoramas; set pipe.watermark = None")
    for name, model in models_of(pipeline).items():
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"pipe: the compiled {name} is not supported; pass the pipeline as it is before torch.compile, or use "
                "PanoramaSampler.from_pretrained(..., compile=True)"
            )
    for name in ("unet", "transformer"):
        network = getattr(pipeline, name, None)
        if network is not None and network.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"pipe: {name} is in {network.dtype}; use float32, bfloat16 or float16")
