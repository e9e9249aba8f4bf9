"""Asks a Keras model: which inputs it takes, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import Embedding

from layerswap.comparison import (
    DEFAULT_TOLERANCES,
    compare_parity,
    furthest,
    tolerance_for,
    widened,
)
from layerswap.errors import ExportError, LoadError, UsageError, reason_of
from layerswap.keras_graph import storage
from layerswap.keras_graph.interface import Interface, batch_shapes, call_arguments
from layerswap.keras_graph.served import SIGNATURE, call_signature
from layerswap.keras_graph.walk import find_layers
from layerswap.records import Array, Parity
from layerswap.references import Arrays, Reference, random_inputs

# One sample alone and several: what is right at one batch size may be wrong at another.
BATCHES = (1, 3)
SEED = 0
# For axes that the model leaves open, tried in turn: large enough for five halvings first.
OPEN_AXES = (64, 128, 224)
# Without an Embedding nothing says how large an index may be.
FEW_INDICES = 2


def make_reference(
    model: Any,
    source: Any | None,
    interface: Interface,
    sha256: str,
    version: str,
    dtype: str | None = None,
) -> Reference:
    """What the model answers to random inputs at two batch sizes, or at the only one it takes.

    Args:
        model: the model that an artifact was made of.
        source: the BN model, where it is known.
        interface: the artifact's inputs and outputs.
        sha256: the artifact's checksum.
        version: of layerswap.
        dtype: what the artifact computes in, where that is less than the model does.

    Raises:
        ExportError: the model fails on the inputs drawn for it.
        UsageError: the inputs are fixed to different batch sizes.
    """
    failure: Exception | None = None
    batches = _batches(interface)
    for size in OPEN_AXES:
        try:
            drawn = tuple(_draw(model, interface, batch, size) for batch in batches)
            answers = tuple(answer(model, batch, interface.outputs) for batch in drawn)
            before = None
            if source is not None:
                before = tuple(answer(source, batch, interface.outputs) for batch in drawn)
            break
        except Exception as error:  # whatever a user's layer raises
            failure = failure or error
    else:
        assert failure is not None
        raise ExportError(
            "the model fails on the random inputs that it is to be verified with: "
            + reason_of(failure),
            where=str(model.name),
            hint="Export with --no-verify (verify=False) only if you verify the artifact yourself.",
        ) from failure
    if not all(np.isfinite(a).all() for batch in answers for a in batch.values() if a.dtype != "O"):
        raise ExportError(
            "on random inputs the Keras model itself answers NaN or Inf: nothing can be compared",
            where=str(model.name),
            hint="Check the model, or export with --no-verify (verify=False).",
        )
    tolerance = tolerance_for(dtype or compute_dtype(model))
    if tolerance == DEFAULT_TOLERANCES["float32"]:
        moved = {name: _next(array) for name, array in drawn[0].items()}
        tolerance = widened(tolerance, answers[0], answer(model, moved, interface.outputs))
    images = interface.outputs_as_nchw
    return Reference(
        _channels_first(drawn, interface.inputs_as_nchw),
        _channels_first(answers, images),
        None if before is None else _channels_first(before, images),
        sha256,
        tolerance,
        SEED,
        version,
    )


def _next(array: Array) -> Array:
    """Each value moved by one unit in the last place, where it is floating point."""
    if array.dtype.kind != "f":
        return array
    moved: Array = np.nextafter(array, array.dtype.type(np.inf))
    return moved


def _batches(interface: Interface) -> tuple[int, ...]:
    """The batch sizes to compare at: the one that an input is fixed to, else two."""
    fixed = sorted({shape[0] for shape in interface.shapes if shape and shape[0] is not None})
    if len(fixed) > 1:
        sizes = ", ".join(map(str, fixed))
        raise UsageError(
            f"the inputs are fixed to different batch sizes: {sizes}",
            hint="Give all of them the same, in input_shape or in the model.",
        )
    return tuple(fixed) or BATCHES


def _channels_first(batches: tuple[Arrays, ...], names: Sequence[str]) -> tuple[Arrays, ...]:
    return tuple(
        {n: np.moveaxis(a, -1, 1) if n in names else a for n, a in batch.items()}
        for batch in batches
    )


def refuse_text(model: Any) -> None:
    """Refuses inputs that have no numbers, which a reference file can't hold.

    Raises:
        ExportError: names the type and the remedy.
    """
    for spec in tf.nest.flatten(_signature(model)):
        if not isinstance(spec, tf.TensorSpec):
            kind = f"a {type(spec).__name__.removesuffix('Spec')}"
        elif spec.dtype == tf.string:
            kind = "text"
        else:
            continue
        raise ExportError(
            f"an input is {kind}, which can't go into an ONNX file",
            where=str(model.name),
            hint="Export the part of the model behind the preprocessing, or use another format.",
        )


def interface_of(model: Any) -> Interface:
    """The model's inputs and outputs as Keras itself has them.

    The batch is open unless the model works with its own alone.
    """
    specs = tf.nest.flatten(_signature(model))
    # As `serving_signature` calls them.
    given = getattr(model, "input_names", None) or [getattr(s, "name", None) for s in specs]
    inputs = list(dict.fromkeys(name for name in given if name))
    if len(inputs) != len(specs):
        inputs = [f"input_{i + 1}" for i in range(len(specs))]
    outputs = tuple(getattr(model, "output_names", None) or [])
    shapes = tuple(tuple(shape.as_list()) for shape in batch_shapes(model, specs))
    return Interface(tuple(inputs), outputs, shapes)


def input_dtypes(model: Any) -> list[str]:
    """The dtype of each input, in the order of `interface_of`; text is "string"."""
    return [spec.dtype.name for spec in tf.nest.flatten(_signature(model))]


def reload_parity(model: Any, written: Path, reference: Reference) -> Parity:
    """Reads a saved model back and compares what it answers.

    Args:
        model: the model that was saved; its classes are made known to the loader.
        written: the file or folder.
        reference: the answers of `model`.

    Raises:
        ExportError: it can't be read back.
    """
    layers = (model, *(found.layer for found in find_layers(model)))
    classes = {type(layer).__name__: type(layer) for layer in layers}
    custom = {
        name: kind for name, kind in classes.items() if not kind.__module__.startswith("tf_keras.")
    }
    try:
        again = storage.load(written, custom_objects=custom, unsafe=True)
    except LoadError as error:
        raise ExportError(
            f"what was written can't be read back: {error.message}",
            hint="Choose another format, or skip the check with --no-verify, verify=False.",
        ) from error
    outputs = tuple(reference.outputs[0])
    reread = _compare("tf_keras", lambda batch: answer(again, batch, outputs), reference)
    signature = getattr(again, "signatures", {}).get(SIGNATURE)
    if signature is None or not reread.ok:
        return reread
    # What is served is another computation: the affine form.
    served = _compare(SIGNATURE, lambda batch: call_signature(signature, batch), reference)
    return furthest((reread, served))


def _compare(name: str, run: Callable[[Arrays], Arrays], reference: Reference) -> Parity:
    actual = [run(batch) for batch in reference.inputs]
    return compare_parity(name, actual, reference.outputs, reference.tolerance, reference.batches)


def _draw(model: Any, interface: Interface, batch: int, size: int) -> Arrays:
    dtypes = input_dtypes(model)
    sizes = [f.layer.input_dim for f in find_layers(model) if isinstance(f.layer, Embedding)]
    limit = int(min(sizes, default=FEW_INDICES))
    indices = index_inputs(model, interface.inputs)
    specs = list(zip(interface.inputs, interface.shapes, dtypes, strict=True))
    # An Embedding casts its input, whose dtype may well be float32. Text is drawn as numerals.
    whole = [
        (n, shape, "int32" if n in indices or dtype == "string" else dtype)
        for n, shape, dtype in specs
    ]
    drawn = random_inputs(whole, batch, SEED, free=size, upper=limit)
    return {name: drawn[name].astype(_numpy_dtype(dtype)) for name, _, dtype in specs}


def _numpy_dtype(name: str) -> Any:
    return np.str_ if name == "string" else tf.dtypes.as_dtype(name).as_numpy_dtype


def index_inputs(model: Any, names: Sequence[str]) -> set[str]:
    """The inputs that an Embedding reads, whatever their dtype: they must be whole numbers."""
    tensors = tf.nest.flatten(getattr(model, "inputs", None) or [])
    return {
        name
        for name, tensor in zip(names, tensors, strict=False)
        if any(
            isinstance(node.layer, Embedding)
            for node in tensor._keras_history.layer._outbound_nodes
        )
    }


def answer(model: Any, inputs: Mapping[str, Array], names: Sequence[str]) -> Arrays:
    """The model's outputs at inference.

    Args:
        model: a built model.
        inputs: one array per input, in Keras's order.
        names: what to call the outputs, in the order in which Keras flattens them; numbered
            where there are none.
    """
    tensors = [tf.convert_to_tensor(array) for array in inputs.values()]
    with fresh_states(model):
        outputs = tf.nest.flatten(model(*pack_inputs(model, tensors), training=False))
    names = names or [f"output_{i + 1}" for i in range(len(outputs))]
    return {name: np.asarray(tensor) for name, tensor in zip(names, outputs, strict=True)}


def pack_inputs(model: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The model's positional arguments, made of one tensor per input in Keras's order."""
    arguments: tuple[Any, ...] = tf.nest.pack_sequence_as(_signature(model), list(tensors))
    return arguments


@contextmanager
def fresh_states(model: Any) -> Iterator[None]:
    """Recurrent layers that keep their state start from zero in the block.

    Behind it they have the state that they had before.
    """
    layers = [f.layer for f in find_layers(model) if getattr(f.layer, "stateful", False)]
    states = [s for layer in layers for s in tf.nest.flatten(getattr(layer, "states", None))]
    variables = [state for state in states if isinstance(state, tf.Variable)]
    kept = [variable.numpy() for variable in variables]
    for variable in variables:
        variable.assign(tf.zeros_like(variable))
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def compute_dtype(model: Any) -> str:
    """The narrowest floating-point type that a layer of the model computes in."""
    widths = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}
    found = {str(f.layer.compute_dtype) for f in find_layers(model)} & widths.keys()
    return min(found, key=lambda name: widths[name], default="float32")


def _signature(model: Any) -> tuple[Any, ...]:
    """The structure of the model's positional arguments, with a spec at each leaf."""
    nested = getattr(model, "_nested_inputs", None)
    if nested is not None:
        return (tf.nest.map_structure(lambda t: t.type_spec, nested),)
    return call_arguments(model)
