"""Finds the normalizations of a graph, whatever operators they are spelled in.

A GroupNormalization of G groups is one of

    InstanceNormalization of G channels, behind Reshape [N, G, …] (and Sub of a first mean)
    GroupNormalization
    (x − mean) / √(variance + ε) by hand, behind Reshape [N, G, …]
    com.microsoft.GroupNorm and its relatives

A BatchNormalization with constant mean 0, variance 1 and ε 0 computes γ·x + β. Behind an
InstanceNormalization it is the affine of a decomposed GroupNormalization; `profiles` writes it.
One behind Reshape [1, −1, …], whose mean is computed from its own input, is a LayerNormalization as
tf_keras has it computed: its channels are the rows of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.variances import Variance, find_division
from layerswap.onnx_graph.views import STANDARD, GraphView, Place, Shape
from layerswap.records import LayerRecord

# By name, since every vendor has its own; LRN normalises, too.
_NORMALIZES = ("Norm", "LRN")
# The epsilon of an operator that has none in the file, as its definition gives it.
_EPSILONS = {
    "BatchNormalization": 1e-5,
    "GroupNormalization": 1e-5,
    "InstanceNormalization": 1e-5,
    "LayerNormalization": 1e-5,
    "RMSNormalization": 1e-5,
    "GroupNorm": 1e-5,
    "SkipGroupNorm": 1e-5,
}
_MICROSOFT = "com.microsoft"
# scikit-learn's operators: what they call a Normalizer scales rows of features.
_LEARNING = "ai.onnx.ml"
# From here on GroupNormalization has a γ for each channel; before, for each group.
_SCALE_PER_CHANNEL_OPSET = 21
# From here on training_mode says whether a BatchNormalization trains; from here on is_test doesn't.
_TRAINING_MODE_OPSET = 14
_NO_IS_TEST_OPSET = 7

# What may come between a normalization and the Reshape back, and how much of it.
_AFFINE = ("Add", "BatchNormalization", "Cast", "Identity", "Mul", "Sub")
_AFFINE_STEPS = 5

Kind = Literal["batch", "affine", "group", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A normalization of the graph.

    Attributes:
        kind: "batch" takes statistics of whole batches, "affine" is a BatchNormalization that
            only multiplies and adds, "group" a GroupNormalization however it is spelled.
        record: where it is, with groups and epsilon.
        place: the operator that divides by the standard deviation.
        gamma: name of its γ, empty where it has none that is a tensor.
        variance: how its variance is computed, where that is written by hand.
    """

    kind: Kind
    record: LayerRecord
    place: Place
    gamma: str = ""
    variance: Variance | None = None


def find_norms(view: GraphView) -> list[Norm]:
    """Every normalization of a graph, in the order of its operators."""
    return [norm for place in view.places for norm in _read(place)]


def _read(place: Place) -> Iterator[Norm]:
    op_type, domain = place.node.op_type, place.node.domain
    if place.is_a("BatchNormalization"):
        kind: Kind = "other" if _has_own_statistics(place) else "batch"
        if _is_affine(place):
            kind = "affine"
        yield Norm(kind, _described(place), place, place.input(1))
    elif place.is_a("InstanceNormalization"):
        yield _instance_norm(place)
    elif place.is_a("GroupNormalization"):
        yield _group_norm(place)
    elif domain == _MICROSOFT and op_type in ("GroupNorm", "SkipGroupNorm"):
        channels = _length(place, place.input(1))
        groups = _integer(attribute(place.node, "groups"))
        record = _described(place, channels=channels, groups=groups)
        yield Norm("group", record, place, place.input(1))
    elif any(part in op_type for part in _NORMALIZES) and domain != _LEARNING:
        gamma = place.input(1) if place.is_a("LayerNormalization", "RMSNormalization") else ""
        yield Norm("other", _described(place), place, gamma)
    elif domain in STANDARD and (variance := find_division(place)) is not None:
        yield _by_hand(place, variance)


def _described(
    place: Place,
    *,
    channels: int | None = None,
    groups: int | None = None,
    elements: int | None = None,
) -> LayerRecord:
    default = _EPSILONS.get(place.node.op_type)
    epsilon = attribute(place.node, "epsilon", default)
    return replace(
        place.record,
        channels=channels,
        groups=groups,
        elements=elements,
        epsilon=float(epsilon) if isinstance(epsilon, int | float) else None,
        dtype=place.scope.dtype(place.input(0)),
    )


