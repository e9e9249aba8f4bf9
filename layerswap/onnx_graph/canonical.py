"""One form for equal graphs: the same model gives the same bytes in every process.

Converters number their tensors from process-wide counters and walk through sets, so names and
order differ from run to run while the graph is the same. Here nodes come in depth-first order
from the outputs, and everything between the inputs and the outputs is named by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

import onnx
from onnx import numpy_helper

from layerswap.onnx_graph import graphs
from layerswap.records import Array

PRODUCER = "layerswap"
# Up to this size constants are compared by value.
_SHARED_BYTES = 65_536


def canonicalize(
    light: onnx.ModelProto,
    constants: dict[str, Array],
    *,
    version: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Gives the same computation an order and names that depend on nothing else.

    Names of graph inputs and outputs stay. Dead nodes, unused constants and opset imports,
    shapes of inner tensors and documentation of the graph go. Node documentation stays.

    Args:
        light: a graph without initializers; changed in place.
        constants: value of each initializer; comes out renamed and in order of use.
        version: producer version to write.
        metadata: properties to write, sorted by key.
    """
    graph = light.graph
    _order(graph, is_body=False)
    public = {value.name: value.name for value in (*graph.input, *graph.output)}
    namer = _Namer(public)
    namer.graph(graph, dict(public), constants)
    graph.name = PRODUCER
    graph.doc_string = ""
    _rename_axes(graph)
    light.doc_string = light.domain = ""
    light.ClearField("model_version")
    light.producer_name, light.producer_version = PRODUCER, version
    versions = {entry.domain: entry.version for entry in light.opset_import}
    used = set(_domains(graph))
    del light.opset_import[:], light.metadata_props[:]
    for domain in sorted(used & versions.keys()):
        light.opset_import.add(domain=domain, version=versions[domain])
    for key, value in sorted((metadata or {}).items()):
        light.metadata_props.add(key=key, value=value)


class _Namer:
    """Renames an ordered graph and, with the same counter, the bodies in it."""

    def __init__(self, public: Mapping[str, str]) -> None:
        self._taken = set(public)
        self._tensors = 0
        self._nodes = 0

    def graph(
        self, graph: onnx.GraphProto, names: dict[str, str], constants: dict[str, Array]
    ) -> None:
        """Rewrites a graph in place.

        Args:
            graph: the main graph, or a body.
            names: new name of each tensor that is visible so far; extended.
            constants: the graph's own; come out renamed and in order of use.
        """
        # A constant that is itself an output keeps its own name.
        shared = {n: first for n, first in _shared(constants).items() if n not in names}
        used: dict[str, Array] = {}

        def rename(old: str) -> str:
            # A constant gets its name, and its place, where it is first used.
            first = shared.get(old, old)
            if first not in names:
                names[first] = self._next("w" if first in constants else "t")
            if first in constants:
                used.setdefault(names[first], constants[first])
            names[old] = names[first]
            return names[old]

        for node in graph.node:
            node.name = f"{node.op_type}_{self._nodes}"
            self._nodes += 1
            graphs.replace_all(node.input, [rename(n) if n else "" for n in node.input])
            for body in graphs.subgraphs(node):
                for name in graphs.outer_reads(body):
                    rename(name)
                self._body(body, dict(names))
            graphs.replace_all(node.output, [rename(n) if n else "" for n in node.output])
        for value in graph.output:
            value.name = rename(value.name)
        del graph.value_info[:]
        constants.clear()
        constants.update(used)

    def _body(self, body: onnx.GraphProto, names: dict[str, str]) -> None:
        body.name = "body"
        body.doc_string = ""
        for value in body.input:
            names[value.name] = self._next("t")
            value.name = names[value.name]
        # What a body defines hides what it could see under that name.
        own = [tensor.name for tensor in body.initializer]
        own += [name for node in body.node for name in node.output]
        for name in own:
            names.pop(name, None)
        constants = {t.name: numpy_helper.to_array(t) for t in body.initializer}
        self.graph(body, names, constants)
        graphs.replace_all(
            body.initializer, [numpy_helper.from_array(v, n) for n, v in constants.items()]
        )

    def _next(self, prefix: str) -> str:
        while True:
            name = f"{prefix}{self._tensors}"
            self._tensors += 1
            if name not in self._taken:
                return name


