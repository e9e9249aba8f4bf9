"""Reductions in OpenCV: which of them leave elements out."""

from __future__ import annotations

import math

from layerswap.onnx_graph.facts import array, numbers, shape
from layerswap.onnx_graph.views import Place

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)


def skips_elements(place: Place) -> bool:
    """Whether OpenCV 5.0.0 reduces over a part of what it should.

    Found by trying 3000 shapes of 3 to 5 axes: at least three axes are reduced, they aren't the
    last ones (axes of size 1 don't count), and those before the last two of them have more than
    two elements. An open size may be anything.
    """
    sizes, axes = shape(place), _axes(place)
    if sizes is None or len(axes) < 3 or not all(-len(sizes) <= a < len(sizes) for a in axes):
        return False
    reduced = sorted({axis % len(sizes) for axis in axes})
    real = [axis for axis, size in enumerate(sizes) if size != 1]
    summed = [axis for axis in real if axis in reduced]
    if summed == real[len(real) - len(summed) :]:
        return False
    return math.prod(sizes[axis] or 3 for axis in reduced[:-2]) > 2


def _axes(place: Place) -> list[int]:
    listed = numbers(place, "axes")
    value = array(place, 1)
    if value is not None and value.dtype.kind == "i":
        listed = [int(axis) for axis in value.reshape(-1)]
    return listed
