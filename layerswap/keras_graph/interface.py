"""What a model's inputs and outputs are called and how they are laid out in an artifact."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tf_keras.layers import RNN

from layerswap.errors import ExportError, UsageError
from layerswap.options import ANY, Shape


@dataclass(frozen=True, slots=True)
class Interface:
    """The inputs and outputs of an artifact, in Keras's order.

    Attributes:
        inputs, outputs: their names; no outputs where Keras has no names for them.
        shapes: of each input, in Keras's layout, None where an axis is open.
        inputs_as_nchw, outputs_as_nchw: those that are channels first in the artifact, though
            channels last in Keras.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    inputs_as_nchw: tuple[str, ...] = ()
    outputs_as_nchw: tuple[str, ...] = ()


def has_fixed_batch(model: Any) -> bool:
    """Whether the model works with the batch size of its `inputs` alone.

    That size says little: a Sequential model without an Input takes it from its first call, and
    `.keras` files keep it. What counts is whether the state of a recurrent layer has it, or an
    output still has it when the inputs are open.
    """
    tensors = getattr(model, "inputs", None) or []
    if not any(tensor.shape.rank and tensor.shape[0] for tensor in tensors):
        return False
    if any(isinstance(layer, RNN) and layer.stateful for layer in model._flatten_layers()):
        return True
    opened = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in tensors]

    def call(*inputs: Any) -> Any:
        nested = getattr(model, "_nested_inputs", tensors)
        return tf.nest.flatten(model(tf.nest.pack_sequence_as(nested, inputs), training=False))

    try:
        outputs = tf.function(call).get_concrete_function(*opened).outputs
    except Exception:  # whatever a layer raises that wants its own batch size
        return True
    return any(tensor.shape.rank and tensor.shape[0] is not None for tensor in outputs)


def batch_shapes(model: Any, specs: Sequence[Any]) -> list[Any]:
    """The shapes of a model's inputs, the batch open unless the model works with its own alone.

    Args:
        model: whose inputs they are.
        specs: one for each.
    """
    if has_fixed_batch(model):
        return [spec.shape for spec in specs]
    return [tf.TensorShape([None, *s.shape[1:]]) if s.shape.rank else s.shape for s in specs]


def call_arguments(model: Any) -> tuple[Any, ...]:
    """What a subclassed model was called with by position, a spec in the place of each tensor.

    Values behind the last tensor, such as `training`, are left to their defaults.

    Raises:
        ExportError: it was never called.
    """
    saved = model.save_spec() if hasattr(model, "save_spec") else None
    if saved is None:
        raise ExportError(
            "the model's inputs are unknown",
            where=str(getattr(model, "name", "")),
            hint="Call the model once on sample data before the export.",
        )
    arguments = list(saved[0])
    while len(arguments) > 1 and arguments[-1] is None:
        arguments.pop()
    return tuple(arguments)


def refuse_arguments(model: Any) -> None:
    """Refuses calls that an artifact, which takes tensors by position, can't repeat.

    Raises:
        ExportError: the model was called with tensors by keyword, or with values among its
            tensors; names the argument.
    """
    saved = None if getattr(model, "inputs", None) else model.save_spec()
    if saved is None:
        return
    for name, value in saved[1].items():
        if any(isinstance(spec, tf.TypeSpec) for spec in tf.nest.flatten(value)):
            raise ExportError(
                f"the model was called with the tensor '{name}' by keyword, which an exported "
                "model can't take",
                where=str(model.name),
                hint="Make the model anew, and call it with all its tensors by position.",
            )
    parameters = [*inspect.signature(model.call).parameters]
    for name, value in zip(parameters, saved[0], strict=False):
        if None in tf.nest.flatten(value) and name not in ("training", "mask"):
            raise ExportError(
                f"the model was called with a '{name}' that isn't made of tensors alone",
                where=str(model.name),
                hint="Make it an attribute of the model, or give the argument of `call` a default "
                "and call the model without it.",
            )


