"""Puts the weights into a graph as initializers, in the layout that the operators want.

A Keras kernel reaches its convolution through Transpose, Reshape and Cast nodes; what hangs on
weights alone is computed here once. A BatchNormalization behind a convolution goes into its
weights:

    a  = γ / √(v + ε)
    W' = W · a            (per output channel)
    b' = (b − μ) · a + β
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.records import Array

# Cheap and exact, or arithmetic that a model does on its own weights (weight standardisation).
_LAYOUT = frozenset(
    ("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Squeeze")
) | {"Transpose", "Unsqueeze"}
_ARITHMETIC = frozenset(
    ("Add", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "ReduceMean", "ReduceSum")
) | {"Sqrt", "Sub"}
_FOLDABLE = _LAYOUT | _ARITHMETIC
# A result this many times larger than its inputs would only swell the file.
_MAX_GROWTH = 4


def attach(
    light: onnx.ModelProto, constants: dict[str, Array], arrays: Mapping[str, Array]
) -> None:
    """Moves `arrays` from the graph's inputs to its constants, and settles what hangs on them.

    Args:
        light: a graph in topological order, without initializers; changed in place.
        constants: value of each initializer; extended.
        arrays: value of each graph input that stands for a weight.

    Raises:
        ExportError: an array's placeholder has another shape or type.
    """
    graph = light.graph
    _check_placeholders(graph, arrays)
    graphs.replace_all(graph.input, [v for v in graph.input if v.name not in arrays])
    constants.update(arrays)
    _fold_constants(light, constants)
    _fold_batch_norms(graph, constants)


def _check_placeholders(graph: onnx.GraphProto, arrays: Mapping[str, Array]) -> None:
    for value in graph.input:
        if value.name not in arrays:
            continue
        tensor_type, array = value.type.tensor_type, arrays[value.name]
        shape = tuple(d.dim_value for d in tensor_type.shape.dim)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        if shape != array.shape or tensor_type.elem_type != dtype:
            raise ExportError(
                f"the weight has shape {array.shape} and type {array.dtype}, "
                f"the graph expects {shape} and "
                f"{onnx.TensorProto.DataType.Name(tensor_type.elem_type)}",
                where=value.name,
            )


def _fold_constants(model: onnx.ModelProto, constants: dict[str, Array]) -> None:
    """Computes the nodes that hang on constants alone; extends `constants`."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    known: dict[tuple[object, ...], Array] = {}
    kept = []
    for node in graph.node:
        if (
            node.domain
            or node.op_type not in _FOLDABLE
            or outputs.intersection(node.output)
            or not all(name in constants for name in node.input if name)
        ):
            kept.append(node)
            continue
        inputs = {name: constants[name] for name in node.input if name}
        # Tied weights come through equal nodes, and stay one array.
        settings = tuple(sorted(a.SerializeToString() for a in node.attribute))
        key = (node.op_type, settings, *(id(constants.get(name)) for name in node.input))
        if key not in known:
            known[key] = _evaluate(node, inputs, model)
        if known[key].size > _MAX_GROWTH * max(sum(a.size for a in inputs.values()), 64):
            kept.append(node)
        else:
            constants[node.output[0]] = known[key]
    graphs.replace_all(graph.node, kept)


def _evaluate(node: onnx.NodeProto, inputs: Mapping[str, Array], model: onnx.ModelProto) -> Array:
    one = helper.make_graph(
        [node],
        "constant",
        [onnx.ValueInfoProto(name=name) for name in inputs],
        [onnx.ValueInfoProto(name=node.output[0])],
    )
    single = helper.make_model(one, opset_imports=model.opset_import)
    single.ir_version = model.ir_version
    (value,) = ReferenceEvaluator(single).run(None, dict(inputs))
    result: Array = np.asarray(value)
    return result


def _fold_batch_norms(graph: onnx.GraphProto, constants: dict[str, Array]) -> None:
    """Multiplies each BatchNormalization into the convolution that alone feeds it."""
    uses = graphs.use_counts(graph)
    producers = {name: node for node in graph.node for name in node.output}
    folded = set()
    for position, node in enumerate(graph.node):
        conv = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if (
            conv is None
            or conv.op_type not in ("Conv", "ConvTranspose")
            or uses[conv.output[0]] != 1
            or any(uses[name] for name in node.output[1:])
            or not all(name in constants for name in (*conv.input[1:], *node.input[1:]))
        ):
            continue
        weight = constants[conv.input[1]]
        channel_axis = 0 if conv.op_type == "Conv" else 1
        grouped = graphs.attribute(conv, "group", 1) != 1
        if weight.dtype != np.float32 or (channel_axis == 1 and grouped):
            continue
        gamma, beta, mean, variance = (constants[n].astype(np.float64) for n in node.input[1:])
        epsilon = graphs.attribute(node, "epsilon", 1e-5)
        slope = gamma / np.sqrt(variance + epsilon)
        bias = constants[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else 0.0
        across: list[int] = [1] * weight.ndim
        across[channel_axis] = -1
        names = [f"{node.output[0]}/weight", f"{node.output[0]}/bias"]
        constants[names[0]] = (weight * slope.reshape(across)).astype(np.float32)
        constants[names[1]] = ((bias - mean) * slope + beta).astype(np.float32)
        graphs.replace_all(conv.input, [conv.input[0], *names])
        conv.output[0] = node.output[0]
        producers[node.output[0]] = conv
        folded.add(position)
    graphs.replace_all(graph.node, [n for i, n in enumerate(graph.node) if i not in folded])
