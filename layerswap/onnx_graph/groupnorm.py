"""GroupNorm nodes → standard operators, in the form that runtimes run right and fast.

`portable`, every runtime with opset 13 or later:

    x [N, C, …] → Reshape [0, G, −1] → InstanceNormalization(1, 0, ε) → Reshape [0, C, …]
                → BatchNormalization(γ, β, mean 0, variance 1, ε 0)

InstanceNormalization over [N, G, rest] takes exactly a group's mean and variance; the
BatchNormalization with trivial statistics is the per-channel affine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.records import Array

DOMAIN = "layerswap"
OP_TYPE = "GroupNorm"


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """One GroupNorm node, read.

    Attributes:
        x, gamma, beta, y: tensor names; x and y are channels first.
        groups: number of groups.
        channels: size of axis 1.
        epsilon: added to each group's variance.
        shape: axes of x, −1 where they aren't fixed; empty when nothing is known.
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


class Vectors:
    """Constants that the new nodes need, each stored once."""

    def __init__(self, constants: dict[str, Array]) -> None:
        self._constants = constants

    def full(self, size: int, value: float) -> str:
        """Name of a float32 vector of `size` times `value`."""
        return self._add(f"full/{size}x{value:g}", np.full(size, value, np.float32))

    def integers(self, *values: int) -> str:
        """Name of an int64 vector."""
        return self._add("integers/" + "_".join(map(str, values)), np.array(values, np.int64))

    def _add(self, key: str, value: Array) -> str:
        name = f"{DOMAIN}/{key}"
        self._constants.setdefault(name, value)
        return name


Profile = Callable[[GroupNorm, Vectors], list[onnx.NodeProto]]


def portable(norm: GroupNorm, vectors: Vectors) -> list[onnx.NodeProto]:
    """Four nodes where at most one axis besides the batch is dynamic, else five.

    Args:
        norm: the node to replace.
        vectors: takes the constants that the new nodes read.
    """
    flat, normal, restored = (f"{norm.y}/{part}" for part in ("flat", "normal", "restored"))
    grouped = vectors.integers(0, norm.groups, -1)
    ones, zeros = vectors.full(norm.groups, 1.0), vectors.full(norm.groups, 0.0)
    one, zero = vectors.full(norm.channels, 1.0), vectors.full(norm.channels, 0.0)
    nodes: list[onnx.NodeProto] = []
    if norm.shape and norm.shape[1:].count(-1) <= 1:
        # Zero keeps the batch axis as it is, whatever it is; −1 is the one unknown axis.
        back = vectors.integers(0, norm.channels, *norm.shape[2:])
    else:
        back = f"{norm.y}/shape"
        nodes.append(helper.make_node("Shape", [norm.x], [back]))
    return [
        *nodes,
        helper.make_node("Reshape", [norm.x, grouped], [flat]),
        helper.make_node(
            "InstanceNormalization", [flat, ones, zeros], [normal], epsilon=norm.epsilon
        ),
        helper.make_node("Reshape", [normal, back], [restored]),
        helper.make_node(
            "BatchNormalization",
            [restored, norm.gamma, norm.beta, zero, one],
            [norm.y],
            epsilon=0.0,
            doc_string=norm.path,
        ),
    ]


PROFILES: Mapping[str, Profile] = {"portable": portable}


def expand(
    light: onnx.ModelProto, constants: dict[str, Array], *, profile: str = "portable"
) -> None:
    """Replaces every GroupNorm node, those in loop bodies and branches as well.

    Args:
        light: a graph without initializers; changed in place.
        constants: value of each initializer; extended.
        profile: a key of `PROFILES`.

    Raises:
        ExportError: the profile is unknown, or a node's channels don't divide by its groups.
    """
    if profile not in PROFILES:
        raise ExportError(f"unknown profile '{profile}'; there is {', '.join(PROFILES)}")
    _expand_graph(light.graph, PROFILES[profile], Vectors(constants))


def _expand_graph(graph: onnx.GraphProto, profile: Profile, vectors: Vectors) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for body in graphs.subgraphs(node):
            _expand_graph(body, profile, vectors)
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            nodes += profile(_read(node), vectors)
        else:
            nodes.append(node)
    graphs.replace_all(graph.node, nodes)


def _read(node: onnx.NodeProto) -> GroupNorm:
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    path = settings.get("path", b"").decode()
    groups, channels = int(settings["groups"]), int(settings["channels"])
    if groups < 1 or channels % groups:
        raise ExportError(f"{channels} channels don't divide into {groups} groups", where=path)
    x, gamma, beta = node.input
    shape = tuple(int(n) for n in settings.get("shape", ()))
    epsilon = float(settings["epsilon"])
    return GroupNorm(x, gamma, beta, node.output[0], groups, channels, epsilon, shape, path)
