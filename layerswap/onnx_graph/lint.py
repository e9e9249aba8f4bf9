"""Looks at every operator of an ONNX file: which normalise, and which are BatchNormalization.

Weights outside the file are not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from layerswap.errors import LoadError
from layerswap.onnx_graph.graphs import attribute, subgraphs
from layerswap.records import Array, Checked, Finding, LayerRecord

# By name, since every vendor has its own; LRN normalises, too.
_NORMALIZES = ("Norm", "LRN")
_STANDARD = ("", "ai.onnx")
# Operators outside the standard whose meaning is public.
_KNOWN_DOMAINS = (*_STANDARD, "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training")
_MICROSOFT = "com.microsoft"


def check_onnx_file(path: str | os.PathLike[str]) -> tuple[Checked, list[Finding]]:
    """Looks for BatchNormalization operators, in bodies and local functions, too.

    The affine of a decomposed GroupNormalization is none: a BatchNormalization with constant mean
    0, variance 1 and epsilon 0 directly behind the Reshape of an InstanceNormalization.

    Args:
        path: the `.onnx` file.

    Returns:
        The operators that normalise, and a finding for each that is a BatchNormalization or that
        nobody can tell.

    Raises:
        LoadError: it is no ONNX file.
    """
    model = _load(Path(path))
    census = _Census({(f.domain, f.name) for f in model.functions})
    census.graph(model.graph, _Scope(), (), "")
    for function in model.functions:
        census.nodes(function.node, _Scope(), (function.name,), function.name)
    for number, training in enumerate(model.training_info):
        for graph in (training.initialization, training.algorithm):
            census.graph(graph, _Scope(), ("training_info",), f"training_info[{number}]")
    return Checked(os.fspath(path), census.examined, tuple(census.layers)), census.findings


def _load(path: Path) -> onnx.ModelProto:
    where = os.fspath(path)
    if not path.is_file():
        raise LoadError("there is no such file", where=where)
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's, or that of the file system
        raise LoadError(
            f"is no ONNX file, or damaged: {type(error).__name__}",
            where=where,
            hint="Copy or export it again.",
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise LoadError("is no ONNX file: it has no graph", where=where, hint="Export it again.")
    return model


@dataclass(slots=True)
class _Scope:
    """The names that a node can refer to: constants, and the nodes that make the others."""

    constants: dict[str, Array] = field(default_factory=dict)
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)

    def inner(self, graph: onnx.GraphProto) -> _Scope:
        """That of a graph inside: its own names hide those outside."""
        scope = _Scope(dict(self.constants), dict(self.makers))
        inputs = {value.name for value in graph.input}
        for name in inputs:  # may be fed, whatever an initializer says
            scope.constants.pop(name, None)
            scope.makers.pop(name, None)
        for tensor in graph.initializer:
            scope.makers.pop(tensor.name, None)
            if tensor.name not in inputs:
                scope.add(tensor.name, tensor)
        return scope

    def add(self, name: str, tensor: onnx.TensorProto) -> None:
        self.constants.pop(name, None)
        # Statistics are vectors; nothing else matters here.
        if len(tensor.dims) == 1 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            self.constants[name] = numpy_helper.to_array(tensor)

    def make(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self.constants.pop(name, None)
            self.makers[name] = node
        value = attribute(node, "value") if node.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto) and node.output:
            self.add(node.output[0], value)


class _Census:
    """Counts operators and keeps those that normalise."""

    def __init__(self, functions: set[tuple[str, str]]) -> None:
        self.examined = 0
        self.layers: list[LayerRecord] = []
        self.findings: list[Finding] = []
        self._functions = functions

    def graph(
        self, graph: onnx.GraphProto, scope: _Scope, parents: tuple[str, ...], path: str
    ) -> None:
        self.nodes(graph.node, scope.inner(graph), parents, path)

    def nodes(
        self,
        nodes: Iterable[onnx.NodeProto],
        scope: _Scope,
        parents: tuple[str, ...],
        path: str,
    ) -> None:
        for node in nodes:
            self.examined += 1
            name = node.name or next(iter(node.output), "") or node.op_type
            record = LayerRecord(
                f"{path}/{name}" if path else name, node.op_type, node.domain, parents
            )
            if any(part in node.op_type for part in _NORMALIZES):
                self.layers.append(record)
            self.findings += self._judge(node, record, scope)
            scope.make(node)
            for body in subgraphs(node):
                self.graph(body, scope, (*parents, node.op_type), record.path)

    def _judge(self, node: onnx.NodeProto, record: LayerRecord, scope: _Scope) -> Iterator[Finding]:
        inside = f" in {' › '.join(record.parents)}" if record.parents else ""
        if (node.domain, node.op_type) in self._functions:
            return  # its operators are looked at in its own place
        if node.domain in _STANDARD and node.op_type == "BatchNormalization":
            trivial = _is_trivial(node, scope.constants)
            if trivial and _follows_instance_norm(node, scope.makers):
                return
            yield Finding(
                "batchnorm-left",
                "error",
                record.path,
                f"is a BatchNormalization operator{inside}"
                + (", though its statistics are trivial" if trivial else ""),
                "Convert the Keras model with layerswap convert, and export it anew.",
            )
        elif node.domain not in (*_KNOWN_DOMAINS, _MICROSOFT):
            yield Finding(
                "custom-operator",
                "undetermined",
                record.path,
                f"is a {node.domain}.{node.op_type}{inside}, which only its own runtime knows",
                "Export it as standard operators.",
            )
        elif node.domain == _MICROSOFT and "BatchNorm" in node.op_type:
            yield Finding(
                "batchnorm-left",
                "error",
                record.path,
                f"is a {node.domain}.{node.op_type}{inside}",
                "Convert the Keras model with layerswap convert, and export it anew.",
            )


def _is_trivial(node: onnx.NodeProto, constants: Mapping[str, Array]) -> bool:
    """Whether it computes γ·x + β whatever comes."""
    if len(node.input) != 5 or attribute(node, "training_mode", 0):
        return False
    mean, variance = (constants.get(name) for name in node.input[3:])
    return (
        attribute(node, "epsilon", 1e-5) == 0
        and mean is not None
        and variance is not None
        and bool(np.all(mean == 0))
        and bool(np.all(variance == 1))
    )


def _follows_instance_norm(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    reshape = makers.get(node.input[0])
    if reshape is None or (reshape.domain, reshape.op_type) not in [
        (d, "Reshape") for d in _STANDARD
    ]:
        return False
    maker = makers.get(reshape.input[0]) if reshape.input else None
    return maker is not None and maker.op_type == "InstanceNormalization"
