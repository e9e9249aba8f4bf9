"""Reads and writes Keras models: `.keras`, `.h5` and SavedModel folders.

A file goes through `inspection` before tf_keras sees it.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import tensorflow as tf
import tf_keras
from tensorflow.python.trackable.resource import TrackableResource
from tf_keras.src.layers.serialization import get_builtin_layer

from layerswap.atomic import StrPath, replacing
from layerswap.errors import ExportError, LayerswapError, LoadError, UsageError, reason_of
from layerswap.keras_files import KERAS_3_HINT, is_hdf5
from layerswap.keras_graph import inspection
from layerswap.keras_graph.serving import serving_signature

Format = Literal["keras", "h5", "savedmodel"]

_LOADER = "saving.legacy.saved_model.load"


def load(
    path: StrPath, *, custom_objects: Mapping[str, Any] | None = None, unsafe: bool = False
) -> tf_keras.Model:
    """Reads a Keras model, weights and compile state included; never writes to the file.

    Args:
        path: a `.keras`, `.h5` or `.hdf5` file, or a SavedModel folder that tf_keras wrote.
        custom_objects: classes and functions that the model uses, by name; known during the
            load only.
        unsafe: whether Python code that the file carries (a Lambda layer's bytecode) may be
            run, and modules that it names imported.

    Raises:
        LoadError: for whatever reason there is no model; it says what to do.
    """
    source, known = Path(path), dict(custom_objects or {})
    try:
        model = _load(source, known, unsafe)
        if not isinstance(model, tf_keras.Model):
            raise LoadError(
                f"holds a {type(model).__name__}, not a Keras model",
                hint="Save the whole model with model.save().",
            )
        return model
    except LoadError as error:
        error.where = error.where or os.fspath(path)
        raise
    except Exception as error:
        explained = inspection.explained(error)
        explained.where = os.fspath(path)
        raise explained from error


def check_model(model: Any) -> None:
    """Raises UsageError where `model` is no tf_keras model, and says what it is."""
    if isinstance(model, tf_keras.Model):
        return
    kinds = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    keras_3 = any(kind.startswith("keras.src.models") for kind in kinds)
    raise UsageError(
        f"a {kinds[0]} is not a tf_keras model" + (" but one of Keras 3" if keras_3 else ""),
        hint=KERAS_3_HINT if keras_3 else "Give a tf_keras.Model or the path of one.",
    )


def executes_eagerly() -> bool:
    """Whether TensorFlow runs operations as they are called, rather than building a graph."""
    return bool(tf.executing_eagerly())


def save(
    model: tf_keras.Model,
    path: StrPath,
    format: Format,
    *,
    overwrite: bool = False,
    serving_only: bool = False,
) -> None:
    """Writes a model such that plain tf_keras reads it back; all or nothing.

    A SavedModel's `serving_default` signature is `serving.serving_signature`.

    Args:
        model: a built model.
        path: where to; its suffix doesn't matter except that `.keras` files need theirs.
        format: `keras`, `h5` or `savedmodel`.
        overwrite: whether an existing artifact may be replaced.
        serving_only: write a SavedModel of the signature alone, which TensorFlow runs and
            tf_keras doesn't load.

    Raises:
        UsageError: the target exists and may not be replaced, or the format is unknown.
        ExportError: the model doesn't fit the format, or the file can't be written.
    """
    if format not in _WRITERS:
        raise UsageError(f"unknown format '{format}'", hint=f"Known: {', '.join(_WRITERS)}.")
    if format == "keras" and Path(path).suffix != ".keras":
        raise UsageError("needs the suffix .keras", where=os.fspath(path))
    with replacing(path, overwrite, folder=format == "savedmodel") as temporary:
        try:
            if not model.built:
                raise ValueError("it isn't built: call it on a sample once")
            writer = _write_signature if serving_only else _WRITERS[format]
            writer(model, temporary)
        except LayerswapError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's fault, not the model's
            if isinstance(error, tf.errors.OpError):  # TensorFlow's own, of the file system
                raise ExportError(
                    "can't be written: "
                    + re.sub(r"\{\{.*?\}\} *", "", reason_of(error)).replace(
                        os.fspath(temporary), os.fspath(path)
                    )[:300],
                    where=os.fspath(path),
                    hint="Nothing was changed. Free some space or choose another place.",
                ) from error
            others = " or ".join(name for name in _WRITERS if name != format)
            raise ExportError(
                f"the model can't be saved as {format}: {reason_of(error)[:300]}",
                where=os.fspath(path),
                hint=f"Another format may hold it: {others}.",
            ) from error


def is_revived(layer: Any) -> bool:
    """Whether the class of the layer was lost and tf_keras made one up from a SavedModel.

    Such a layer calls its traced graph: changing its sublayers changes nothing that it computes.
    """
    return any(base.__module__.endswith(_LOADER) for base in type(layer).__mro__)


# --- reading ------------------------------------------------------------------------------


def _load(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    if path.is_dir():
        inspection.inspect_saved_model(path, unsafe)
        return tf_keras.models.load_model(path, custom_objects=known)
    if not path.exists():
        raise LoadError("there is no such file or folder")
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise LoadError(
            f"the suffix '{path.suffix}' is not that of a Keras model",
            hint="Give a .keras, .h5 or .hdf5 file, or a SavedModel folder.",
        )
    if is_hdf5(path):
        with h5py.File(path, "r") as file:
            inspection.inspect_h5(file, path, unsafe)
            return tf_keras.models.load_model(file, custom_objects=known)
    if zipfile.is_zipfile(path) and path.suffix == ".keras":
        return _load_archive(path, known, unsafe)
    raise LoadError(
        f"is no complete {path.suffix} file: cut short, damaged or something else",
        hint="Copy or download it again; a file under the wrong suffix needs renaming.",
    )


def _load_archive(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    stored = inspection.inspect_archive(path, known, unsafe)
    model = tf_keras.models.load_model(path, custom_objects=known, safe_mode=not unsafe)
    if missing := inspection.missing_weights(model, stored):
        raise LoadError(
            f"lacks {missing} of the model's weights; they would stay at random values",
            hint="tf_keras drops weights of layers kept in nested lists: save as .h5 instead.",
        )
    return model


# --- writing --------------------------------------------------------------------------------


def _write_keras(model: tf_keras.Model, path: Path) -> None:
    for layer in model.submodules:
        adapted = isinstance(layer, tf_keras.layers.Discretization)
        if adapted and layer.get_config()["bin_boundaries"] is None:
            raise ValueError(f"tf_keras leaves out the bins that layer '{layer.name}' adapted to")
    tf_keras.models.save_model(model, path, save_format="keras")
    with zipfile.ZipFile(path) as archive:
        stored = inspection.weights_in(archive, path)
    if missing := inspection.missing_weights(model, stored):
        raise ValueError(f"tf_keras leaves out {missing} weights of layers in nested containers")


def _write_h5(model: tf_keras.Model, path: Path) -> None:
    # In memory first: when the disk is full, HDF5 may take the process down as it closes.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HDF5 file")  # that it is a legacy format
        tf_keras.models.save_model(model, file, save_format="h5")
    path.write_bytes(buffer.getbuffer())


def _write_saved_model(model: tf_keras.Model, path: Path) -> None:
    signatures = {"serving_default": serving_signature(model)}
    # Keras would trace every layer several times over: most of the time of saving and loading
    # (EfficientNetB0: 21 s against 3 s, and 11 s against 3 s). The traces revive layers that
    # can't be rebuilt from their configuration; for all others the loader ignores them.
    layers = [item for item in model.submodules if isinstance(item, tf_keras.layers.Layer)]
    traces = not all(map(_is_stock, (model, *layers)))
    tf_keras.models.save_model(
        model, path, save_format="tf", signatures=signatures, save_traces=traces
    )


def _write_signature(model: tf_keras.Model, path: Path) -> None:
    """The signature with what it reads, and nothing of Keras."""
    signature = serving_signature(model)
    holder = tf.Module()
    # TensorFlow gives them in an order that changes from process to process.
    names = [variable.name for variable in model.variables]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    holder.used = sorted(
        signature.graph.variables, key=lambda v: (places.get(v.name, len(places)), v.name)
    )
    found = tf.train.TrackableView(model).descendants()
    holder.tables = [item for item in found if isinstance(item, TrackableResource)]
    tf.saved_model.save(holder, os.fspath(path), signatures={"serving_default": signature})


# A Lambda's function may not survive; the others name the layers inside them anew.
_INCOMPLETE = (
    tf_keras.layers.Lambda,
    tf_keras.layers.MultiHeadAttention,
    tf_keras.layers.TextVectorization,
)


def _is_stock(layer: tf_keras.layers.Layer) -> bool:
    """Whether plain tf_keras rebuilds the layer from its configuration alone, nothing missing."""
    kind = type(layer)
    if kind in _INCOMPLETE:
        return False
    if layer._must_restore_from_config or isinstance(layer, tf_keras.metrics.Metric):
        return True  # tf_keras doesn't trace them anyway
    if get_builtin_layer(kind.__name__) is not kind:
        return False
    if layer.stateful or layer._metrics or "call" in vars(layer):
        return False
    if isinstance(layer, tf_keras.Model):
        return bool(layer.inputs) and not layer._callable_losses
    config = layer.get_config()
    if layer.activity_regularizer and "activity_regularizer" not in config:
        return False
    named = (part for name, part in vars(layer).items() if name.lstrip("_") in config)
    return all(_is_tf_keras(part) for part in named if callable(part))


def _is_tf_keras(part: Any) -> bool:
    """Whether an activation, initializer or the like goes by a name that tf_keras knows."""
    if hasattr(part, "__name__"):
        return getattr(tf_keras.activations, part.__name__, None) is part
    return type(part).__module__.startswith("tf_keras.")


_WRITERS: Mapping[str, Callable[[tf_keras.Model, Path], None]] = {
    "keras": _write_keras,
    "h5": _write_h5,
    "savedmodel": _write_saved_model,
}
