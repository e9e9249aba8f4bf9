"""Operator sets: which there are, and how a graph gets into a newer one."""

from __future__ import annotations

import onnx
from onnx import helper, version_converter

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.records import TRACED_OPSET, Array


def newest_opset() -> int:
    """The newest opset that onnx and, where it is installed, onnxruntime know."""
    newest: int = onnx.defs.onnx_opset_version()
    try:
        import onnxruntime
    except ImportError:
        return newest
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for opset in range(newest, TRACED_OPSET, -1):
        # Nothing but an attempt tells which ones it knows.
        try:
            onnxruntime.InferenceSession(
                _smallest(opset).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:
            continue
        return opset
    return TRACED_OPSET


def _smallest(opset: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "", [value], [result])
    imports = [helper.make_opsetid("", opset)]
    ir_version = helper.find_min_ir_version_for(imports)
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def raise_opset(light: onnx.ModelProto, constants: dict[str, Array], opset: int) -> None:
    """Converts a graph to a newer opset, by onnx's own converter.

    Args:
        light: a graph without initializers, as tf2onnx wrote it; changed in place. Nodes of
            other domains stay as they are.
        constants: value of each initializer; extended.
        opset: version of the ONNX operator set; nothing happens where the graph has it already.

    Raises:
        ExportError: onnx can't convert the graph; holds its reason.
    """
    versions = {entry.domain: entry for entry in light.opset_import}
    if versions[""].version >= opset:
        return
    try:
        converted = version_converter.convert_version(graphs.typed(light, constants), opset)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"the graph can't be converted from opset {versions[''].version} to {opset}: "
            f"{reason[0]}",
            hint=f"Export it at opset {versions[''].version} or below.",
        ) from error
    graphs.replace_all(light.graph.node, converted.graph.node)
    for added in converted.graph.initializer:
        if added.name not in constants:
            constants[added.name] = onnx.numpy_helper.to_array(added)
    versions[""].version = opset
    least = helper.find_min_ir_version_for([versions[""]])
    light.ir_version = max(light.ir_version, least)
