"""How far two weights are apart, from pieces of them: never more than a piece is copied."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from layerswap.records import Array

# Elements converted to float64 at a time.
PIECE = 1 << 20


def pieces(first: Array, second: Array) -> Iterable[tuple[Array, Array]]:
    """Two arrays of one size, cut in the same places."""
    one, other = first.reshape(-1), second.reshape(-1)
    for start in range(0, one.size, PIECE):
        yield one[start : start + PIECE], other[start : start + PIECE]


def compare(parts: Iterable[tuple[Array, Array]]) -> dict[str, float]:
    """The norms of a `Difference`, in float64; empty where nothing differs.

    Args:
        parts: pieces of the two weights, of the same sizes. NaN is equal to NaN.
    """
    before = after = difference = largest = 0.0
    equal = True
    for first, second in parts:
        if first.tobytes() == second.tobytes():
            before += (squares := _squares(widened(first)))
            after += squares
            continue
        one, other = widened(first), widened(second)
        equal = equal and np.array_equal(one, other, equal_nan=True)
        with np.errstate(invalid="ignore", over="ignore"):
            change = other - one
        before += _squares(one)
        after += _squares(other)
        difference += _squares(change)
        # max() would lose NaN.
        largest = float(np.maximum(largest, np.abs(change).max()))
    if equal:
        return {}
    norm, distance = math.sqrt(before), math.sqrt(difference)
    return {
        "before": norm,
        "after": math.sqrt(after),
        "difference": distance,
        "relative": distance / norm if norm else math.inf,
        "largest": largest,
    }


def widened(part: Array) -> Array:
    """The same in a type that NumPy computes with: float64, or complex128."""
    if part.dtype.type is np.void:  # two bytes: HDF5 keeps bfloat16 so, the upper half of float32
        part = (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return part.astype(np.complex128 if part.dtype.kind == "c" else np.float64)


def _squares(part: Array) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.vdot(part, part).real)
