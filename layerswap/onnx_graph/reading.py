"""Reads ONNX files that nobody vouches for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from layerswap.errors import LoadError
from layerswap.onnx_graph.graphs import subgraphs


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """What is in an ONNX file; weights outside it are not read.

    Raises:
        LoadError: there is no such file, or it is no ONNX file, or damaged.
    """
    where = os.fspath(path)
    if not Path(path).is_file():
        raise LoadError("there is no such file", where=where)
    try:
        model = onnx.load_model_from_string(Path(path).read_bytes())
    except Exception as error:  # protobuf's, or that of the file system
        raise LoadError(
            f"is no ONNX file, or damaged: {type(error).__name__}",
            where=where,
            hint="Copy or export it again.",
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise LoadError("is no ONNX file: it has no graph", where=where, hint="Export it again.")
    # What isn't UTF-8 protobuf gives as bytes, which compare equal to no name.
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise LoadError(
            "is damaged: a name in it is not text", where=where, hint="Copy or export it again."
        )
    return model


def _texts(model: onnx.ModelProto) -> Iterator[Any]:
    for entry in model.opset_import:
        yield entry.domain
    for item in model.metadata_props:
        yield from (item.key, item.value)
    yield from _texts_of_graph(model.graph)
    for training in model.training_info:
        yield from _texts_of_graph(training.initialization)
        yield from _texts_of_graph(training.algorithm)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        yield from _texts_of_nodes(function.node)


def _texts_of_graph(graph: onnx.GraphProto) -> Iterator[Any]:
    yield graph.name
    for values in (graph.input, graph.output, graph.value_info):
        for value in values:
            yield value.name
            yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)
    for tensor in graph.initializer:
        yield from _texts_of_tensor(tensor)
    yield from _texts_of_nodes(graph.node)


def _texts_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[Any]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield from _texts_of_tensor(attribute.t)
        for body in subgraphs(node):
            yield from _texts_of_graph(body)


def _texts_of_tensor(tensor: onnx.TensorProto) -> Iterator[Any]:
    yield tensor.name
    for item in tensor.external_data:
        yield from (item.key, item.value)