def _shared(constants: Mapping[str, Array]) -> dict[str, str]:
    """Maps the names of repeated constants to the first: equal small ones, and tied weights."""
    first: dict[tuple[object, ...], str] = {}
    result = {}
    for name, value in constants.items():
        key: tuple[object, ...] = (id(value),)
        if value.nbytes <= _SHARED_BYTES and not value.dtype.hasobject:
            key = (value.dtype.str, value.shape, value.tobytes())
        if first.setdefault(key, name) != name:
            result[name] = first[key]
    return result


def _order(graph: onnx.GraphProto, *, is_body: bool) -> None:
    """Puts nodes and attributes in order; bodies first, whose reads are their node's too."""
    for node in graph.node:
        graphs.replace_all(node.attribute, sorted(node.attribute, key=lambda a: a.name))
    _settle_identities(graph, is_body=is_body)
    for node in graph.node:
        for body in graphs.subgraphs(node):
            _order(body, is_body=True)
    graphs.replace_all(graph.node, _depth_first(graph))


def _settle_identities(graph: onnx.GraphProto, *, is_body: bool) -> None:
    """Leaves an Identity only where an output repeats another, or what comes from outside.

    Where two outputs have one value, chance decides which of them tf2onnx makes an Identity of
    the other; here the first is the one that is computed.
    """
    copied = {n.output[0]: n.input[0] for n in graph.node if _is_identity(n)}
    computed = {name for n in graph.node for name in n.output if name not in copied}

    def source(name: str) -> str:
        while name in copied:
            name = copied[name]
        return name

    names = {name: source(name) for name in copied}
    copies = []
    given: set[str] = set()
    for position, value in enumerate(graph.output):
        root, own = source(value.name), value.name
        if root in computed and root not in given:
            given.add(root)
            if is_body:
                value.name = root
            else:
                # Names of the graph's outputs are public: the tensor takes this one.
                names |= {name: own for name, of in names.items() if of == root} | {root: own}
        elif own != root or root in given:
            if is_body:
                value.name = f"{root}/copy{position}"
            copies.append(onnx.helper.make_node("Identity", [root], [value.name]))
    kept = [node for node in graph.node if not _is_identity(node)]
    for node in kept:
        graphs.replace_all(node.output, [names.get(name, name) for name in node.output])
    for node in (*kept, *copies):
        _redirect(node, names)
    graphs.replace_all(graph.node, (*kept, *copies))


def _is_identity(node: onnx.NodeProto) -> bool:
    return node.op_type == "Identity" and node.domain in ("", "ai.onnx")


def _redirect(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Makes a node, and its bodies where they look outside, read other tensors."""
    graphs.replace_all(node.input, [names.get(name, name) for name in node.input])
    for body in graphs.subgraphs(node):
        read = set(graphs.outer_reads(body))
        visible = {old: new for old, new in names.items() if old in read}
        for inner in body.node:
            _redirect(inner, visible)
        for value in body.output:
            value.name = visible.get(value.name, value.name)


def _depth_first(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, each behind what it reads."""
    producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    done: set[int] = set()
    order: list[onnx.NodeProto] = []
    for output in graph.output:
        stack = [(producers[output.name], False)] if output.name in producers else []
        while stack:
            index, ready = stack.pop()
            if ready:
                order.append(graph.node[index])
            elif index not in done:
                done.add(index)
                stack.append((index, True))
                needed = [producers[n] for n in graphs.reads(graph.node[index]) if n in producers]
                stack += [(i, False) for i in reversed(needed) if i not in done]
    return order


def _rename_axes(graph: onnx.GraphProto) -> None:
    """Names dynamic axes after the first input or output that has them; equal stay equal.

    What only bodies know is numbered: a body's tensors may have other names in other files.
    """
    names: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_value"):
                continue
            old = size.dim_param or f"{value.name}/{axis}"
            size.dim_param = names.setdefault(old, f"{value.name}_{axis}")
    public = set(names.values())
    free = (name for i in count() if (name := f"axis{i}") not in public)
    for body in _bodies(graph):
        del body.value_info[:]
        for value in (*body.input, *body.output):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param:
                    if size.dim_param not in names:
                        names[size.dim_param] = next(free)
                    size.dim_param = names[size.dim_param]


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for body in graphs.subgraphs(node):
            yield body
            yield from _bodies(body)


def _domains(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield "" if node.domain == "ai.onnx" else node.domain
        for body in graphs.subgraphs(node):
            yield from _domains(body)
