"""The calls of tf2onnx, and what it takes to trust them.

tf2onnx logs what it can't convert and goes on, hides exceptions of its optimiser, and leaves
operations that it doesn't know in the graph. Here each of these is an `ExportError`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tf2onnx
from tf2onnx import optimizer, schemas
from tf2onnx.tfonnx import process_tf_graph

from layerswap.errors import ExportError
from layerswap.keras_graph import carrier
from layerswap.keras_graph.freezing import Frozen
from layerswap.keras_graph.interface import Interface

# How Keras begins a message about a failing call.
CALLING = "Exception encountered when calling layer"
# How it ends: below come the tensors that the layers were called with, the innermost first.
_ARGUMENTS = "Call arguments received by layer"
# How AutoGraph begins a traceback, and an entry of it: place and, deeper indented, source line.
_USER_CODE = "in user code:"
_FRAME = re.compile(r"^( *)File \".+\", line \d+, in .*\n(?:\1 +\S.*\n)?", re.MULTILINE)

# What tf2onnx adds about its own functions, as `(fct=<bound method LookupTableFind.version_8…>)`.
_INTERNALS = re.compile(r"\s*\(fct=[^)]*\)")


def convert(
    frozen: Frozen,
    opset: int,
    sites: Sequence[carrier.CallSite],
    renamed: Mapping[str, str],
    interface: Interface,
    errors: list[str],
) -> Any:
    """A frozen function as an `onnx.ModelProto`.

    Args:
        frozen: the function; the placeholders of its weights become graph inputs.
        opset: version of the ONNX operator set.
        sites: the call sites of GroupNormalization, in the order of their numbers.
        renamed: names of inputs and outputs, by their tensor names in the function.
        interface: says which of them become channels first.
        errors: what `collected_errors` gives.

    Raises:
        ExportError: something has no ONNX form; names the operation and, where known, its
            place in the model.
    """
    try:
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
            tf.import_graph_def(frozen.graph_def, name="")
            converted = process_tf_graph(
                graph,
                opset=opset,
                input_names=[*frozen.inputs, *frozen.arrays],
                output_names=frozen.outputs,
                tensors_to_rename=dict(renamed),
                inputs_as_nchw=list(interface.inputs_as_nchw),
                outputs_as_nchw=list(interface.outputs_as_nchw),
                initialized_tables=frozen.tables,
                custom_op_handlers={"Erfc": (_complement, [])},
                custom_rewriter=[carrier.rewriter(sites)],
                extra_opset=[tf2onnx.utils.make_opsetid(carrier.DOMAIN, 1)],
            )
            _widen_scalars(converted)
            # Without this tf2onnx copies the graph at each step and hides what fails.
            converted = optimizer.optimize_graph(converted, catch_errors=False)
            model = converted.make_model("")
    except Exception as error:
        cause = reason(error)
        if errors and cause not in errors[0]:
            cause = f"{errors[0]}: {cause}"
        raise ExportError(f"tf2onnx could not convert the model: {cause}") from error
    _check_operations(model.graph, opset)
    if errors:
        raise ExportError(f"tf2onnx could not convert the model: {errors[0]}")
    return model


def _complement(graph: Any, node: Any, name: str, _: list[Any]) -> None:
    """Erfc(x), which TensorFlow's GELU is made of, as 1 − Erf(x)."""
    x, y = node.input[0], node.output[0]
    dtype, shape = graph.get_dtype(y), graph.get_shape(y)
    graph.remove_node(name)
    erf = graph.make_node("Erf", [x], shapes=[shape], dtypes=[dtype])
    one = np.ones([1] if shape else [], tf2onnx.utils.map_onnx_to_numpy_type(dtype))
    constant = graph.make_const(tf2onnx.utils.make_name(name), one)
    inputs = [constant.output[0], erf.output[0]]
    graph.make_node("Sub", inputs, outputs=[y], shapes=[shape], dtypes=[dtype])


def _widen_scalars(graph: Any) -> None:
    """Gives scalars that are added an axis of length 1, which broadcasts alike.

    tf2onnx's optimiser takes what is added to a convolution for a bias, and fails on scalars.
    """
    for node in list(graph.get_nodes()):
        if node.type == "Add" and node.inputs[1] is not None and node.inputs[1].is_const():
            scalar = node.inputs[1].get_tensor_value(as_list=False)
            if scalar.ndim == 0 and graph.get_shape(node.input[0]):
                name = tf2onnx.utils.make_name(node.name)
                widened = graph.make_const(name, scalar.reshape(1))
                graph.replace_input(node, node.input[1], widened.output[0], 1)


def _check_operations(graph: Any, opset: int) -> None:
    """Refuses operations that no ONNX operator set knows: tf2onnx leaves them in place.

    GroupNorm nodes get their domain back, which tf2onnx loses in the bodies of branches.
    """
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _check_operations(body, opset)
        if node.op_type == carrier.OP_TYPE:
            node.domain = carrier.DOMAIN
        elif not _is_known(node, opset):
            raise ExportError(
                f"the operation {node.op_type} has no ONNX form at opset {opset}",
                where=node.name.split("__")[0],
            )


def groupnorm_paths(graph: Any) -> Iterator[str]:
    """The path of every GroupNorm node, bodies of loops and branches included."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from groupnorm_paths(body)
            if node.op_type == carrier.OP_TYPE and attribute.name == "path":
                yield attribute.s.decode()


def _is_known(node: Any, opset: int) -> bool:
    if node.domain not in ("", "ai.onnx.ml"):
        return False
    try:
        return schemas.get_schema(node.op_type, opset, node.domain) is not None
    except KeyError:
        return False


@contextmanager
def collected_errors() -> Iterator[list[str]]:
    """Keeps tf2onnx and TensorFlow off the terminal; gives what tf2onnx logged as errors."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage().splitlines()[0]
            messages.append(_INTERNALS.sub("", line))

    collector = Collector(logging.ERROR)
    loggers = [logging.getLogger("tf2onnx"), tf.get_logger()]
    before = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
        log.propagate = False
        log.handlers = []
    loggers[0].addHandler(collector)
    loggers[1].addHandler(logging.NullHandler())
    try:
        yield messages
    finally:
        for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
            log.setLevel(level)
            log.propagate = propagate
            log.handlers = handlers


def reason(error: BaseException) -> str:
    """The line of a message that says what is wrong; AutoGraph and Keras wrap it in others."""
    text = str(error).split(_ARGUMENTS)[0]
    text = _FRAME.sub("", text)
    lines = [line.strip() for line in text.splitlines()]
    lines = [s for s in lines if s and s != _USER_CODE and CALLING not in s]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception):", line)]
    found = next(iter(raised[-1:] or lines), type(error).__name__)
    return found.removeprefix("make_sure failure: ").rstrip(": ")
