"""Keras model → ONNX graph plus the arrays that belong into it.

The graph comes without the large weights and with one `layerswap::GroupNorm` node for each
call of a GroupNormalization layer; `onnx_graph` puts in the first and expands the second.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
import tf2onnx
from tf2onnx import optimizer, schemas, tf_loader
from tf2onnx.tfonnx import process_tf_graph

from layerswap.errors import ExportError
from layerswap.keras_graph import carrier, tracing
from layerswap.keras_graph.freezing import Frozen, freeze_without_weights, inlined
from layerswap.records import Array

LOWEST_OPSET = 13
HIGHEST_OPSET = 18

Progress = Callable[[str], None]

# tf2onnx keeps functions and name counters in its modules.
_CONVERTING = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A model as an ONNX graph whose large weights are still apart.

    Attributes:
        graph: an `onnx.ModelProto`; the weights in `arrays` are among its graph inputs.
        arrays: value of each such input.
        groupnorms: the calls of GroupNormalization, one for each GroupNorm node.
        input_names: the model's own inputs, in order.
        output_names: the model's outputs, in order.
    """

    graph: Any
    arrays: Mapping[str, Array]
    groupnorms: tuple[carrier.CallSite, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def trace(model: Any, *, opset: int = HIGHEST_OPSET, progress: Progress | None = None) -> Traced:
    """Traces a tf_keras model for inference and converts it; the model stays as it is.

    Args:
        model: Sequential, Functional, or a subclassed model that has been called.
        opset: version of the ONNX operator set, 13 to 18.
        progress: called with a word for each stage as it begins.

    Raises:
        ExportError: the opset isn't supported, the model can't be traced, or some operation
            has no ONNX form; names the layer and the operation.
    """
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        word = "highest" if opset > HIGHEST_OPSET else "lowest"
        limit = HIGHEST_OPSET if opset > HIGHEST_OPSET else LOWEST_OPSET
        raise ExportError(f"opset {opset} is not supported: {limit} is the {word} for now")
    report = progress or (lambda stage: None)
    specs = _input_specs(model)
    with _CONVERTING, _collected_errors() as errors:
        report("trace")
        concrete, sites, labels = _concrete(model, specs)
        inputs = [t.name for t in concrete.inputs[: len(specs)]]
        outputs = [t.name for t in concrete.outputs]
        taken: set[str] = set()
        input_names = _unique([spec.name for spec in specs], taken)
        output_names = _unique(_output_names(model, labels), taken)
        renamed = dict(zip(inputs + outputs, input_names + output_names, strict=True))

        def convert(frozen: Frozen) -> Traced:
            report("convert")
            graph = _convert(frozen, opset, sites, renamed, errors)
            # Dead calls went on the way: recurrent layers trace their cell once for its shape.
            kept = [next(s for s in sites if s.path == path) for path in _groupnorms(graph.graph)]
            kept.sort(key=sites.index)
            return Traced(
                graph, frozen.arrays, tuple(kept), tuple(input_names), tuple(output_names)
            )

        report("freeze")
        light = freeze_without_weights(concrete, inputs, outputs)
        if light is not None:
            try:
                return convert(light)
            except ExportError:
                # Some converters want a weight's value; they get it, at the price of time.
                errors.clear()
        return convert(_freeze_with_weights(model, concrete, inputs, outputs))


def _input_specs(model: Any) -> list[Any]:
    """One TensorSpec per input, batch dynamic, with the name that Keras gives it."""
    tensors = getattr(model, "inputs", None)
    if tensors:
        names = list(getattr(model, "input_names", None) or [])
        specs = [getattr(t, "type_spec", None) or tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    else:
        saved = model.save_spec() if hasattr(model, "save_spec") else None
        if saved is None:
            raise ExportError(
                "the model's inputs are unknown",
                hint="Call the model once on sample data before the export.",
            )
        names, specs = [], tf.nest.flatten(saved[0])
    if len(names) != len(specs):
        names = [_plain(getattr(s, "name", None)) or f"input_{i + 1}" for i, s in enumerate(specs)]
    for name, spec in zip(names, specs, strict=True):
        if not isinstance(spec, tf.TensorSpec):
            raise ExportError(f"input '{name}' is sparse or ragged; ONNX has dense tensors only")
        if spec.shape.rank is None:
            raise ExportError(f"input '{name}' has no fixed number of axes")
    return [
        tf.TensorSpec([None, *s.shape[1:]] if s.shape.rank else s.shape, s.dtype, name)
        for name, s in zip(names, specs, strict=True)
    ]


def _concrete(model: Any, specs: Sequence[Any]) -> tuple[Any, list[carrier.CallSite], list[str]]:
    """The inference call as a concrete function, its GroupNorm calls, and output labels."""
    carriers = carrier.Carriers(model.name)
    labels: list[str] = []
    saved = None if getattr(model, "inputs", None) else model.save_spec()

    def serve(*tensors: Any) -> list[Any]:
        carriers.begin()
        if saved is None:
            result = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        else:
            positional = tf.nest.pack_sequence_as(saved[0], tensors)
            result = model(*positional, training=False)
        labels[:] = _labels(result)
        # Identities: the same tensor may be an output twice, or an input as well.
        return [tf.identity(t) for t in tf.nest.flatten(result)]

    # Names of Keras layers may hold characters that names of arguments may not.
    plain = [tf.TensorSpec(s.shape, s.dtype, f"layerswap_{i}") for i, s in enumerate(specs)]
    try:
        with tracing.groupnorm_call(carriers):
            concrete = tf.function(serve).get_concrete_function(*plain)
    except Exception as error:
        if carriers.failure is not None:
            raise carriers.failure from None
        raise ExportError(f"the model can't be traced: {_reason(error)}") from error
    return concrete, carriers.sites, labels


def _labels(result: Any) -> list[str]:
    """Names for outputs that Keras has none for: dictionary keys, or a number."""
    if isinstance(result, Mapping) and not any(tf.nest.is_nested(v) for v in result.values()):
        return [str(key) for key in sorted(result)]
    count = len(tf.nest.flatten(result))
    return [f"output_{i + 1}" for i in range(count)]


def _output_names(model: Any, labels: list[str]) -> list[str]:
    names = list(getattr(model, "output_names", None) or [])
    return names if len(names) == len(labels) else labels


def _unique(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names, a number behind those already in `taken`, which they all join."""
    result = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate)
        result.append(candidate)
    return result


def _freeze_with_weights(
    model: Any, concrete: Any, inputs: list[str], outputs: list[str]
) -> Frozen:
    """The function with its weights as constants: loops, recurrent layers, lookup tables."""
    try:
        with tf.device("/cpu:0"):
            graph_def, tables = tf_loader.from_trackable(model, concrete, inputs, outputs, False)
    except Exception as error:
        raise ExportError(f"the model's weights can't be frozen: {_reason(error)}") from error
    return Frozen(inlined(inputs, outputs, graph_def), inputs, outputs, {}, tables)


def _convert(
    frozen: Frozen,
    opset: int,
    sites: Sequence[carrier.CallSite],
    renamed: Mapping[str, str],
    errors: list[str],
) -> Any:
    try:
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
            tf.import_graph_def(frozen.graph_def, name="")
            converted = process_tf_graph(
                graph,
                opset=opset,
                input_names=[*frozen.inputs, *frozen.arrays],
                output_names=frozen.outputs,
                tensors_to_rename=dict(renamed),
                initialized_tables=frozen.tables,
                custom_rewriter=[carrier.rewriter(sites)],
                extra_opset=[tf2onnx.utils.make_opsetid(carrier.DOMAIN, 1)],
            )
            # Without this tf2onnx copies the graph at each step and hides what fails.
            converted = optimizer.optimize_graph(converted, catch_errors=False)
            model = converted.make_model("")
    except Exception as error:
        reason = errors[0] if errors else _reason(error)
        raise ExportError(f"tf2onnx could not convert the model: {reason}") from error
    _check_operations(model.graph, opset)
    if errors:
        raise ExportError(f"tf2onnx could not convert the model: {errors[0]}")
    return model


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


def _groupnorms(graph: Any) -> Iterator[str]:
    """The path of every GroupNorm node, bodies of loops and branches included."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _groupnorms(body)
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
def _collected_errors() -> Iterator[list[str]]:
    """Keeps tf2onnx and TensorFlow off the terminal; gives what tf2onnx logged as errors."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().splitlines()[0])

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


def _plain(name: str | None) -> str | None:
    return name.split(":")[0] if name else None


def _reason(error: BaseException) -> str:
    """The line of a message that says what is wrong; AutoGraph and Keras wrap it in others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    if lines and lines[0].startswith("Exception encountered when calling layer"):
        return " ".join(lines[:2])
    return next(iter(raised or lines), type(error).__name__)
