"""A graph as its rules look at it: every operator with its place, and what is known of its tensors.

Bodies of If, Loop and Scan, local functions and training graphs count like the main graph. Nothing
in the file is trusted: a tensor that contradicts itself has no value, and types that can't be
inferred are unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, shape_inference

from layerswap.onnx_graph import external
from layerswap.onnx_graph.graphs import attribute, reads, subgraphs
from layerswap.onnx_graph.tensors import decode, dtype_name, size_of
from layerswap.records import Array, LayerRecord

STANDARD = ("", "ai.onnx")
Shape = tuple[int | None, ...]
# Constants above this size are weights; nobody asks for their values one by one.
_SMALL_BYTES = 1 << 16
# A function that calls another twice, which calls another twice: 2^n operators in n functions.
_MOST_UNROLLED = 1_000_000
# Tensors above this size are left out where only types and shapes matter.
_LIGHT_BYTES = 1 << 10


@dataclass(slots=True, eq=False)
class Place:
    """An operator and where it is.

    Attributes:
        node: the operator.
        record: its path, type, domain, and the operators that it lies in.
        scope: the names that it can read.
        opset: the version of its domain; 0 where the file doesn't say.
    """

    node: onnx.NodeProto
    record: LayerRecord
    scope: Scope
    opset: int

    def input(self, index: int) -> str:
        """Name of an input, empty where it has none there."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def is_a(self, *op_types: str) -> bool:
        """Whether it is one of these standard operators."""
        return self.node.op_type in op_types and self.node.domain in STANDARD


