"""Small helpers on ONNX protobufs that several modules of this room share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from layerswap.records import Array


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a loop or branch, in the order of its attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor that a node uses: its inputs, and what its bodies take from outside."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        yield from outer_reads(body)


def outer_reads(body: onnx.GraphProto) -> Iterator[str]:
    """The tensors that a body uses and does not define."""
    own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    for node in body.node:
        own.update(node.output)
    names = [name for node in body.node for name in reads(node)]
    names += [value.name for value in body.output]
    yield from (name for name in names if name not in own)


def use_counts(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read, by a node, a body or as an output."""
    counts = Counter(name for node in graph.node for name in reads(node))
    counts.update(value.name for value in graph.output)
    return counts


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Value of a node's attribute, or `default` where it has none."""
    for candidate in node.attribute:
        if candidate.name == name:
            return onnx.helper.get_attribute_value(candidate)
    return default


def replace_all(field: object, items: Iterable[object]) -> None:
    """Gives a repeated protobuf field new content."""
    kept = list(items)
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]


def tensor(name: str, value: Array) -> onnx.TensorProto:
    """A NumPy array as an initializer."""
    return numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
