"""What the modules of this room share: graphs without weights, and how to read them.

A stage works in place on a *light* model and its `constants`: a `ModelProto` whose main graph
has no initializers, and their values by name. Protobuf copies messages at every turn and ends
at 2 GiB; arrays are only passed on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from layerswap.records import Array

# Up to this size a constant's value may matter to shapes.
_SMALL_BYTES = 1_024


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


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute, or `default` where it has none of a known type."""
    for candidate in node.attribute:
        if candidate.name == name and candidate.type != onnx.AttributeProto.UNDEFINED:
            return onnx.helper.get_attribute_value(candidate)
    return default


def replace_all(field: Any, items: Iterable[Any]) -> None:
    """Gives a repeated protobuf field new content."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def lighten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A light copy of a model, and its constants; the model stays as it is."""
    light = without_initializers(model)
    return light, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def complete(light: onnx.ModelProto, constants: Mapping[str, Array]) -> onnx.ModelProto:
    """A model with the constants as its initializers, in their order; copies them all."""
    model = without_initializers(light)
    model.graph.initializer.extend(tensor(name, value) for name, value in constants.items())
    return model


def typed(light: onnx.ModelProto, constants: Mapping[str, Array]) -> onnx.ModelProto:
    """A model as the tools of onnx want it that look at types and shapes, not at weights.

    Small constants, such as axes and shapes, are initializers in it; of the others it knows the
    type and the shape, as inputs.
    """
    small = {name: value for name, value in constants.items() if value.nbytes <= _SMALL_BYTES}
    model = complete(light, small)
    for name, value in constants.items():
        if name not in small:
            dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, dtype, value.shape))
    return model


def tensor(name: str, value: Array) -> onnx.TensorProto:
    """A constant as an initializer."""
    if not is_raw(value):
        return numpy_helper.from_array(value, name)
    result = tensor_header(name, value)
    result.raw_data = raw_bytes(value).tobytes()
    return result


def is_raw(value: Array) -> bool:
    """Whether an initializer holds the value as plain bytes: everything but text."""
    return value.dtype.kind not in "OSU"


def tensor_header(name: str, value: Array) -> onnx.TensorProto:
    """An initializer without its bytes."""
    data_type = helper.np_dtype_to_tensor_dtype(value.dtype.newbyteorder("="))
    return onnx.TensorProto(name=name, data_type=data_type, dims=value.shape)


def raw_bytes(value: Array) -> memoryview:
    """The bytes of an initializer, little endian, in row-major order; a view where possible."""
    portable = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(portable).reshape(-1).view(np.uint8).data


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model; its weights aren't held even for a moment."""
    result = onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        opset_import=model.opset_import,
        metadata_props=model.metadata_props,
    )
    result.graph.name = model.graph.name
    result.graph.node.extend(model.graph.node)
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    return result
