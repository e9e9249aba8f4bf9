"""One form for equal graphs: the same model gives the same bytes in every process.

Converters number their tensors from process-wide counters and walk through sets, so names and
order differ from run to run while the graph is the same. Here nodes come in depth-first order
from the outputs, and everything between the inputs and the outputs is named by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from layerswap.onnx_graph import graphs

PRODUCER = "layerswap"
# Larger initializers are compared neither for sharing nor in memory.
_SHARED_BYTES = 65_536


def canonicalize(
    model: onnx.ModelProto, *, version: str = "", metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The same computation with order and names that depend on nothing else.

    Names of graph inputs and outputs stay. Dead nodes, unused initializers and opset imports,
    intermediate shapes and documentation of the graph go.

    Args:
        model: not changed.
        version: producer version to write.
        metadata: properties to write, sorted by key.
    """
    result = onnx.ModelProto(
        ir_version=model.ir_version, producer_name=PRODUCER, producer_version=version
    )
    result.graph.CopyFrom(model.graph)
    graph = result.graph
    graph.name = PRODUCER
    graph.doc_string = ""
    public = [value.name for value in (*graph.input, *graph.output)]
    _Namer(public).graph(graph, {name: name for name in public})
    _rename_axes(graph)
    domains = set(_domains(graph))
    for entry in sorted(model.opset_import, key=lambda entry: entry.domain):
        if entry.domain in domains:
            result.opset_import.add(domain=entry.domain, version=entry.version)
    for key, value in sorted((metadata or {}).items()):
        result.metadata_props.add(key=key, value=value)
    return result


class _Namer:
    """Orders and renames a graph and, with the same counters, the bodies in it."""

    def __init__(self, public: Iterable[str]) -> None:
        self._taken = set(public)
        self._tensors = 0
        self._nodes = 0

    def graph(self, graph: onnx.GraphProto, names: dict[str, str]) -> None:
        """Rewrites `graph` in place; `names` maps the tensors that are visible so far."""
        del graph.value_info[:]
        shared = _shared(graph.initializer)
        ordered = _depth_first(graph)
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        kept = []

        def new_name(old: str) -> str:
            # An initializer gets its name, and its place, where it is first used.
            old = shared.get(old, old)
            if old not in names:
                names[old] = self._tensor("w" if old in initializers else "t")
            if old in initializers and initializers[old] is not None:
                kept.append(initializers.pop(old))
                kept[-1].name = names[old]
            return names[old]

        for node in ordered:
            node.name = f"{node.op_type}_{self._nodes}"
            self._nodes += 1
            graphs.replace_all(node.attribute, sorted(node.attribute, key=lambda a: a.name))
            for i, name in enumerate(node.input):
                node.input[i] = new_name(name) if name else ""
            for body in graphs.subgraphs(node):
                for name in graphs.outer_reads(body):
                    new_name(name)
                self._body(body, {**names, **{o: names[n] for o, n in shared.items()}})
            for i, name in enumerate(node.output):
                node.output[i] = new_name(name) if name else ""
        for value in graph.output:
            value.name = new_name(value.name)
        for tensor in kept:
            tensor.doc_string = ""
        graphs.replace_all(graph.node, ordered)
        graphs.replace_all(graph.initializer, kept)

    def _body(self, body: onnx.GraphProto, names: dict[str, str]) -> None:
        body.name = "body"
        body.doc_string = ""
        for value in body.input:
            names[value.name] = self._tensor("t")
            value.name = names[value.name]
        self.graph(body, names)

    def _tensor(self, prefix: str) -> str:
        while True:
            name = f"{prefix}{self._tensors}"
            self._tensors += 1
            if name not in self._taken:
                return name


def _shared(initializers: Iterable[onnx.TensorProto]) -> dict[str, str]:
    """Maps the names of repeated small initializers to the first of each kind."""
    first: dict[tuple[object, ...], str] = {}
    result = {}
    for tensor in initializers:
        if len(tensor.raw_data) > _SHARED_BYTES:
            continue
        plain = onnx.TensorProto()
        plain.CopyFrom(tensor)
        plain.name = plain.doc_string = ""
        key = (plain.SerializeToString(deterministic=True),)
        if first.setdefault(key, tensor.name) != tensor.name:
            result[tensor.name] = first[key]
    return result


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
    """Names dynamic axes after the first input or output that has them; equal stay equal."""
    names: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_value"):
                continue
            old = size.dim_param or f"{value.name}/{axis}"
            size.dim_param = names.setdefault(old, f"{value.name}_{axis}")


def _domains(graph: onnx.GraphProto) -> Iterable[str]:
    for node in graph.node:
        yield "" if node.domain == "ai.onnx" else node.domain
        for body in graphs.subgraphs(node):
            yield from _domains(body)
