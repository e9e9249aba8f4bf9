"""Keras model → ONNX graph plus the arrays that belong into it.

The graph comes without the large weights and with one `layerswap::GroupNorm` node for each
call of a GroupNormalization layer; `onnx_graph` puts in the first and expands the second.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tf2onnx import tf_loader

from layerswap.errors import ExportError
from layerswap.keras_graph import carrier, converter, tracing
from layerswap.keras_graph.freezing import Frozen, freeze_without_weights, inlined
from layerswap.keras_graph.interface import (
    Interface,
    call_arguments,
    channels_first,
    fix_shapes,
    input_specs,
    refuse_arguments,
    refuse_channels_first,
)
from layerswap.options import Shape
from layerswap.records import TRACED_OPSET, Array

# tf2onnx keeps functions and name counters in its modules.
_CONVERTING = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A model as an ONNX graph whose large weights are still apart.

    Attributes:
        graph: an `onnx.ModelProto`; the weights in `arrays` are among its graph inputs.
        arrays: value of each such input.
        groupnorms: the calls of GroupNormalization, one for each GroupNorm node.
        interface: the model's own inputs and outputs as they are in the graph.
        weight_free: whether the conversion was done without the weights; loops, branches and
            lookup tables need theirs, and so do operations whose ONNX form depends on a value.
    """

    graph: Any
    arrays: Mapping[str, Array]
    groupnorms: tuple[carrier.CallSite, ...]
    interface: Interface
    weight_free: bool


def trace(
    model: Any,
    *,
    opset: int = TRACED_OPSET,
    input_shape: Mapping[str, Shape] | None = None,
    inputs_as_nchw: Sequence[str] = (),
    outputs_as_nchw: Sequence[str] = (),
) -> Traced:
    """Traces a tf_keras model for inference and converts it; the model stays as it is.

    Args:
        model: Sequential, Functional, or a subclassed model that has been called.
        opset: version of the ONNX operator set, 13 to 18.
        input_shape: shapes to fix inputs to, as in `ExportOptions`.
        inputs_as_nchw, outputs_as_nchw: what becomes channels first, as in `ExportOptions`.

    Raises:
        ExportError: the model can't be traced, or some operation has no ONNX form; names the
            layer and the operation.
        UsageError: a shape doesn't fit the model, or there is no such input or output.
    """
    refuse_arguments(model)
    specs = fix_shapes(input_specs(model), input_shape or {})
    with _CONVERTING, converter.collected_errors() as errors:
        concrete, sites, labels = _concrete(model, specs)
        inputs = [t.name for t in concrete.inputs[: len(specs)]]
        outputs = [t.name for t in concrete.outputs]
        taken: set[str] = set()
        input_names = _unique([spec.name for spec in specs], taken)
        output_names = _unique(_output_names(model, labels), taken)
        renamed = dict(zip(inputs + outputs, input_names + output_names, strict=True))
        in_ranks = {n: spec.shape.rank for n, spec in zip(input_names, specs, strict=True)}
        out_ranks = {n: t.shape.rank for n, t in zip(output_names, concrete.outputs, strict=True)}
        interface = Interface(
            tuple(input_names),
            tuple(output_names),
            tuple(tuple(spec.shape.as_list()) for spec in specs),
            channels_first("input", inputs_as_nchw, in_ranks),
            channels_first("output", outputs_as_nchw, out_ranks),
        )

        refuse_channels_first(model, input_names, interface.inputs_as_nchw)

        def convert(frozen: Frozen, weight_free: bool) -> Traced:
            graph = converter.convert(frozen, opset, sites, renamed, interface, errors)
            # Dead calls went on the way: recurrent layers trace their cell once for its shape.
            kept = [
                next(s for s in sites if s.path == path)
                for path in converter.groupnorm_paths(graph.graph)
            ]
            kept.sort(key=sites.index)
            return Traced(graph, frozen.arrays, tuple(kept), interface, weight_free)

        try:
            light = freeze_without_weights(concrete, inputs, outputs)
            if light is not None:
                return convert(light, True)
        except ExportError:
            # Some converters want a weight's value; they get it, at the price of time.
            errors.clear()
        return convert(_freeze_with_weights(model, concrete, inputs, outputs), False)


def _concrete(model: Any, specs: Sequence[Any]) -> tuple[Any, list[carrier.CallSite], list[str]]:
    """The inference call as a concrete function, its GroupNorm calls, and output labels."""
    carriers = carrier.Carriers(model.name)
    labels: list[str] = []
    arguments = None if getattr(model, "inputs", None) else call_arguments(model)

    def serve(*tensors: Any) -> list[Any]:
        carriers.begin()
        if arguments is None:
            result = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        else:
            positional = tf.nest.pack_sequence_as(arguments, tensors)
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
        message = f"the model can't be traced: {converter.reason(error)}"
        raise ExportError(message, where=_innermost_layer(error)) from error
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
        raise ExportError(
            f"the model's weights can't be frozen: {converter.reason(error)}"
        ) from error
    return Frozen(inlined(inputs, outputs, graph_def), inputs, outputs, {}, tables)


def _innermost_layer(error: BaseException) -> str:
    """Name of the layer whose call failed, or nothing."""
    return next(iter(re.findall(rf"{converter.CALLING} ['\"](.+?)['\"]", str(error))[-1:]), "")