def _instance_norm(place: Place) -> Norm:
    scope = place.scope
    groups = _length(place, place.input(1))
    shape = scope.shape(place.input(0))
    elements = _product(shape[2:]) if shape else None
    reshape = _reshape_before(place.input(0), place)
    if reshape is None:  # each channel is a group of its own
        record = _described(place, channels=groups, groups=groups, elements=elements)
        return Norm("group", record, place, place.input(1))
    groups = groups or _grouping(reshape)
    outside = scope.shape(reshape.input(0)) or ()
    if not _returns(place, outside):  # the Reshape is another layer's: no groups of channels
        record = _described(place, channels=groups, groups=groups, elements=elements)
        return Norm("group", record, place, place.input(1))
    groups = _per_sample(groups, reshape, outside)
    affine, gamma = _affine_behind(place)
    channels = affine or (outside[1] if len(outside) > 1 else None)
    if elements is None and groups and (whole := _product(outside[1:])) and len(outside) > 1:
        elements = whole // groups
    record = _described(place, channels=channels, groups=groups, elements=elements)
    return Norm("group", record, place, gamma)


def _group_norm(place: Place) -> Norm:
    shape = place.scope.shape(place.input(0))
    channels = shape[1] if shape and len(shape) > 1 else None
    if channels is None and place.opset >= _SCALE_PER_CHANNEL_OPSET:
        channels = _length(place, place.input(1))
    groups = _integer(attribute(place.node, "num_groups"))
    elements = None
    if shape and channels and groups and groups > 0 and (rest := _product(shape[2:])) is not None:
        elements = channels * rest // groups
    record = _described(place, channels=channels, groups=groups, elements=elements)
    return Norm("group", record, place, place.input(1))


def _by_hand(place: Place, variance: Variance) -> Norm:
    scope = place.scope
    record = replace(place.record, epsilon=variance.epsilon, dtype=scope.dtype(variance.x))
    reshape = _reshape_before(variance.x, place)
    outside = (scope.shape(reshape.input(0)) if reshape is not None else None) or ()
    found = _grouped_by_hand(reshape, variance.axes, outside) if reshape is not None else None
    # The rows of a LayerNormalization look alike, but are no part of the channels.
    if found is None or (found[1] and found[1] % found[0]) or not _returns(place, outside):
        return Norm("other", record, place, variance=variance)
    groups, channels = found
    whole = _product(outside[1:])
    record = replace(
        record,
        groups=groups,
        channels=channels,
        elements=whole // groups if whole and len(outside) > 1 else None,
    )
    return Norm("group", record, place, variance=variance)


def _grouped_by_hand(
    reshape: Place, axes: tuple[int, ...], outside: Shape
) -> tuple[int, int | None] | None:
    """Groups and channels of [N, G, …], or [N, …, G, C/G], whose means are over all but N and G."""
    shape = reshape.scope.array(reshape.input(1))
    if shape is None or shape.ndim != 1 or shape.size < 3 or shape.dtype.kind not in "iu":
        return None
    rank = shape.size
    over = {axis % rank for axis in axes}
    for index, channel in ((1, 1), (rank - 2, -1)):
        if over == set(range(1, rank)) - {index}:
            groups = _positive(int(shape[index]))
            if groups is None:
                return None
            return groups, outside[channel] if len(outside) > 1 else None
    return None


def _per_sample(groups: int | None, reshape: Place, outside: Shape) -> int | None:
    """The groups of one sample, where [N, C, …] became [1, N · G, …]."""
    shape, samples = reshape.scope.array(reshape.input(1)), outside[0] if outside else None
    if not groups or not samples or shape is None or shape.ndim != 1 or not shape.size:
        return groups
    return groups // samples if shape[0] == 1 and groups % samples == 0 else groups


def _returns(place: Place, outside: Shape) -> bool:
    """Whether a result gets the shape back that a Reshape before it took, as far as is known."""
    scope, names = place.scope, set(place.node.output)
    for _ in range(_AFFINE_STEPS):
        users = [user for name in sorted(names) for user in scope.users(name)]
        backs = [user for user in users if user.is_a("Reshape") and user.input(0) in names]
        if backs:
            shapes = [scope.shape(next(iter(back.node.output), "")) for back in backs]
            return any(shape is None or _alike(shape, outside) for shape in shapes)
        names = {n for user in users if user.is_a(*_AFFINE) for n in user.node.output if n}
    return False


