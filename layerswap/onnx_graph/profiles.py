"""How a GroupNormalization is spelled in standard operators: one profile for each purpose.

N samples, C channels in G groups, L values in each group of a sample:

    portable    x → Reshape [N, G, L] → InstanceNormalization(1, 0, ε) → Reshape [N, C, …]
                  → BatchNormalization(γ, β, mean 0, variance 1, ε 0)
    plain       the same with Mul(γ) → Add(β) at its end: no BatchNormalization in the file
    precise     the same as `portable`, with ReduceMean → Sub before InstanceNormalization
    primitive   Reshape → ReduceMean → Sub → Mul → ReduceMean → Add(ε) → Sqrt → Div → Reshape
                  → Mul(γ) → Add(β): for runtimes with arithmetic and nothing else
    native      GroupNormalization

InstanceNormalization over [N, G, L] takes exactly a group's mean and variance. A runtime rounds
that mean to float32, and the error reaches the result in units of the standard deviation. Worse,
some take the variance as mean(x²) − mean(x)²: OpenCV there, onnxruntime up to 1.23 in
LayerNormalization, and whoever follows ONNX's definition of GroupNormalization. But a shift of x
changes nothing. `precise` takes a first mean off, a nearly exact subtraction, and what is left of
the mean is too small to do harm in either way.

Where each channel is a group of its own, InstanceNormalization takes γ and β itself. γ that is 1
and β that is 0 are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from layerswap.records import Array

# From here on the axes of ReduceMean are an input.
_AXES_INPUT_OPSET = 18
# From here on BatchNormalization says itself whether it is training.
_TRAINING_MODE_OPSET = 14


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """One GroupNorm node, read.

    Attributes:
        x, gamma, beta, y: tensor names; x and y are float32, channels first.
        groups: number of groups.
        channels: size of axis 1.
        epsilon: added to each group's variance.
        shape: axes of x, −1 where they aren't fixed.
        path: the Keras layer, for messages.
    """

    x: str
    gamma: str
    beta: str
    y: str
    groups: int
    channels: int
    epsilon: float
    shape: tuple[int, ...]
    path: str

    @property
    def rank(self) -> int:
        """Number of axes of x."""
        return len(self.shape)

    @property
    def length(self) -> int:
        """How many values of a sample a group has; −1 where that isn't fixed."""
        spatial = self.shape[2:]
        return -1 if -1 in spatial else self.channels // self.groups * math.prod(spatial)


