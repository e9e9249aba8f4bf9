"""Asks a Keras model: which inputs it takes, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import Embedding

from layerswap.comparison import compare_parity, tolerance_for
from layerswap.errors import ExportError, LoadError, reason_of
from layerswap.keras_graph import storage
from layerswap.keras_graph.walk import find_layers
from layerswap.records import Parity
from layerswap.references import Arrays, InputSpec, Reference, random_inputs

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
    inputs: Sequence[str],
    outputs: Sequence[str],
    sha256: str,
    version: str,
) -> Reference:
    """What the model answers to random inputs at two batch sizes.

    Args:
        model: the model that an artifact was made of.
        source: the BN model, where it is known.
        inputs, outputs: the artifact's names, in Keras's order.
        sha256: the artifact's checksum.
        version: of layerswap.

    Raises:
        ExportError: the model fails on the inputs drawn for it.
    """
    failure: Exception | None = None
    for size in OPEN_AXES:
        try:
            drawn = tuple(_draw(model, inputs, batch, size) for batch in BATCHES)
            answers = tuple(answer(model, batch, outputs) for batch in drawn)
            before = None
            if source is not None:
                before = tuple(answer(source, batch, outputs) for batch in drawn)
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
    tolerance = tolerance_for(compute_dtype(model))
    return Reference(drawn, answers, before, sha256, tolerance, SEED, version)


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


def names(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What Keras calls the inputs and the outputs; empty where it has no names for them."""
    inputs = getattr(model, "input_names", None) or []
    if len(inputs) != len(tf.nest.flatten(_signature(model))):
        inputs = [f"input_{i + 1}" for i in range(len(tf.nest.flatten(_signature(model))))]
    return tuple(inputs), tuple(getattr(model, "output_names", None) or [])


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
    signature = getattr(again, "signatures", {}).get("serving_default")
    if signature is None or not reread.ok:
        return reread
    # What is served is another computation: the affine form.
    served = _compare("serving_default", lambda batch: _served(signature, batch), reference)
    return max(reread, served, key=lambda parity: (not parity.ok, parity.max_absolute))


def _compare(name: str, run: Callable[[Arrays], Arrays], reference: Reference) -> Parity:
    actual = [run(batch) for batch in reference.inputs]
    return compare_parity(name, actual, reference.outputs, reference.tolerance, reference.batches)


def _served(signature: Any, batch: Arrays) -> Arrays:
    tensors = [tf.convert_to_tensor(array) for array in batch.values()]
    # TensorFlow renames inputs that are no identifiers; their order stays.
    specs = signature.structured_input_signature[1]
    named = dict(zip(batch, tensors, strict=True)) if specs.keys() == batch.keys() else None
    results = signature(**(named or dict(zip(sorted(specs), tensors, strict=True))))
    return {name: np.asarray(tensor) for name, tensor in results.items()}


def _draw(model: Any, inputs: Sequence[str], batch: int, size: int) -> Arrays:
    specs = input_specs(model, inputs)
    sizes = [f.layer.input_dim for f in find_layers(model) if isinstance(f.layer, Embedding)]
    limit = int(min(sizes, default=FEW_INDICES))
    indices = index_inputs(model, inputs)
    # An Embedding casts its input, whose dtype may well be float32. Text is drawn as numerals.
    whole = [
        (n, shape, "int32" if n in indices or dtype == "string" else dtype)
        for n, shape, dtype in specs
    ]
    drawn = random_inputs(whole, batch, SEED, free=size, upper=limit)
    return {name: drawn[name].astype(_numpy_dtype(dtype)) for name, _, dtype in specs}


def _numpy_dtype(name: str) -> Any:
    return np.str_ if name == "string" else tf.dtypes.as_dtype(name).as_numpy_dtype


def input_specs(model: Any, names: Sequence[str]) -> list[InputSpec]:
    """(name, shape, dtype) for each input, in Keras's order; shapes hold None where open.

    Args:
        model: a built model.
        names: what to call the inputs.

    Raises:
        ExportError: the inputs are unknown: a subclassed model that was never called.
    """
    return [
        (name, tuple(spec.shape.as_list()), spec.dtype.name)
        for name, spec in zip(names, tf.nest.flatten(_signature(model)), strict=True)
    ]


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


def answer(model: Any, inputs: Arrays, names: Sequence[str]) -> Arrays:
    """The model's outputs at inference.

    Args:
        model: a built model.
        inputs: one array per input, in Keras's order.
        names: what to call the outputs, in the order in which Keras flattens them; numbered
            where there are none.
    """
    tensors = [tf.convert_to_tensor(array) for array in inputs.values()]
    packed = tf.nest.pack_sequence_as(_signature(model), tensors)
    outputs = tf.nest.flatten(model(packed, training=False))
    names = names or [f"output_{i + 1}" for i in range(len(outputs))]
    return {name: np.asarray(tensor) for name, tensor in zip(names, outputs, strict=True)}


def compute_dtype(model: Any) -> str:
    """The narrowest floating-point type that a layer of the model computes in."""
    widths = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}
    found = {str(f.layer.compute_dtype) for f in find_layers(model)} & widths.keys()
    return min(found, key=lambda name: widths[name], default="float32")


def _signature(model: Any) -> Any:
    """The structure of the model's inputs, with a tensor or spec at each leaf."""
    nested = getattr(model, "_nested_inputs", None)
    if nested is not None:
        return tf.nest.map_structure(lambda t: t.type_spec, nested)
    spec = model.save_spec()
    if spec is None:
        raise ExportError(
            "the model's inputs are unknown",
            where=str(model.name),
            hint="Call the model once on sample data before the export.",
        )
    return spec[0][0]