def _alike(shape: Shape, outside: Shape) -> bool:
    """Whether two shapes may be one; empty is unknown."""
    if not outside or len(shape) != len(outside):
        return not outside
    return all(
        one == other or None in (one, other) for one, other in zip(shape, outside, strict=True)
    )


def _reshape_before(name: str, place: Place) -> Place | None:
    """The Reshape that makes groups of channels, perhaps with a first mean taken off."""
    maker = place.scope.maker(name)
    if maker is not None and maker.is_a("Sub"):
        maker = place.scope.maker(maker.input(0))
    return maker if maker is not None and maker.is_a("Reshape") else None


def _grouping(reshape: Place) -> int | None:
    """G of a Reshape to [N, G, …], where it says it."""
    shape = reshape.scope.array(reshape.input(1))
    if shape is None or shape.ndim != 1 or shape.size < 3 or shape.dtype.kind not in "iu":
        return None
    return _positive(int(shape[1]))


def _affine_behind(place: Place) -> tuple[int | None, str]:
    """Number of channels and name of the γ behind an InstanceNormalization."""
    scope, name = place.scope, next(iter(place.node.output), "")
    for _ in range(2):  # the Reshape back comes before the affine, or after it
        for user in scope.users(name):
            if user.is_a("BatchNormalization") and user.input(0) == name:
                return _length(user, user.input(1)), user.input(1)
            if user.is_a("Mul"):
                gamma = next((n for n in user.node.input if n != name), "")
                shape = scope.shape(gamma)
                if shape and (size := _product(shape)) and size > 1:
                    return size, gamma
        reshape = next((u for u in scope.users(name) if u.is_a("Reshape")), None)
        if reshape is None or reshape.input(0) != name:
            break
        name = next(iter(reshape.node.output), "")
    return None, ""


def is_behind_instance_norm(place: Place) -> bool:
    """Whether an operator takes what an InstanceNormalization gives, through the Reshape back."""
    reshape = place.scope.maker(place.input(0))
    if reshape is None or not reshape.is_a("Reshape"):
        return False
    maker = reshape.scope.maker(reshape.input(0))
    return maker is not None and maker.is_a("InstanceNormalization")


def _is_affine(place: Place) -> bool:
    """Whether it computes γ·x + β whatever comes."""
    node = place.node
    if len(node.input) != 5 or _trains(place):
        return False
    mean, variance = (place.scope.array(name) for name in node.input[3:])
    return (
        attribute(node, "epsilon", 1e-5) == 0
        and mean is not None
        and variance is not None
        and bool(np.all(mean == 0))
        and bool(np.all(variance == 1))
    )


def _trains(place: Place) -> bool:
    """Whether a BatchNormalization takes the statistics of the batch that comes."""
    if place.opset >= _TRAINING_MODE_OPSET:
        return bool(attribute(place.node, "training_mode", 0))
    # Before, it was said by the number of outputs, and up to opset 6 by is_test, too.
    return len(list(filter(None, place.node.output))) > 1 or (
        place.opset < _NO_IS_TEST_OPSET and not attribute(place.node, "is_test", 0)
    )


def _has_own_statistics(place: Place) -> bool:
    """Whether each of its channels is a row of one sample, normalised by its own mean."""
    scope, x = place.scope, place.input(0)
    reshape = scope.maker(x)
    shape = scope.array(reshape.input(1)) if reshape and reshape.is_a("Reshape") else None
    if shape is None or shape.ndim != 1 or list(shape[:2]) != [1, -1]:
        return False
    mean, variance = scope.maker(place.input(3)), scope.maker(place.input(4))
    if mean is not None and mean.is_a("Squeeze", "Reshape"):
        mean = scope.maker(mean.input(0))
    computed = variance is not None and not variance.is_a("Constant")
    return computed and mean is not None and mean.is_a("ReduceMean") and mean.input(0) == x


def _length(place: Place, name: str) -> int | None:
    shape = place.scope.shape(name)
    return _positive(shape[0]) if shape is not None and len(shape) == 1 else None


def _product(shape: tuple[int | None, ...]) -> int | None:
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