@dataclass(slots=True, eq=False)
class Scope:
    """The names of one graph, body or function, and behind them those of what it lies in.

    `folder` is where values outside the file are looked for; None: nowhere.
    """

    outer: Scope | None
    folder: Path | None
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    makers: dict[str, Place] = field(default_factory=dict)
    fed: set[str] = field(default_factory=set)
    _users: dict[str, list[Place]] | None = None
    _values: dict[str, Array | None] = field(default_factory=dict)

    def _home(self, name: str) -> Scope | None:
        """The scope that defines a name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.makers or name in scope.tensors or name in scope.fed:
                return scope
            scope = scope.outer
        return None

    def maker(self, name: str) -> Place | None:
        """The operator that computes a tensor; None for inputs and initializers."""
        home = self._home(name)
        return home.makers.get(name) if home else None

    def users(self, name: str) -> list[Place]:
        """The operators of this graph that read a tensor, themselves or in a body."""
        if self._users is None:
            self._users = {}
            for place in dict.fromkeys(self.makers.values()):
                for read in dict.fromkeys(reads(place.node)):
                    self._users.setdefault(read, []).append(place)
        return self._users.get(name, [])

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The constant of a name, be it an initializer or a Constant operator's."""
        home = self._home(name)
        if home is None:
            return None
        if name in home.makers:
            place = home.makers[name]
            value = attribute(place.node, "value") if place.is_a("Constant") else None
            return value if isinstance(value, onnx.TensorProto) else None
        return None if name in home.fed else home.tensors.get(name)

    def array(self, name: str) -> Array | None:
        """The value of a small constant; None where it is large or damaged.

        Some files have even short vectors outside, such as the mean and the variance by which an
        affine is told from a BatchNormalization: those are read there.
        """
        if name not in self._values:
            self._values[name] = self._read(name)
        return self._values[name]

    def _read(self, name: str) -> Array | None:
        place = self.maker(name)
        if place is not None and place.is_a("Identity"):  # one is enough, and no circle
            name, place = place.input(0), self.maker(place.input(0))
        tensor = self.tensor(name)
        if tensor is not None and size_of(tensor) > _SMALL_BYTES:
            return None
        if tensor is not None and external.is_outside(tensor):
            return None if self.folder is None else external.read(tensor, self.folder)
        if tensor is not None:
            return decode(tensor)
        if place is not None and place.is_a("Constant"):
            for key in ("value_float", "value_int", "value_floats", "value_ints"):
                value = attribute(place.node, key)
                if value is not None:
                    return np.asarray(value, np.float32 if "float" in key else np.int64)
        return None

    def dtype(self, name: str) -> str:
        """A tensor's type as NumPy calls it; empty where it isn't known."""
        tensor = self.tensor(name)
        if tensor is not None:
            return dtype_name(tensor.data_type)
        kind = self._type(name)
        return dtype_name(kind.tensor_type.elem_type) if kind else ""

    def shape(self, name: str) -> Shape | None:
        """A tensor's shape, None for axes that aren't known, or as a whole."""
        tensor = self.tensor(name)
        if tensor is not None:
            return tuple(tensor.dims)
        kind = self._type(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return tuple(
            axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else None
            for axis in kind.tensor_type.shape.dim
        )

    def _type(self, name: str) -> onnx.TypeProto | None:
        home = self._home(name)
        return home.types.get(name) if home else None


class GraphView:
    """Every operator of a model.

    Args:
        model: as it was read; not changed. Weights may lie outside.
        folder: where these are.

    Attributes:
        model: the same.
        light: the model without its large weights, which are inputs there, with the types and
            shapes that onnx infers.
        functions: (domain, name) of its local functions.
        places: every operator.
        main: the names of the main graph.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.light = _inferred(model)
        self.places: list[Place] = []
        versions = _versions(model.opset_import)
        # The main graph with its weights, then bodies, also those without an operator.
        self._graphs: list[onnx.GraphProto] = []
        self.main = self._graph(self.light.graph, None, (), "", versions)
        # Initializers with their values: the light model knows the large ones as inputs.
        own = {value.name for value in model.graph.input}
        self.main.tensors = {t.name: t for t in model.graph.initializer}
        self.main.fed = own
        self._graphs[0] = model.graph
        for function in model.functions:
            imports = {**versions, **_versions(function.opset_import)}
            scope = Scope(None, folder, fed=set(function.input))
            self._nodes(function.node, scope, (function.name,), function.name, imports)
        for number, training in enumerate(model.training_info):
            for graph in (training.initialization, training.algorithm):
                path = f"training_info[{number}]"
                self._graph(graph, self.main, ("training_info",), path, versions)

    @cached_property
    def tensors(self) -> list[tuple[str, onnx.TensorProto]]:
        """Every constant with the path of where it is."""
        found = [(t.name, t) for graph in self._graphs for t in graph.initializer]
        for graph in self._graphs:
            found += [(sparse.values.name, sparse.values) for sparse in graph.sparse_initializer]
        for place in self.places:
            for item in place.node.attribute:
                own = list(item.tensors)
                if item.type == onnx.AttributeProto.TENSOR:
                    own.append(item.t)
                if item.type == onnx.AttributeProto.SPARSE_TENSOR:
                    own.append(item.sparse_tensor.values)
                own += [sparse.values for sparse in item.sparse_tensors]
                found += [(place.record.path, tensor) for tensor in own]
        return found

    def _graph(
        self,
        graph: onnx.GraphProto,
        outer: Scope | None,
        parents: tuple[str, ...],
        path: str,
        versions: Mapping[str, int],
    ) -> Scope:
        self._graphs.append(graph)
        fed = {value.name for value in graph.input}
        scope = Scope(outer, self.folder, {t.name: t for t in graph.initializer}, fed=fed)
        for values in (graph.input, graph.value_info, graph.output):
            scope.types.update((value.name, value.type) for value in values)
        self._nodes(graph.node, scope, parents, path, versions)
        return scope

    def _nodes(
        self,
        nodes: Iterable[onnx.NodeProto],
        scope: Scope,
        parents: tuple[str, ...],
        path: str,
        versions: Mapping[str, int],
    ) -> None:
        for node in nodes:
            name = node.name or next(iter(node.output), "") or node.op_type
            own = f"{path}/{name}" if path else name
            record = LayerRecord(own, node.op_type, node.domain, parents)
            place = Place(node, record, scope, versions.get(_domain(node.domain), 0))
            self.places.append(place)
            scope.makers.update((output, place) for output in node.output if output)
            for body in subgraphs(node):
                self._graph(body, scope, (*parents, node.op_type), own, versions)


def _domain(name: str) -> str:
    return "" if name in STANDARD else name


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): entry.version for entry in imports}


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
    )
    graph, source = light.graph, model.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    graph.sparse_initializer.extend(source.sparse_initializer)
    fed = {value.name for value in source.input}
    for tensor in source.initializer:
        if not external.is_outside(tensor) and size_of(tensor) <= _LIGHT_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in fed:
            shape = list(tensor.dims)
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    if _unrolled(model) > _MOST_UNROLLED:
        return light  # onnx looks into a function at each of its calls, in a circle for ever
    try:
        return shape_inference.infer_shapes(light)
    except Exception:  # whatever onnx thinks of the graph; the rule of the checker says it
        return light


def _unrolled(model: onnx.ModelProto) -> float:
    """How many operators there are without local functions; infinite where one calls itself."""
    calls = {(f.domain, f.name): Counter(_called(f.node)) for f in model.functions}
    open_ = {key: len(called.keys() & calls.keys()) for key, called in calls.items()}
    callers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, called in calls.items():
        for inner in called.keys() & calls.keys():
            callers.setdefault(inner, []).append(key)
    sizes: dict[tuple[str, str], float] = {}
    ready = [key for key, count in open_.items() if not count]
    while ready:
        key = ready.pop()
        sizes[key] = sum(sizes.get(inner, 1.0) * times for inner, times in calls[key].items())
        for caller in callers.get(key, ()):
            open_[caller] -= 1
            if not open_[caller]:
                ready.append(caller)
    if len(sizes) < len(calls):
        return math.inf
    return sum(sizes.get(key, 1.0) for key in _called(model.graph.node))


def _called(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        yield node.domain, node.op_type
        for body in subgraphs(node):
            yield from _called(body.node)
