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
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.records import Array

# Cheap and exact, or arithmetic that a model does on its own weights (weight standardisation).
_FOLDABLE = frozenset(
    "Add Cast Div Expand Flatten Gather Identity Mul Neg Pow Reciprocal ReduceMean ReduceSum "
    "Reshape Slice Sqrt Squeeze Sub Transpose Unsqueeze".split()
)
# Those that take their axes as an input.
_REDUCTIONS = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"))
# A result this many times larger than its inputs would only swell the file.
_MAX_GROWTH = 4


def attach(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with `arrays` as initializers instead of graph inputs.

    Args:
        model: a graph in topological order; not changed.
        arrays: value of each graph input that stands for a weight.

    Raises:
        ExportError: an array's placeholder has another shape or type.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    _check_placeholders(graph, arrays)
    graphs.replace_all(graph.input, [v for v in graph.input if v.name not in arrays])
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer} | dict(arrays)
    _fold_constants(result, constants)
    _fold_batch_norms(graph, constants)
    _reduce_in_place(graph, constants)
    used = graphs.use_counts(graph)
    graphs.replace_all(
        graph.initializer, [graphs.tensor(n, v) for n, v in constants.items() if used[n]]
    )
    return result


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
    known: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if (
            node.domain
            or node.op_type not in _FOLDABLE
            or outputs.intersection(node.output)
            or not all(name in constants for name in node.input if name)
        ):
            kept.append(node)
            continue
        # Tied weights come through equal nodes, and stay one array.
        settings = tuple(a.SerializeToString() for a in sorted(node.attribute, key=_name))
        key = (node.op_type, settings, *node.input)
        if key in known:
            renamed[node.output[0]] = known[key]
            continue
        inputs = {name: constants[name] for name in node.input if name}
        value = _evaluate(node, inputs, model)
        if value.size > _MAX_GROWTH * max(sum(a.size for a in inputs.values()), 64):
            kept.append(node)
            continue
        constants[node.output[0]] = value
        known[key] = node.output[0]
    for node in kept:
        for body in graphs.subgraphs(node):
            _rename_outer(body, renamed)
    graphs.replace_all(graph.node, kept)


def _evaluate(
    node: onnx.NodeProto, inputs: Mapping[str, Array], model: onnx.ModelProto
) -> Array:
    one = helper.make_graph(
        [node],
        "constant",
        [onnx.ValueInfoProto(name=name) for name in inputs],
        [onnx.ValueInfoProto(name=node.output[0])],
    )
    single = helper.make_model(one, opset_imports=model.opset_import)
    single.ir_version = model.ir_version
    result: Array = np.asarray(ReferenceEvaluator(single).run(None, dict(inputs))[0])
    return result


def _rename_outer(body: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    own = {value.name for value in body.input} | {t.name for t in body.initializer}
    own.update(name for node in body.node for name in node.output)
    outer = {old: new for old, new in renamed.items() if old not in own}
    for node in body.node:
        for i, name in enumerate(node.input):
            node.input[i] = outer.get(name, name)
        for inner in graphs.subgraphs(node):
            _rename_outer(inner, outer)


def _fold_batch_norms(graph: onnx.GraphProto, constants: dict[str, Array]) -> None:
    """Multiplies each BatchNormalization into the convolution that alone feeds it."""
    uses = graphs.use_counts(graph)
    producers = {name: node for node in graph.node for name in node.output}
    folded = []
    for node in graph.node:
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
        assert isinstance(epsilon, float)
        slope = gamma / np.sqrt(variance + epsilon)
        bias = constants[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else 0.0
        across = [1] * weight.ndim
        across[channel_axis] = -1
        names = [f"{node.output[0]}/weight", f"{node.output[0]}/bias"]
        constants[names[0]] = (weight * slope.reshape(across)).astype(np.float32)
        constants[names[1]] = ((bias - mean) * slope + beta).astype(np.float32)
        graphs.replace_all(conv.input, [conv.input[0], *names])
        conv.output[0] = node.output[0]
        producers[node.output[0]] = conv
        folded.append(node)
    gone = {id(node) for node in folded}
    graphs.replace_all(graph.node, [node for node in graph.node if id(node) not in gone])


def _reduce_in_place(graph: onnx.GraphProto, constants: dict[str, Array]) -> None:
    """Reductions read what lies before a Transpose: global pooling needs no copy of its input.

        Transpose → ReduceMean(axes)  ⇒  ReduceMean(the same axes, as they were before)
    """
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type in _REDUCTIONS else None
        if before is None or before.op_type != "Transpose" or len(node.input) < 2:
            continue
        permutation, axes = graphs.attribute(before, "perm"), constants.get(node.input[1])
        if not isinstance(permutation, list) or axes is None or axes.size == 0:
            continue
        moved = [permutation[axis] for axis in axes.tolist()]
        rest = [axis for axis in permutation if axis not in moved]
        if graphs.attribute(node, "keepdims", 1) != 0 or rest != sorted(rest):
            continue
        name = f"{node.output[0]}/axes"
        constants[name] = np.array(sorted(moved), np.int64)
        graphs.replace_all(node.input, [before.input[0], name])


def _name(attribute: onnx.AttributeProto) -> str:
    return attribute.name
