"""Hypothesis strategies for views."""

from hypothesis import strategies as st

from madgen.diffusion.views import Axis, view_starts


@st.composite
def axes(draw):
    """Draw the views along one direction, evenly spaced, on a strip or a loop."""
    size = draw(st.integers(1, 9))
    stride = draw(st.integers(1, size))
    if draw(st.booleans()):
        extent = stride * draw(st.integers(-(-size // stride), 12))
        return Axis(extent, size, tuple(view_starts(extent, size, stride, loop=True)))
    extent = size + stride * draw(st.integers(0, 6))
    return Axis(extent, size, tuple(view_starts(extent, size, stride)))
