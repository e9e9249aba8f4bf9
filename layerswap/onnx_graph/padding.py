"""How much an operator that moves a window pads, and where the last window lies."""

from __future__ import annotations

import math

from layerswap.onnx_graph.facts import number, numbers, same_padding, shape
from layerswap.onnx_graph.views import Place


def _windows(place: Place) -> list[tuple[int | None, int, int]] | None:
    """Size, kernel and stride along each spatial axis; None where they aren't known."""
    data, weight = shape(place), shape(place, 1)
    if data is None or any(step != 1 for step in numbers(place, "dilations")):
        return None
    kernel = numbers(place, "kernel_shape") or [size or 0 for size in (weight or ())[2:]]
    strides = numbers(place, "strides") or [1] * len(kernel)
    spatial = data[2:]
    if not len(spatial) == len(kernel) == len(strides) or min((*kernel, *strides), default=0) < 1:
        return None
    return list(zip(spatial, kernel, strides, strict=True))


def splits_unevenly(place: Place) -> bool:
    """Whether auto_pad SAME begins elsewhere than half of kernel − 1 before the input.

    Along an axis of open size: whether it does for some size.
    """
    mode, windows = same_padding(place), _windows(place)
    if not mode or windows is None:
        return False
    for size, kernel, stride in windows:
        sizes = range(1, stride + 1) if size is None else [size]
        for rest in ((each % stride) or stride for each in sizes):
            total = max(kernel - rest, 0)
            begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
            if begin != (kernel - 1) // 2:
                return True
    return False


def skips_last_window(place: Place) -> bool:
    """Whether ceil_mode would give a last window that starts in the padding behind the input."""
    windows = _windows(place)
    if windows is None or number(place, "ceil_mode") != 1 or same_padding(place):
        return False
    pads = numbers(place, "pads") or [0] * 2 * len(windows)
    if len(pads) != 2 * len(windows):
        return False
    for axis, (size, kernel, stride) in enumerate(windows):
        begin, end = pads[axis], pads[axis + len(windows)]
        if size is not None:
            last = math.ceil((size + begin + end - kernel) / stride) * stride
            if last >= size + begin:
                return True
    return False


def outgrows_stride(place: Place) -> bool:
    """Whether a kernel is larger than its stride, where auto_pad SAME takes the difference off."""
    windows = _windows(place)
    if not same_padding(place) or windows is None or numbers(place, "output_shape"):
        return False
    return any(kernel > stride for _, kernel, stride in windows)
