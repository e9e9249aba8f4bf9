"""Finds normalizations that are written out by hand: a division by the root of a variance.

d = √(v + ε),  y = a / d     or a · (1/d), a · (v + ε)^−½, …

v = mean((x − mean(x))²)      safe: the mean is taken off first
v = mean(x²) − mean(x)²       unsafe: both terms are nearly the same where the mean is large
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.views import Place, Scope

_MEANS = ("ReduceMean", "GlobalAveragePool")
# Operators that change nothing of a variance but its shape, or mend one that came out negative.
_PASSING = ("Reshape", "Identity", "Unsqueeze", "Squeeze", "Relu", "Abs")
# How many of these may lie behind each other: a damaged file may hold a circle.
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Variance:
    """The variance that something is divided by the root of.

    Attributes:
        x: name of the tensor whose variance it is.
        epsilon: what is added; 0 where nothing is, None where its value isn't in the file.
        unsafe: whether it is mean(x²) − mean(x)².
        axes: over which it is taken, as the file says them; empty where it doesn't.
    """

    x: str
    epsilon: float | None
    unsafe: bool
    axes: tuple[int, ...] = ()


def find_division(place: Place) -> Variance | None:
    """The variance by whose root an operator divides; None if it does nothing of the kind."""
    if place.is_a("Div"):
        return _under_root(place.scope, place.input(1))
    if place.is_a("Mul"):
        for name in place.node.input:
            maker = place.scope.maker(name)
            if maker is not None and (found := _inverse_root(maker)) is not None:
                return found
    return None


def _inverse_root(maker: Place) -> Variance | None:
    """The variance v of 1/√v or v^−½."""
    if maker.is_a("Reciprocal"):
        return _under_root(maker.scope, maker.input(0))
    if maker.is_a("Pow") and _number(maker.scope, maker.input(1)) == -0.5:
        return _with_epsilon(maker.scope, maker.input(0))
    if maker.is_a("Div") and _number(maker.scope, maker.input(0)) == 1:
        return _under_root(maker.scope, maker.input(1))
    return None


def _under_root(scope: Scope, name: str) -> Variance | None:
    maker = scope.maker(name)
    if maker is None:
        return None
    if maker.is_a("Sqrt") or (maker.is_a("Pow") and _number(scope, maker.input(1)) == 0.5):
        return _with_epsilon(scope, maker.input(0))
    return None


def _with_epsilon(scope: Scope, name: str) -> Variance | None:
    maker = scope.maker(name)
    epsilon: float | None = 0.0
    if maker is not None and maker.is_a("Add", "Max"):
        for own, other in (maker.node.input[:2], maker.node.input[1::-1]):
            if (found := _variance(scope, own)) is not None:
                return replace(found, epsilon=_number(scope, other))
        return None
    if maker is not None and maker.is_a("Clip"):
        name, epsilon = maker.input(0), _number(scope, maker.input(1))
    found = _variance(scope, name)
    return None if found is None else replace(found, epsilon=epsilon)


def _variance(scope: Scope, name: str, depth: int = _DEPTH) -> Variance | None:
    maker = scope.maker(name)
    if maker is None or depth == 0:
        return None
    if maker.is_a(*_PASSING):
        return _variance(scope, maker.input(0), depth - 1)
    if maker.is_a("Max"):
        found = (_variance(scope, name, depth - 1) for name in maker.node.input[:2])
        return next((variance for variance in found if variance is not None), None)
    if maker.is_a("Sub"):
        square, mean = _mean_of_square(scope, maker.input(0)), _square(scope, maker.input(1))
        if square is not None and mean is not None and _mean(scope, mean) == square:
            return Variance(square, 0.0, True, _axes(scope, maker.input(0)))
        return None
    centred = _mean_of_square(scope, name)
    difference = scope.maker(centred) if centred is not None else None
    if difference is None or not difference.is_a("Sub"):
        return None
    x = difference.input(0)
    if _mean(scope, difference.input(1)) != x:
        return None
    return Variance(x, 0.0, False, _axes(scope, name))


def _mean_of_square(scope: Scope, name: str) -> str | None:
    inner = _mean(scope, name)
    return None if inner is None else _square(scope, inner)


def _mean(scope: Scope, name: str) -> str | None:
    """What a tensor is the mean of, perhaps in another shape."""
    maker = _averaging(scope, name)
    return None if maker is None else maker.input(0)


def _averaging(scope: Scope, name: str) -> Place | None:
    maker = scope.maker(name)
    if maker is not None and maker.is_a(*_PASSING[:4]):
        maker = scope.maker(maker.input(0))
    return maker if maker is not None and maker.is_a(*_MEANS) else None


def _axes(scope: Scope, name: str) -> tuple[int, ...]:
    """The axes over which a mean is taken."""
    maker = _averaging(scope, name)
    if maker is None or not maker.is_a("ReduceMean"):
        return ()
    said = attribute(maker.node, "axes")  # an input from opset 18 on
    if said is None:
        said = scope.array(maker.input(1))
    return () if said is None else tuple(int(axis) for axis in np.ravel(said))


def _square(scope: Scope, name: str) -> str | None:
    """What a tensor is the square of."""
    maker = scope.maker(name)
    if maker is None:
        return None
    if maker.is_a("Mul") and maker.input(0) == maker.input(1):
        return maker.input(0)
    if maker.is_a("Pow") and _number(scope, maker.input(1)) == 2:
        return maker.input(0)
    return None


def _number(scope: Scope, name: str) -> float | None:
    value = scope.array(name)
    if value is None or value.size != 1 or value.dtype.kind not in "fiu":
        return None
    return float(np.asarray(value).reshape(()))