class Constants:
    """Values that the new nodes read, each stored once.

    Args:
        values: constants of the main graph by name; extended.
    """

    def __init__(self, values: dict[str, Array]) -> None:
        self._values = values
        self._names: dict[tuple[object, ...], str] = {}

    def add(self, value: Array) -> str:
        """Name of a constant of this value."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._names:
            number = len(self._names)
            while (name := f"layerswap/constant{number}") in self._values:
                number += 1
            self._names[key] = name
            self._values[name] = value
        return self._names[key]


@dataclass(slots=True)
class Writer:
    """Writes the nodes that replace one GroupNorm node.

    Attributes:
        norm: what to compute.
        opset: version of the operators to write.
        visible: value of each constant that the node can see.
        constants: takes the constants that the new nodes read.
        nodes: those written so far; the last one gives the result.
    """

    norm: GroupNorm
    opset: int
    visible: Mapping[str, Array]
    constants: Constants
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Writes a node; returns the name of its output."""
        output = f"{self.norm.y}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def full(self, size: int, value: float) -> str:
        """Name of a float32 vector of `size` times `value`."""
        return self.constants.add(np.full(size, value, np.float32))

    def integers(self, *values: int) -> str:
        """Name of an int64 vector."""
        return self.constants.add(np.array(values, np.int64))

    def grouped(self) -> str:
        """x as [N, G, L]."""
        # Zero keeps the batch axis as it is. −1 is only for where it must be: runtimes can't
        # tell its size in an empty batch.
        shape = self.integers(0, self.norm.groups, self.norm.length)
        return self.node("Reshape", self.norm.x, shape)

    def restored(self, x: str) -> str:
        """[N, G, L] in the shape of the input."""
        spatial = self.norm.shape[2:]
        if spatial.count(-1) > 1:
            return self.node("Reshape", x, self.node("Shape", self.norm.x))
        return self.node("Reshape", x, self.integers(0, self.norm.channels, *spatial))

    def mean(self, x: str, axes: range) -> str:
        """Mean over axes, which stay with size 1."""
        if self.opset < _AXES_INPUT_OPSET:
            return self.node("ReduceMean", x, axes=list(axes))
        return self.node("ReduceMean", x, self.integers(*axes))

    def batch_norm(self, x: str) -> str:
        """γ·x + β as the one operator that runtimes have for it."""
        norm = self.norm
        if self._is_all(norm.gamma, 1.0) and self._is_all(norm.beta, 0.0):
            return x
        inputs = (x, norm.gamma, norm.beta, self.full(norm.channels, 0.0))
        # Inference doesn't use it; below opset 14 onnx's own evaluator does.
        unused = {"momentum": 1.0} if self.opset < _TRAINING_MODE_OPSET else {}
        one = self.full(norm.channels, 1.0)
        return self.node("BatchNormalization", *inputs, one, epsilon=0.0, **unused)

    def multiply_add(self, x: str, shape: tuple[int, ...] = ()) -> str:
        """γ·x + β as arithmetic; γ and β in `shape`, or else along axis 1."""
        shape = shape or (self.norm.channels, *[1] * (self.norm.rank - 2))
        if not self._is_all(self.norm.gamma, 1.0):
            x = self.node("Mul", x, self._reshaped(self.norm.gamma, shape))
        if not self._is_all(self.norm.beta, 0.0):
            x = self.node("Add", x, self._reshaped(self.norm.beta, shape))
        return x

    def _is_all(self, name: str, value: float) -> bool:
        return name in self.visible and bool((self.visible[name] == value).all())

    def _reshaped(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return name
        if name in self.visible:
            return self.constants.add(self.visible[name].reshape(shape))
        return self.node("Reshape", name, self.integers(*shape))


def portable(writer: Writer) -> None:
    """What runs fast everywhere."""
    _instance_norm(writer, writer.batch_norm)


def plain(writer: Writer) -> None:
    """`portable` for a file that must not hold a BatchNormalization operator."""
    norm = writer.norm
    if norm.rank > 2:
        _instance_norm(writer, writer.multiply_add)
        return
    # With the affine behind the second Reshape OpenCV puts an operator of its own in the place of
    # all, and that one has no rank 2.
    shape = (norm.groups, norm.length)
    _instance_norm(writer, lambda x: writer.multiply_add(x, shape), affine_first=True)


def precise(writer: Writer) -> None:
    """As exact as float32 allows, whatever the mean of the input."""
    _instance_norm(writer, writer.batch_norm, centred=True)


def primitive(writer: Writer) -> None:
    """Arithmetic and means; the variance is the mean of the squared distances to the mean."""
    norm = writer.norm
    flat = norm.groups > 1 and not _has_channels_apart(norm)
    if flat:
        x, axes = writer.grouped(), range(2, 3)
    else:
        x, axes = norm.x, range(1 if norm.groups == 1 else 2, norm.rank)
    centred = writer.node("Sub", x, writer.mean(x, axes))
    variance = writer.mean(writer.node("Mul", centred, centred), axes)
    epsilon = writer.constants.add(np.array(norm.epsilon, np.float32))
    deviation = writer.node("Sqrt", writer.node("Add", variance, epsilon))
    normal = writer.node("Div", centred, deviation)
    writer.multiply_add(writer.restored(normal) if flat else normal)


def native(writer: Writer) -> None:
    """ONNX's own operator: its definition takes the variance as mean(x²) − mean(x)².

    It loses most digits where the mean is some 1000 times the standard deviation, fails on an
    empty batch, and onnx infers no shape behind it.
    """
    norm = writer.norm
    x = norm.x
    if norm.rank == 2:
        x = writer.node("Unsqueeze", x, writer.integers(2))
    y = writer.node(
        "GroupNormalization",
        *(x, norm.gamma, norm.beta),
        epsilon=norm.epsilon,
        num_groups=norm.groups,
    )
    if norm.rank == 2:
        writer.node("Squeeze", y, writer.integers(2))


Profile = Callable[[Writer], None]
PROFILES: Mapping[str, Profile] = {
    "portable": portable,
    "plain": plain,
    "precise": precise,
    "primitive": primitive,
    "native": native,
}


def _instance_norm(
    writer: Writer,
    affine: Callable[[str], str],
    *,
    affine_first: bool = False,
    centred: bool = False,
) -> None:
    """InstanceNormalization over [N, G, L].

    Args:
        writer: takes the nodes.
        affine: writes γ·x + β.
        affine_first: whether that goes before the Reshape to the input's shape.
        centred: whether to take off the mean beforehand.
    """
    norm = writer.norm
    as_is = _has_channels_apart(norm)
    x, rank = (norm.x, norm.rank) if as_is else (writer.grouped(), 3)
    if centred:
        x = writer.node("Sub", x, writer.mean(x, range(2, rank)))
    own_affine = norm.groups == norm.channels
    scale = norm.gamma if own_affine else writer.full(norm.groups, 1.0)
    shift = norm.beta if own_affine else writer.full(norm.groups, 0.0)
    y = writer.node("InstanceNormalization", x, scale, shift, epsilon=norm.epsilon)
    if affine_first and not own_affine:
        y = affine(y)
    if not as_is:
        y = writer.restored(y)
    if not affine_first and not own_affine:
        affine(y)


def _has_channels_apart(norm: GroupNorm) -> bool:
    """Whether the axes behind the channels are exactly those of a group."""
    return norm.groups == norm.channels and norm.rank > 2
