"""Rewrites that make a graph faster in one runtime, and only there.

onnxruntime on CPUs keeps the tensors around convolutions in blocks of channels, and takes what
follows a convolution (Relu, Clip, the Add of a residual) into it. GroupNorm leaves the blocks for
its statistics. Two rewrites, both exact, shorten the way there and back:

    InstanceNormalization → Reshape → BatchNormalization(γ, β) → Relu | Clip | Add
      ⇒  ...              → Reshape → Conv(γ, β; 1 × 1, a group for each channel) → ...

    Conv(1 × 1) → Reshape → InstanceNormalization, few channels
      ⇒  Reshape → MatMul → Reshape → InstanceNormalization

The first lets the activation be taken in; the second saves the reordering where a convolution has
too few channels to pay for its blocks. Measured in `docs/performance.md`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper

from layerswap.onnx_graph import graphs
from layerswap.records import Array

# Channels in a block on CPUs with AVX-512; others have blocks of 8.
_BLOCK = 16
_TAKEN_IN = frozenset(("Add", "Clip", "Relu"))
# Above, or with fewer positions, the blocked convolution is faster.
_NARROW, _POSITIONS = 40, 196


def tune_for_onnxruntime(light: onnx.ModelProto, constants: dict[str, Array]) -> None:
    """Applies both rewrites to the main graph.

    Args:
        light: a graph without initializers, GroupNorm written as `portable`; changed in place.
        constants: value of each initializer; extended.
    """
    graph = light.graph
    links = _Links(graph)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            replaced |= _narrow_convolution(node, links, constants)
        elif node.op_type == "BatchNormalization":
            replaced |= _affine(node, links, constants)
    nodes = (replaced.get(node.output[0], [node]) for node in graph.node)
    graphs.replace_all(graph.node, [new for group in nodes for new in group])


TARGETS: Mapping[str, Callable[[onnx.ModelProto, dict[str, Array]], None]] = {
    "onnxruntime": tune_for_onnxruntime,
}


class _Links:
    """Who makes and who reads each tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto | None]] = defaultdict(list)
        for node in graph.node:
            for name in graphs.reads(node):
                self._readers[name].append(node)
        for value in graph.output:
            self._readers[value.name].append(None)

    def maker(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is of that type."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def reader(self, name: str) -> str:
        """Type of the only node that reads a tensor; empty where that is not so."""
        readers = self._readers[name]
        only = readers[0] if len(readers) == 1 else None
        return only.op_type if only is not None else ""


def _affine(
    node: onnx.NodeProto, links: _Links, constants: dict[str, Array]
) -> dict[str, list[onnx.NodeProto]]:
    """The affine of a GroupNorm as a convolution, by the tensor that it makes."""
    x, gamma, beta, mean, variance = node.input
    back = links.maker(x, "Reshape")
    if (
        back is None
        or links.maker(back.input[0], "InstanceNormalization") is None
        or constants.get(mean, np.ones(1)).any()  # a BatchNormalization of the user's
        or (constants.get(variance, np.zeros(1)) != 1).any()
        or graphs.attribute(node, "epsilon", 1e-5) != 0
        or links.reader(node.output[0]) not in _TAKEN_IN
        or gamma not in constants
        or constants[gamma].size % _BLOCK
        or constants.get(back.input[1], np.zeros(0)).size != 4
    ):
        return {}
    channels = constants[gamma].size
    weight = f"{gamma}/depthwise"
    constants[weight] = constants[gamma].reshape(channels, 1, 1, 1)
    made = helper.make_node(
        "Conv",
        [x, weight, beta],
        list(node.output),
        group=channels,
        kernel_shape=[1, 1],
        doc_string=node.doc_string,
    )
    return {node.output[0]: [made]}


def _narrow_convolution(
    norm: onnx.NodeProto, links: _Links, constants: dict[str, Array]
) -> dict[str, list[onnx.NodeProto]]:
    """The convolution before a GroupNorm as a product of matrices, by the tensor that it makes."""
    grouped = links.maker(norm.input[0], "Reshape")
    conv = links.maker(grouped.input[0], "Conv") if grouped is not None else None
    if grouped is None or conv is None or len(conv.input) > 2:
        return {}
    weight, shape = constants.get(conv.input[1]), constants.get(grouped.input[1])
    if weight is None or shape is None or weight.shape[2:] != (1, 1) or shape[-1] < 0:
        return {}
    outputs, inputs = weight.shape[:2]
    positions = int(np.prod(shape[1:])) // outputs
    plain = all(
        set(graphs.attribute(conv, name, [usual])) == {usual}
        for name, usual in (("strides", 1), ("dilations", 1), ("pads", 0))
    )
    if (
        not plain
        or graphs.attribute(conv, "group", 1) != 1
        or graphs.attribute(conv, "auto_pad", b"NOTSET") != b"NOTSET"
        or links.reader(conv.output[0]) != "Reshape"
        or min(outputs, inputs) > _NARROW
        or positions < _POSITIONS
    ):
        return {}
    y = conv.output[0]
    flat, matrix = f"{y}/flat", f"{conv.input[1]}/matrix"
    constants[matrix] = weight.reshape(outputs, inputs)
    constants[f"{flat}/shape"] = np.array([0, inputs, positions], np.int64)
    return {
        y: [
            helper.make_node("Reshape", [conv.input[0], f"{flat}/shape"], [flat]),
            helper.make_node("MatMul", [matrix, flat], [y]),
        ]
    }
