"""A model as one list of operators: functions put in their place, bodies beside what runs them.

Tensor names are gone: an operator refers to what makes its inputs. What a body gives is an input
of the operator that runs it, in a slot of its own.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper

from layerswap.errors import LoadError
from layerswap.onnx_graph import constants, graphs
from layerswap.onnx_graph.constants import Constant

_STANDARD = ("", "ai.onnx")
# Functions can call each other such that a small file stands for a huge graph.
_MOST_NODES, _MOST_DEPTH = 100_000, 60


@dataclass(eq=False, slots=True)
class Node:
    """An operator.

    Attributes:
        name: for people, with the functions and operators around it.
        op: the operator, with its domain where that isn't the standard.
        attributes: value by name, those that are left out at their defaults, too; no bodies.
        inputs: what makes each input, by slot: its number, or of a body its attribute and number.
        made_of: the operators behind one that several were taken for.
    """

    name: str
    op: str
    attributes: dict[str, Any]
    inputs: dict[str, Ref]
    made_of: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """An output of an operator."""

    node: Node
    number: int


@dataclass(frozen=True, slots=True)
class Port:
    """What comes from outside: an input of the model or of a body."""

    name: str


Ref = Output | Port | Constant


@dataclass(slots=True)
class Flat:
    """A model.

    Attributes:
        nodes: its operators, each behind those that make its inputs.
        outputs: what makes each output, by name.
    """

    nodes: list[Node]
    outputs: dict[str, Ref]


def flatten(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, str] | None = None) -> Flat:
    """A model as a list.

    Args:
        model: any model; not changed.
        folder: where external data may be.
        inputs: the port that stands for an input, by its name; its own name by default.

    Raises:
        LoadError: a name isn't defined, operators run in circles, or the functions of a small
            file stand for a huge graph.
    """
    flattener = _Flattener(model, folder)
    names: Names = ChainMap()
    for value in model.graph.input:
        names[value.name] = Port((inputs or {}).get(value.name, value.name))
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    scope = _Scope(names, opsets, {}, "", 0)
    flattener.graph(model.graph, scope)
    outputs = {value.name: _resolved(value.name, scope) for value in model.graph.output}
    return Flat(flattener.nodes, outputs)


def graph_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that have to be given: before IR 4 weights were listed among them, too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


Names = ChainMap[str, Ref]


@dataclass(slots=True)
class _Scope:
    """What the operators of a graph or function can refer to."""

    names: Names
    opsets: Mapping[str, int]
    arguments: Mapping[str, onnx.AttributeProto]  # of the function that they are in
    path: str
    depth: int

    def inner(self, name: str) -> _Scope:
        path = f"{self.path}/{name}" if self.path else name
        return _Scope(self.names.new_child(), self.opsets, self.arguments, path, self.depth + 1)


@dataclass(slots=True)
class _Flattener:
    model: onnx.ModelProto
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    visited: int = 0  # calls, too: functions may hold nothing but calls of each other
    functions: dict[tuple[str, str], onnx.FunctionProto] = field(init=False)

    def __post_init__(self) -> None:
        self.functions = {(f.domain, f.name): f for f in self.model.functions}

    def graph(self, graph: onnx.GraphProto, scope: _Scope) -> None:
        for tensor in graph.initializer:
            scope.names[tensor.name] = Constant(tensor.name, tensor, self.folder)
        for sparse in graph.sparse_initializer:
            scope.names[sparse.values.name] = Port(f"sparse {_digest(sparse)}")
        self.several(graph.node, scope)

    def several(self, nodes: Iterable[onnx.NodeProto], scope: _Scope) -> None:
        if scope.depth > _MOST_DEPTH:
            raise LoadError(f"its graphs lie in each other {scope.depth} deep")
        for node in _sorted(list(nodes)):
            self.node(node, scope)
            self.visited += 1
            if self.visited > _MOST_NODES:
                raise LoadError(f"its functions stand for more than {_MOST_NODES:,} operators")

    def node(self, node: onnx.NodeProto, scope: _Scope) -> None:
        attributes = {a.name: a for a in _bound(node, scope)}
        if node.op_type == "Constant" and node.domain in _STANDARD and node.output:
            name = node.output[0]
            value = constants.of_attributes(name, attributes.values(), self.folder)
            if value is not None:
                scope.names[name] = value
                return
        given = [_resolved(name, scope) if name else None for name in node.input]
        name = node.name or next(iter(node.output), "") or node.op_type
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            outputs: list[Ref | None] = self.call(function, given, attributes, scope.inner(name))
        else:
            made = self.operator(node, given, attributes, scope, name)
            outputs = [Output(made, number) for number in range(len(node.output))]
        for output, ref in zip(node.output, outputs, strict=False):
            if output and ref is not None:
                scope.names[output] = ref

    def call(
        self,
        function: onnx.FunctionProto,
        given: list[Ref | None],
        attributes: Mapping[str, onnx.AttributeProto],
        scope: _Scope,
    ) -> list[Ref | None]:
        """A function's operators in the place of its call; what makes its outputs."""
        defaults = {a.name: a for a in function.attribute_proto}
        names: Names = ChainMap()
        for name, ref in zip(function.input, given, strict=False):
            if ref is not None:
                names[name] = ref
        absent = set(function.input) - names.keys()
        opsets = {entry.domain: entry.version for entry in function.opset_import}
        inside = _Scope(names, opsets, {**defaults, **attributes}, scope.path, scope.depth)
        nodes = [_without(node, absent) for node in function.node]
        self.several(nodes, inside)
        return [_resolved(name, inside) for name in function.output]

    def operator(
        self,
        node: onnx.NodeProto,
        given: list[Ref | None],
        attributes: Mapping[str, onnx.AttributeProto],
        scope: _Scope,
        name: str,
    ) -> Node:
        domain = "" if node.domain in _STANDARD else node.domain
        values = dict(_defaults(node.op_type, scope.opsets.get(domain, 1), domain))
        inputs = {str(number): ref for number, ref in enumerate(given) if ref is not None}
        for _, attribute in sorted(attributes.items()):
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for number, body in enumerate(bodies):
                slot = attribute.name + (f"[{number}]" if number else "")
                inner = scope.inner(name)
                for index, value in enumerate(body.input):
                    inner.names[value.name] = Port(f"{node.op_type} {slot} {index}")
                self.graph(body, inner)
                for index, value in enumerate(body.output):
                    inputs[f"{slot} {index}"] = _resolved(value.name, inner)
            if not bodies:
                values[attribute.name] = _value(attribute)
        path = f"{scope.path}/{name}" if scope.path else name
        op = f"{domain}.{node.op_type}" if domain else node.op_type
        made = Node(path, op, values, inputs)
        self.nodes.append(made)
        return made