def input_specs(model: Any) -> list[Any]:
    """One TensorSpec per input with the name that Keras gives it.

    The batch is open unless the model works with its own alone.

    Raises:
        ExportError: the inputs are unknown, sparse or ragged, or have no fixed number of axes.
    """
    tensors = getattr(model, "inputs", None)
    if tensors:
        names = list(getattr(model, "input_names", None) or [])
        specs = [getattr(t, "type_spec", None) or tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    else:
        names, specs = [], tf.nest.flatten(call_arguments(model))
    if len(names) != len(specs):
        names = [_plain(getattr(s, "name", None)) or f"input_{i + 1}" for i, s in enumerate(specs)]
    for name, spec in zip(names, specs, strict=True):
        if not isinstance(spec, tf.TensorSpec):
            raise ExportError(f"input '{name}' is sparse or ragged; ONNX has dense tensors only")
        if spec.shape.rank is None:
            raise ExportError(f"input '{name}' has no fixed number of axes")
    shapes = batch_shapes(model, specs)
    return [
        tf.TensorSpec(shape, spec.dtype, name)
        for name, spec, shape in zip(names, specs, shapes, strict=True)
    ]


def fix_shapes(specs: Sequence[Any], wanted: Mapping[str, Shape]) -> list[Any]:
    """The specs with open axes fixed as `wanted`: by name, or `all` for the only input.

    A batch that the model fixes is opened where an open one is wanted.

    Raises:
        UsageError: there is no such input, or the shape contradicts the model's.
    """
    if ANY in wanted and len(wanted) == len(specs) == 1:
        wanted = {specs[0].name: wanted[ANY]}
    names = [spec.name for spec in specs]
    for name in wanted:
        if name not in names:
            known = ", ".join(f"{n}=..." for n in names)
            raise UsageError(f"input_shape: say which of the inputs is meant: {known}")
    fixed = []
    for spec in specs:
        shape = wanted.get(spec.name, tuple(spec.shape))
        if not spec.shape.is_compatible_with(shape):
            raise UsageError(
                f"input_shape {_text(shape)} contradicts the model's {_text(tuple(spec.shape))}",
                where=spec.name,
            )
        merged = spec.shape.merge_with(shape)
        if shape and shape[0] is None:
            merged = [None, *merged[1:]]
        fixed.append(tf.TensorSpec(merged, spec.dtype, spec.name))
    return fixed


def channels_first(
    kind: str, wanted: Sequence[str], ranks: Mapping[str, int | None]
) -> tuple[str, ...]:
    """Which inputs or outputs change to channels first.

    Args:
        kind: "input" or "output", for messages.
        wanted: names, or `all` for each of rank 4.
        ranks: number of axes of each, by name.

    Raises:
        UsageError: there is no such name, or it has another rank; or none has rank 4.
    """
    if tuple(wanted) == (ANY,):
        images = tuple(name for name, rank in ranks.items() if rank == 4)
        if not images:
            raise UsageError(f"no {kind} has 4 axes: none can become channels first")
        return images
    for name in wanted:
        if name not in ranks:
            raise UsageError(f"there is no {kind} '{name}'; there is {', '.join(ranks)}")
        if ranks[name] != 4:
            raise UsageError(
                f"{kind} '{name}' has {ranks[name]} axes; only one of 4 can become channels first"
            )
    return tuple(wanted)


def refuse_channels_first(model: Any, names: Sequence[str], inputs: Sequence[str]) -> None:
    """Refuses to permute inputs that are channels first in Keras already, where that shows.

    Args:
        model: any model; what can be asked is one with `inputs`.
        names: of all its inputs, in order.
        inputs: those that are to become channels first.

    Raises:
        UsageError: the first layers behind one of them that have a layout are channels first.
    """
    for name, tensor in zip(names, tf.nest.flatten(getattr(model, "inputs", None)), strict=False):
        if name in inputs and _reads_channels_first(tensor):
            raise UsageError(
                f"input '{name}' is channels first in the model already: leave it out of "
                "inputs_as_nchw"
            )


def _reads_channels_first(tensor: Any) -> bool:
    """Whether the nearest layers with a layout that read the tensor are channels first."""
    history = getattr(tensor, "_keras_history", None)
    pending, seen = [history.layer] if history else [], set()
    while pending:
        layer = pending.pop()
        seen.add(id(layer))
        layouts = [
            layout
            for part in layer._flatten_layers()
            if isinstance(layout := getattr(part, "data_format", None), str)
        ]
        if layouts:
            if layouts[0] == "channels_first":
                return True
            continue
        behind = [node.layer for node in getattr(layer, "_outbound_nodes", ())]
        pending += [other for other in behind if id(other) not in seen]
    return False


def _plain(name: str | None) -> str | None:
    return name.split(":")[0] if name else None


def _text(shape: Shape) -> str:
    return ",".join("?" if size is None else str(size) for size in shape)
