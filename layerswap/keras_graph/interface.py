"""What a model's inputs and outputs are called and how they are laid out in an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

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


def input_specs(model: Any) -> list[Any]:
    """One TensorSpec per input, batch open, with the name that Keras gives it.

    Raises:
        ExportError: the inputs are unknown, sparse or ragged, or have no fixed number of axes.
    """
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


def fix_shapes(specs: Sequence[Any], wanted: Mapping[str, Shape]) -> list[Any]:
    """The specs with open axes fixed as `wanted`: by name, or `all` for the only input.

    Raises:
        UsageError: there is no such input, or the shape contradicts the model's.
    """
    if ANY in wanted and len(specs) == 1:
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
        fixed.append(tf.TensorSpec(spec.shape.merge_with(shape), spec.dtype, spec.name))
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
        UsageError: there is no such name, or it has another rank.
    """
    if tuple(wanted) == (ANY,):
        return tuple(name for name, rank in ranks.items() if rank == 4)
    for name in wanted:
        if name not in ranks:
            raise UsageError(f"there is no {kind} '{name}'; there is {', '.join(ranks)}")
        if ranks[name] != 4:
            raise UsageError(
                f"{kind} '{name}' has {ranks[name]} axes; only one of 4 can become channels first"
            )
    return tuple(wanted)


def _plain(name: str | None) -> str | None:
    return name.split(":")[0] if name else None


def _text(shape: Shape) -> str:
    return ",".join("?" if size is None else str(size) for size in shape)