def _resolved(name: str, scope: _Scope) -> Ref:
    ref = scope.names.get(name)
    if ref is None:
        raise LoadError(
            f"the tensor '{name}' is used and nowhere defined", hint="Export the model again."
        )
    return ref


def _sorted(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes behind those that make what they use, else in their order."""
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waits = [{makers[n] for n in graphs.reads(node) if n in makers} for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for index, sources in enumerate(waits):
        for source in sources:
            users[source].append(index)
    open_ = [len(sources) for sources in waits]
    ready = [index for index, count in enumerate(open_) if not count][::-1]
    done = 0
    while ready:
        index = ready.pop()
        yield nodes[index]
        done += 1
        for user in reversed(users[index]):
            open_[user] -= 1
            if not open_[user]:
                ready.append(user)
    if done < len(nodes):
        raise LoadError("its operators wait for each other in a circle", hint="Export it again.")


def _bound(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.AttributeProto]:
    """A node's attributes; those that refer to an argument of the function, as that."""
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            yield attribute
        elif attribute.ref_attr_name in scope.arguments:
            bound = onnx.AttributeProto()
            bound.CopyFrom(scope.arguments[attribute.ref_attr_name])
            bound.name = attribute.name
            yield bound


def _without(node: onnx.NodeProto, absent: set[str]) -> onnx.NodeProto:
    """A function's node without the inputs that its caller didn't give."""
    if absent.isdisjoint(node.input):
        return node
    result = onnx.NodeProto()
    result.CopyFrom(node)
    graphs.replace_all(result.input, ["" if name in absent else name for name in node.input])
    return result


@lru_cache(maxsize=1024)
def _defaults(op_type: str, opset: int, domain: str) -> tuple[tuple[str, Any], ...]:
    """The attributes that an operator has where nobody sets them."""
    try:
        schema = defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return ()
    pairs = [(name, a.default_value) for name, a in schema.attributes.items()]
    return tuple((name, _value(value)) for name, value in pairs if value.type)


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, onnx.TensorProto):
        return _tensor_text(value)
    if isinstance(value, float | int | str):
        return value
    if isinstance(value, Iterable):
        return tuple(
            v.decode(errors="backslashreplace")
            if isinstance(v, bytes)
            else v
            if isinstance(v, float | int)
            else _digest(v)
            for v in value
        )
    return _digest(value)


def _tensor_text(tensor: onnx.TensorProto) -> str:
    constant = Constant("", tensor, Path())
    if tensor.data_location == onnx.TensorProto.EXTERNAL or constant.missing:
        return f"{constant.type} {_digest(tensor)}"
    if constant.size <= 8:
        return f"{constant.type} {np.asarray(constant.value()).tolist()}"
    return constant.digest


def _digest(message: Any) -> str:
    return hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=8).hexdigest()
