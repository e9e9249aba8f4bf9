"""Puts a graph's computation into float16 where that pays and loses little.

Into float16 go products with weights (convolutions, matrices, tables), and what only passes
their results on: activations, shapes, and plain arithmetic. The rest stays in float32, as do the
types of the graph's inputs and outputs. Between the two go Cast nodes, one for each tensor and
direction at most.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, shape_inference

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.groupnorm import DOMAIN, OP_TYPE
from layerswap.onnx_graph.half_rules import CANDIDATES, Rules
from layerswap.records import Array

_UNTYPED = frozenset(("Cast", "Shape", "Size"))  # take either type


def to_float16(light: onnx.ModelProto, constants: dict[str, Array]) -> None:
    """Converts a graph in place; γ and β of GroupNorm nodes stay float32.

    Args:
        light: a graph without initializers, GroupNorm nodes not yet expanded.
        constants: value of each initializer; extended.

    Raises:
        ExportError: the model computes in float64.
    """
    _Halved(light, constants).rewrite()


class _Halved:
    def __init__(self, light: onnx.ModelProto, constants: dict[str, Array]) -> None:
        self._graph = light.graph
        self._constants = constants
        self._opset = next(entry.version for entry in light.opset_import if not entry.domain)
        self._wide = _float32_tensors(light, constants)
        self._narrow: set[str] = set()  # tensors that have become float16
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> None:
        nodes = list(self._graph.node)
        rules = Rules(nodes, self._wide, dict(self._constants))
        for node in nodes:
            rules.follow(node)
            slots = self._slots(node)
            if node.op_type in _UNTYPED:
                self._nodes.append(node)
            elif slots and rules.may_halve(node, _chosen(node.input, slots[0]), self._narrow):
                self._halve(node, *slots)
            else:
                self._keep(node)
        if not self._narrow:
            self._refuse_float64()
        for value in self._graph.output:
            if value.name in self._narrow:
                self._restore(value.name)
        graphs.replace_all(self._graph.node, self._nodes)

    def _slots(self, node: onnx.NodeProto) -> tuple[list[bool], list[bool]] | None:
        """Which inputs and outputs can be float16; None where the node must stay as it is."""
        if node.domain or node.op_type not in CANDIDATES:
            return None
        schema = defs.get_schema(node.op_type, self._opset)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

        def can(formal: list[defs.OpSchema.FormalParameter], names: list[str]) -> list[bool]:
            # The last formal parameter may stand for any number of actual ones.
            kinds = [formal[min(i, len(formal) - 1)].type_str for i in range(len(names))]
            return [
                name in self._wide and "tensor(float16)" in allowed.get(kind, ())
                for kind, name in zip(kinds, names, strict=True)
            ]

        inputs = can(list(schema.inputs), list(node.input))
        outputs = can(list(schema.outputs), list(node.output))
        # A type that the operator doesn't have in 16 bits holds back the whole node.
        bound = [n in self._wide for n in node.output]
        return (inputs, outputs) if any(outputs) and outputs == bound else None

    def _refuse_float64(self) -> None:
        kinds = [value.type.tensor_type.elem_type for value in self._graph.input]
        doubles = [name for name, v in self._constants.items() if v.dtype == np.float64 and v.ndim]
        if doubles or TensorProto.DOUBLE in kinds:
            raise ExportError(
                "the model computes in float64, and --fp16 is for models in float32",
                where=doubles[0] if doubles else "",
                hint="Build the model in float32, or export without --fp16.",
            )

    def _keep(self, node: onnx.NodeProto) -> None:
        """Feeds a node that stays in float32, and its bodies, with float32."""
        renamed = {n: self._widened(n) for n in graphs.reads(node) if n in self._narrow}
        graphs.replace_all(node.input, [renamed.get(name, name) for name in node.input])
        for body in graphs.subgraphs(node):
            _rename_outer(body, renamed)
        self._nodes.append(node)

    def _halve(self, node: onnx.NodeProto, inputs: list[bool], outputs: list[bool]) -> None:
        names = []
        for name, may in zip(node.input, inputs, strict=True):
            if may:
                names.append(name if name in self._narrow else self._narrowed(name))
            else:
                names.append(self._widened(name) if name in self._narrow else name)
        graphs.replace_all(node.input, names)
        self._narrow.update(_chosen(node.output, outputs))
        self._nodes.append(node)

    def _narrowed(self, name: str) -> str:
        if name in self._constants:
            half = f"{name}/float16"
            if half not in self._constants:
                self._constants[half] = self._constants[name].astype(np.float16)
            return half
        return self._cast(name, f"{name}/float16", TensorProto.FLOAT16)

    def _widened(self, name: str) -> str:
        return self._cast(name, f"{name}/float32", TensorProto.FLOAT)

    def _cast(self, source: str, target: str, kind: int) -> str:
        if target not in self._casts:
            self._casts[target] = source
            self._nodes.append(helper.make_node("Cast", [source], [target], to=kind))
        return target

    def _restore(self, name: str) -> None:
        """Gives a graph output its float32 and its name back."""
        inner = f"{name}/inner"
        renamed = {name: inner, f"{name}/float32": name}
        for node in self._nodes:
            graphs.replace_all(node.input, [renamed.get(n, n) for n in node.input])
            graphs.replace_all(node.output, [renamed.get(n, n) for n in node.output])
            for body in graphs.subgraphs(node):
                _rename_outer(body, renamed)
        if f"{name}/float32" not in self._casts:
            self._nodes.append(helper.make_node("Cast", [inner], [name], to=TensorProto.FLOAT))


def _chosen(names: Iterable[str], which: Iterable[bool]) -> list[str]:
    return [name for name, chosen in zip(names, which, strict=True) if chosen]


def _float32_tensors(light: onnx.ModelProto, constants: dict[str, Array]) -> set[str]:
    """Names of all float32 tensors of the main graph."""
    model = graphs.typed(light, constants)
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            # Types and shapes pass through it as through this one, which onnx knows.
            node.domain, node.op_type = "", "InstanceNormalization"
            graphs.replace_all(node.attribute, [])
    known = shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*known.input, *known.value_info, *known.output)
    found = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {name for name, value in constants.items() if value.dtype == np.float32}


def _rename_outer(body: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Renames what a body reads from outside."""
    outer = {name: renamed[name] for name in graphs.outer_reads(body) if name in renamed}
    if not outer:
        return
    for node in body.node:
        graphs.replace_all(node.input, [outer.get(name, name) for name in node.input])
        for inner in graphs.subgraphs(node):
            _rename_outer(inner, outer)
    for value in body.output:
        value.name = outer.get(value.name, value.name)
