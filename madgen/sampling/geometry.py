"""Check panorama sizes in pixels against a backbone's views."""

from __future__ import annotations

from madgen.backbones import BackboneSpec
from madgen.diffusion.views import Layout, Views, build_layout
from madgen.sampling.method import Method
from madgen.utils.errors import UserError

MAX_PIXELS = 2**26
"""Largest panorama in pixels; image readers refuse larger ones as decompression bombs."""


class Geometry:
    """Check panorama sizes in pixels, and build the layouts of their views, as `method` says."""

    def __init__(self, spec: BackboneSpec, method: Method):
        self.spec, self.method, views = spec, method, method.config.views
        self.layout, self.overlap_from = views.layout, views.overlap_from
        self.merged_steps = method.merging.end
        self.view_size = spec.view_size if views.size is None else views.size
        self.stride = max(1, self.view_size // 4) if views.stride is None else views.stride
        if self.layout == "shifted" and self.merged_steps == 0 and self.overlap_from is None:
            if views.stride is not None:
                raise UserError("method.views.stride has no effect with layout=shifted without MAD; set it to null")
            self.stride = 1  # without merging, views may shift by any number of cells
        if self.layout == "whole" and (views.size or views.stride):
            raise UserError("method.views.size and stride have no effect with layout=whole; set them to null")
        if self.layout != "whole" and self.view_size % spec.patch:
            raise UserError(
                f"method.views.size={self.view_size} must be a multiple of {spec.patch} latent cells (a token of the "
                "backbone)"
            )
        self._check_attention()

    def _check_attention(self) -> None:
        """Raise UserError for settings of `method.mad` that do not apply to the backbone."""
        merging = self.method.merging
        if self.spec.joint_attention and merging.cross_attention != "scheduled":
            raise UserError(
                f"method.mad.cross_attention={merging.cross_attention} does not apply: in this backbone prompt and "
                "image share the attention layers; set it to scheduled"
            )
        if not self.spec.joint_attention and merging.positions != "canvas":
            raise UserError(
                f"method.mad.positions={merging.positions} has no effect: this backbone's attention has no positions; "
                "set it to canvas"
            )

    def build(self, height: int, width: int, loop: bool = False) -> Layout:
        """Return the layout of a canvas of `height` x `width` pixels; UserError names the nearest possible size."""
        if self.layout == "whole" and loop:
            raise UserError("sampling.loop=true needs views that wrap around: layout overlapping or shifted, not whole")
        self._check_views()
        is_view = height == width == self.spec.factor * self.view_size
        if self.layout == "overlapping" and self.merged_steps and not is_view:
            self._check_merged_views()
        if height * width > MAX_PIXELS:
            raise UserError(f"{height}x{width} px exceed the largest supported panorama, {MAX_PIXELS} px (2^26)")
        for name, pixels in (("height", height), ("width", width)):
            self._check_extent(name, pixels, loop and name == "width")
        self._check_positions(height, width)
        factor = self.spec.factor
        cells = (height // factor, width // factor, self.view_size, self.stride)
        layout = build_layout(self.layout, *cells, loop, self.merged_steps, self.overlap_from)
        for step in range(min(self.merged_steps, self.view_size)):
            self._check_merging(layout.at(step))
        if self.overlap_from is not None and self.overlap_from < self.merged_steps:
            self._check_merging(layout.at(self.overlap_from))
        if self.method.config.merge.reference_steps and not layout.at(0).has_middles:
            raise UserError(
                f"method.merge.reference_steps has no effect on {height}x{width} px: views of {self.view_size} latent "
                f"cells with method.views.stride={self.stride} overlap everywhere; use a stride above half a view"
            )
        return layout

    def _check_views(self) -> None:
        if self.layout != "whole" and not 0 < self.stride <= self.view_size:
            raise UserError(
                "method.views: need 0 < stride <= size, "
                f"got stride {self.stride} and size {self.view_size} latent cells"
            )

    def _check_extent(self, name: str, pixels: int, loop: bool) -> None:
        """Raise the errors of `build_layout` with sizes in pixels."""
        factor, size, stride = self.spec.factor, self.view_size, self.stride
        if self.layout == "whole":
            smallest = step = factor * self.spec.patch
            reason = f"is not a multiple of {step} px ({'a token' if self.spec.patch > 1 else 'a latent cell'})"
        else:
            # A loop is a multiple of the stride; a strip is one view plus a multiple of the stride.
            smallest, step = factor * (-(-size // stride) * stride if loop else size), factor * stride
            views = "a loop of views" if loop else "views"
            reason = f"cannot be covered by {views} of {factor * size} px that are {factor * stride} px apart"
        if pixels < smallest:
            raise UserError(f"{name}={pixels} px {reason}; the smallest is {smallest} px")
        below = pixels - (pixels - smallest) % step
        if below != pixels:
            raise UserError(f"{name}={pixels} px {reason}; the nearest are {below} and {below + step} px")

    def _check_positions(self, height: int, width: int) -> None:
        """Raise UserError for a view, or a merged canvas, that is larger than the backbone has positions for."""
        if self.spec.max_side is None:
            return
        limit = self.spec.max_side * self.spec.factor
        longest = f"{'height' if height > width else 'width'}={max(height, width)} px"
        reason = f"the backbone has positions for {limit} px"
        if self.layout == "whole":
            if max(height, width) > limit:
                raise UserError(f"{longest} is too large for layout=whole: {reason}; use layout=overlapping")
        elif self.view_size > self.spec.max_side:
            raise UserError(
                f"method.views.size={self.view_size} must be <= {self.spec.max_side} latent cells: {reason}"
            )
        elif self.merged_steps and self.method.merging.positions == "canvas" and max(height, width) > limit:
            raise UserError(
                f"{longest} is too large for method.mad.positions=canvas: {reason}; set method.mad.positions to fit or "
                "local, or method.mad.steps to 0"
            )

    def _check_merged_views(self) -> None:
        """Raise UserError for a size or a stride with which views do not fall on whole cells where attention merges."""
        step = self.spec.coarsest
        for name, cells in (("size", self.view_size), ("stride", self.stride)):
            if cells % step:
                below, above = cells - cells % step, cells - cells % step + step
                possible = f"{below} and {above}" if below else f"{above}"
                raise UserError(
                    f"method.views.{name}={cells} must be a multiple of {step} latent cells for method.mad "
                    f"({'a token' if self.spec.joint_attention else 'the lowest resolution'} of the network); the "
                    f"nearest {'are' if below else 'is'} {possible}"
                )

    def _check_merging(self, views: Views) -> None:
        if views.count > 1 and not views.divisible(self.spec.coarsest):
            raise UserError(
                f"method.mad needs views of a size and a stride that are multiples of {self.spec.coarsest} latent "
                f"cells (the network's lowest resolution), got size {self.view_size} and stride {self.stride}"
            )
