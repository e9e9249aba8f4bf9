"""A traced function as a GraphDef that holds no large weights.

tf2onnx copies every constant several times. Where the weights are named inputs instead the
conversion costs the same whatever their size, and no protobuf limit is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tf2onnx.tf_loader import tf_optimize

from layerswap.errors import ExportError
from layerswap.keras_graph.weights import view
from layerswap.records import Array

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_CONTROL_FLOW = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"}
# Grappler makes up a value for every Placeholder, as large as the weight that it stands for. It
# treats this operation alike but for that; the two have the same attributes.
_STAND_IN = "FakeParam"
_NEVER_INLINED = ("_XlaMustCompile", "_noinline")


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """A function without variables.

    Attributes:
        graph_def: its operations, optimised by TensorFlow for inference.
        inputs: tensor names of the function's own inputs (`x:0`), in order.
        outputs: tensor names of the results, in order.
        arrays: tensor name of each placeholder that stands for a weight, with its value.
        tables: contents of lookup tables as tf2onnx wants them.
    """

    graph_def: Any
    inputs: list[str]
    outputs: list[str]
    arrays: dict[str, Array]
    tables: dict[Any, Any]


def freeze_without_weights(concrete: Any, inputs: list[str], outputs: list[str]) -> Frozen | None:
    """Replaces every weight of two or more axes by a placeholder, smaller ones by a constant.

    Args:
        concrete: a concrete function whose captures are variables and eager tensors.
        inputs: tensor names of its own inputs.
        outputs: tensor names of its results.

    Returns:
        None where the function can't be put this way: loops, branches, lookup tables, or
        operations on variables other than reading.

    Raises:
        ExportError: TensorFlow refuses to optimise the graph.
    """
    graph_def = concrete.graph.as_graph_def()
    captured = {inner.op.name: outer for outer, inner in concrete.graph.captures}
    operations = {node.op for node in graph_def.node}
    bodies = {node.op for f in graph_def.library.function for node in f.node_def}
    if (operations | bodies) & _CONTROL_FLOW:
        return None
    # Grappler drops inputs that it isn't told of.
    held = [*inputs, *(f"{name}:0" for name in captured)]
    graph_def = inlined(held, outputs, graph_def)
    if {node.op for node in graph_def.node} & _CALLS:
        return None

    rebuilt = _Rebuilt(graph_def, captured)
    for name in (*inputs, *outputs):
        rebuilt.visit(name.split(":")[0])
    if not rebuilt.possible:
        return None
    optimised = _optimize([*inputs, *rebuilt.arrays], outputs, rebuilt.graph_def)
    for node in optimised.node:
        if node.op == _STAND_IN:
            node.op = "Placeholder"
    return Frozen(optimised, inputs, outputs, rebuilt.arrays, {})


def inlined(inputs: list[str], outputs: list[str], graph_def: Any) -> Any:
    """The graph with the bodies of functions in the place of their calls.

    Keras compiles grouped convolutions by XLA; calls marked so are never inlined, hence the
    mark goes.

    Args:
        inputs: tensor names of everything that is fed.
        outputs: tensor names of the results.
        graph_def: not changed.
    """
    if not {node.op for node in graph_def.node} & _CALLS:
        return graph_def
    unmarked = tf.compat.v1.GraphDef()
    unmarked.CopyFrom(graph_def)
    bodies = unmarked.library.function
    for holder in (*unmarked.node, *bodies, *(node for f in bodies for node in f.node_def)):
        for mark in _NEVER_INLINED:
            holder.attr.pop(mark, None)
    return _optimize(inputs, outputs, unmarked)


def _optimize(inputs: list[str], outputs: list[str], graph_def: Any) -> Any:
    try:
        with tf.Graph().as_default():  # where eager execution is on it refuses
            return tf_optimize(inputs, outputs, graph_def)
    except Exception as error:
        raise ExportError(f"TensorFlow can't optimise the model's graph: {error}") from error


class _Rebuilt:
    """Copies the operations that the results need, with reads of variables replaced."""

    def __init__(self, graph_def: Any, captured: dict[str, Any]) -> None:
        self.graph_def = tf.compat.v1.GraphDef(versions=graph_def.versions)
        self.arrays: dict[str, Array] = {}
        self.possible = True
        self._nodes = {node.name: node for node in graph_def.node}
        self._captured = captured
        self._done: set[str] = set()
        # Variable → the operation that stands for it; a weight read twice is stored once.
        self._stand_ins: dict[str, str] = {}

    def visit(self, root: str) -> None:
        """Copies `root` and everything it depends on."""
        pending = [root]
        while pending:
            name = pending.pop()
            if name in self._done:
                continue
            self._done.add(name)
            pending += self._copy(self._nodes[name])

    def _copy(self, node: Any) -> list[str]:
        if node.op == "ReadVariableOp":
            self._read(node)
            return []
        if node.op == "ResourceGather":
            return self._gather(node)
        if node.name in self._captured:
            outer = self._captured[node.name]
            if outer.dtype in (tf.resource, tf.variant):
                self.possible = False
            else:
                self._stand_in(node.name, view(outer))
            return []
        copy = self.graph_def.node.add()
        copy.CopyFrom(node)
        # Control edges order side effects, of which inference has none.
        del copy.input[:]
        copy.input.extend(i for i in node.input if not i.startswith("^"))
        return [_producer(i) for i in copy.input]

    def _read(self, node: Any) -> None:
        stand_in = self._weight(node.input[0], node.attr["dtype"].type, node.name)
        if stand_in is not None and stand_in != node.name:
            copy = self.graph_def.node.add(op="Identity", name=node.name, input=[stand_in])
            copy.attr["T"].CopyFrom(node.attr["dtype"])

    def _gather(self, node: Any) -> list[str]:
        dtype, index_type = node.attr["dtype"], node.attr["Tindices"]
        stand_in = self._weight(node.input[0], dtype.type, f"{node.name}/params")
        if stand_in is None:
            return []
        axis = f"{node.name}/axis"
        self._constant(axis, node.attr["batch_dims"].i)
        copy = self.graph_def.node.add(op="GatherV2", name=node.name)
        copy.input.extend([stand_in, node.input[1], axis])
        copy.attr["Tparams"].CopyFrom(dtype)
        copy.attr["Tindices"].CopyFrom(index_type)
        copy.attr["batch_dims"].i = node.attr["batch_dims"].i
        copy.attr["Taxis"].type = tf.int32.as_datatype_enum
        return [_producer(node.input[1])]

    def _weight(self, source: str, dtype: int, name: str) -> str | None:
        """Name of the operation that gives a variable's value; made as `name` when new."""
        while self._nodes[_producer(source)].op == "Identity":  # left behind by inlining
            source = self._nodes[_producer(source)].input[0]
        variable = _producer(source)
        handle = self._captured.get(variable)
        if handle is None or handle.dtype != tf.resource:
            self.possible = False
            return None
        if variable not in self._stand_ins:
            value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.as_dtype(dtype))
            self._stand_in(name, view(value))
            self._stand_ins[variable] = name
        return self._stand_ins[variable]

    def _stand_in(self, name: str, value: Any) -> None:
        if value.ndim < 2:
            self._constant(name, value)
            return
        dtype = tf.as_dtype(value.dtype)
        node = self.graph_def.node.add(op=_STAND_IN, name=name)
        node.attr["dtype"].type = dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(value.shape).as_proto())
        self.arrays[f"{name}:0"] = value

    def _constant(self, name: str, value: Any) -> None:
        if isinstance(value, int):
            proto = tf.make_tensor_proto(value, dtype=tf.int32)
        else:
            proto = tf.make_tensor_proto(value)
        node = self.graph_def.node.add(op="Const", name=name)
        node.attr["dtype"].type = proto.dtype
        node.attr["value"].tensor.CopyFrom(proto)


def _producer(tensor: str) -> str:
    return tensor.lstrip("^").split(":")[0]
