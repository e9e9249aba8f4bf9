"""Reads and writes Keras models: `.keras`, `.h5` and SavedModel folders.

A file is inspected before tf_keras sees it, because tf_keras runs the code that a file
carries, extracts bombs, and meets what it can't read with a traceback or, worse, with None.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import tf_keras
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2

from layerswap.atomic import StrPath, is_saved_model, replacing
from layerswap.errors import ExportError, LayerswapError, LoadError, UsageError
from layerswap.keras_graph.serving import serving_signature

Format = Literal["keras", "h5", "savedmodel"]

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_LOADER = "saving.legacy.saved_model.load"

# Honest weights hardly compress; a bomb swells some thousand times.
_MAX_SWELL, _ALLOWANCE = 100, 1 << 26

_FUNCTION_HOMES = frozenset(
    {"activations", "backend", "constraints", "initializers", "losses", "metrics", "regularizers"}
)
# TensorFlow functions that a layer may call by name: those that only compute.
_PURE = re.compile(
    r"(compat\.v1\.)?((math|nn|linalg|image|signal|strings|sparse|ragged|sets|bitwise|quantization"
    r"|random|audio|dtypes|__operators__|experimental\.numpy)\.[\w.]+"
    r"|(?!\w*(file|load|import|func|rpc|tpu|xla|print|save|restore|session))[a-z]\w*)"
)
_IMPURE_NODE = re.compile(r"(?i)file|func|save|restore|summary|dataset|print|remote|session")
_UNKNOWN = re.compile(r"(?:Unknown [^:]+: |Could not (?:locate|deserialize) \w+ )'([^']+)'")


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
        raise _explained(error, os.fspath(path)) from error


def check_model(model: Any) -> None:
    """Raises UsageError where `model` is no tf_keras model, and says what it is."""
    if isinstance(model, tf_keras.Model):
        return
    kinds = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    keras_3 = any(kind.startswith("keras.src.models") for kind in kinds)
    raise UsageError(
        f"a {kinds[0]} is not a tf_keras model" + (" but one of Keras 3" if keras_3 else ""),
        hint=_KERAS_3_HINT if keras_3 else "Give a tf_keras.Model or the path of one.",
    )


def save(
    model: tf_keras.Model,
    path: StrPath,
    format: Format,
    *,
    overwrite: bool = False,
    judge: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model such that plain tf_keras reads it back; all or nothing.

    A SavedModel's `serving_default` signature is `serving.serving_signature`.

    Args:
        model: a built model.
        path: where to; its suffix doesn't matter except that `.keras` files need theirs.
        format: `keras`, `h5` or `savedmodel`.
        overwrite: whether an existing artifact may be replaced.
        judge: sees what was written before it takes its place; what it raises stops that.

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
            _WRITERS[format](model, temporary)
        except LayerswapError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's fault, not the model's
            others = " or ".join(name for name in _WRITERS if name != format)
            raise ExportError(
                f"the model can't be saved as {format}: {_first_line(error)}",
                where=os.fspath(path),
                hint=f"Another format may hold it: {others}.",
            ) from error
        if judge is not None:
            judge(temporary)


def is_revived(layer: Any) -> bool:
    """Whether the class of the layer was lost and tf_keras made one up from a SavedModel.

    Such a layer calls its traced graph: changing its sublayers changes nothing that it computes.
    """
    return any(base.__module__.endswith(_LOADER) for base in type(layer).__mro__)


# --- reading ------------------------------------------------------------------------------


def _load(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    if path.is_dir():
        return _load_saved_model(path, known, unsafe)
    if not path.exists():
        raise LoadError("there is no such file or folder")
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise LoadError(
            f"the suffix '{path.suffix}' is not that of a Keras model",
            hint="Give a .keras, .h5 or .hdf5 file, or a SavedModel folder.",
        )
    if h5py.is_hdf5(path):  # early tf_keras wrote HDF5 under .keras, too
        return _load_h5(path, known, unsafe)
    if zipfile.is_zipfile(path) and path.suffix == ".keras":
        return _load_archive(path, known, unsafe)
    raise LoadError(
        f"is no complete {path.suffix} file: cut short, damaged or something else",
        hint="Copy or download it again; a file under the wrong suffix needs renaming.",
    )


def _load_archive(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        _check_swell(sum(info.file_size for info in archive.infolist()), path)
        if damaged := archive.testzip():
            raise LoadError(f"its member '{damaged}' is damaged", hint="Copy the file again.")
        for needed in (_CONFIG, _WEIGHTS):
            if needed not in names:
                raise LoadError(
                    f"has no {needed}: not a complete .keras model",
                    hint="Save the whole model with model.save().",
                )
        config = json.loads(archive.read(_CONFIG))
        metadata = json.loads(archive.read(_METADATA)) if _METADATA in names else {}
        _check_config(config, metadata.get("keras_version"))
        with h5py.File(io.BytesIO(archive.read(_WEIGHTS))) as weights:
            stored = _weights_in(weights, path)
    if not unsafe:
        _check_code(config)
        _check_references(config, known)
    model = tf_keras.models.load_model(path, custom_objects=known, safe_mode=not unsafe)
    if missing := _missing_weights(model, stored):
        raise LoadError(
            f"lacks {missing} of the model's weights; they would stay at random values",
            hint="tf_keras drops weights of layers kept in nested lists: save as .h5 instead.",
        )
    return model


def _load_h5(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    with h5py.File(path, "r") as file:
        _weights_in(file, path)
        text = file.attrs.get("model_config")
        if text is None:
            raise LoadError(
                "holds weights only, no model configuration",
                hint="Build the model in Python, call load_weights() and save the whole model.",
            )
        config = json.loads(text)
        _check_config(config, file.attrs.get("keras_version"))
        if "model_weights" not in file:
            raise LoadError("has no weights", hint="Save the whole model with model.save().")
        if not unsafe:
            _check_code(config)
        return tf_keras.models.load_model(file, custom_objects=known)


def _load_saved_model(path: Path, known: dict[str, Any], unsafe: bool) -> Any:
    if not is_saved_model(path):
        raise LoadError("is a folder but no SavedModel", hint="It has no saved_model.pb.")
    configs = [json.loads(text) for text in _saved_metadata(path)]
    if not configs:
        raise LoadError(
            "is a SavedModel without a Keras model: a tf.Module, or exported by Keras 3",
            hint=f"Save the model itself with tf_keras, model.save(). {_KERAS_3_HINT}",
        )
    if not unsafe:
        for config in configs:
            _check_code(config)
    return tf_keras.models.load_model(path, custom_objects=known)


def _saved_metadata(path: Path) -> list[str]:
    """What Keras noted about each of its objects, as JSON."""
    file = path / "keras_metadata.pb"
    if file.exists():
        return [node.metadata for node in _parsed(saved_metadata_pb2.SavedMetadata(), file).nodes]
    saved = _parsed(saved_model_pb2.SavedModel(), path / "saved_model.pb")
    objects = (node.user_object for node in saved.meta_graphs[0].object_graph_def.nodes)
    return [  # where Keras kept it before TensorFlow 2.5
        user.metadata
        for user in objects
        if user.identifier.startswith("_tf_keras_") and user.metadata
    ]


def _parsed(message: Any, file: Path) -> Any:
    message.ParseFromString(file.read_bytes())
    return message


# --- inspecting -----------------------------------------------------------------------------

_KERAS_3_HINT = (
    "A Keras 3 model has to be rebuilt under tf_keras (set TF_USE_LEGACY_KERAS=1 before "
    "TensorFlow is imported), given its weights and saved again."
)


def _check_config(config: Any, version: Any) -> None:
    """Refuses what isn't a model's configuration, or is one of Keras 3."""
    if not isinstance(config, dict):
        raise LoadError(
            "its configuration is empty: the model had none when it was saved",
            hint="Give a subclassed model a get_config(), or save it as a SavedModel.",
        )
    text = version.decode() if isinstance(version, bytes) else str(version or "")
    # Files without a version give themselves away: Keras 2 calls it batch_input_shape.
    inputs = (item for _, item in _objects(config) if item["class_name"] == "InputLayer")
    newer = any("batch_shape" in _inner(item) for item in inputs)
    if newer or (text.split(".")[0].isdecimal() and int(text.split(".")[0]) >= 3):
        raise LoadError(f"was written by Keras {text or '3'}, not tf_keras", hint=_KERAS_3_HINT)


def _check_code(config: Any) -> None:
    """Refuses what would run Python or reach outside the model, be it during the load."""
    layers = [path for path, item in _objects(config) if _runs_code(item)]
    if layers:
        raise LoadError(
            f"carries code, which is not run unasked: {', '.join(dict.fromkeys(layers))}",
            hint="If you trust the file: --unsafe on the command line, unsafe=True in Python.",
        )


def _runs_code(item: Mapping[str, Any]) -> bool:
    kind, inner = str(item["class_name"]), _inner(item)
    if kind in ("TFOpLambda", "SlicingOpLambda"):  # even tf.io.write_file, on constants at once
        return not _PURE.fullmatch(str(inner.get("function")))
    if kind == "ClassMethod":
        return inner.get("cls_symbol") not in ("RaggedTensor", "SparseTensor")
    if kind == "TensorFlowOpLayer":  # how TensorFlow 2.3 and before kept such calls
        return bool(_IMPURE_NODE.search(str(inner.get("node_def"))))
    functions = ("function_type", "output_shape_type", "mask_type")
    return kind == "__lambda__" or "lambda" in map(inner.get, functions)


def _check_references(config: Any, known: Mapping[str, Any]) -> None:
    """Refuses classes and functions that tf_keras would import from where the file says."""
    for _, item in _objects(config):
        kind, module = str(item["class_name"]), item.get("module")
        if module is None or (kind == "__typespec__" and module.startswith("tensorflow.")):
            continue
        name = str(item["config"]) if kind == "function" else kind
        registered = str(item.get("registered_name") or name)
        if tf_keras.saving.get_registered_object(name if kind == "function" else registered, known):
            continue
        packages = module.split(".")
        if packages == ["builtins"]:  # Keras's own losses and activations, by bare name
            ours = not hasattr(builtins, name)
        elif packages[0] in ("keras", "tf_keras"):
            # Anything else there (get_file, say) has effects that a file should not command.
            classes = re.fullmatch(r"[A-Z]\w*", name) and re.fullmatch(r"[A-Z]\w*", registered)
            ours = bool(classes) or not _FUNCTION_HOMES.isdisjoint(packages)
        else:
            ours = False
        if not ours:
            raise _unknown(name if kind == "function" else registered, module)


def _objects(config: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every serialized object in a configuration, with the path of layer names to it.

    The model's own name is left out, unless the model is all there is.
    """
    children: Any = ()
    if isinstance(config, dict):
        children = config.values()
        if "class_name" in config:
            name = _inner(config).get("name")
            if isinstance(name, str) and not (depth == 0 and "layers" in _inner(config)):
                path = f"{path}/{name}" if path else name
            yield path, config
    elif isinstance(config, list):
        children = config
    for child in children:
        yield from _objects(child, path, depth + 1)


def _inner(item: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = item.get("config")
    return inner if isinstance(inner, dict) else {}


def _weights_in(file: Any, path: Path) -> int:
    """How many weights an HDF5 file holds, those of the optimizer and of metrics left out."""
    sizes: dict[str, int] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sizes[name] = int(item.nbytes)

    file.visititems(note)
    _check_swell(sum(sizes.values()), path)  # a dataset without contents may claim any size
    return sum(not name.startswith(("optimizer/", "metrics/")) for name in sizes)


def _missing_weights(model: tf_keras.Model, stored: int) -> int:
    """How many of the model's weights a `.keras` file with `stored` ones can't hold."""
    stock = tf_keras.layers.Layer.save_own_variables
    layers = (item for item in model.submodules if isinstance(item, tf_keras.layers.Layer))
    if any(type(layer).save_own_variables is not stock for layer in layers):
        return 0  # a layer that stores them its own way can't be counted
    counters = {id(weight) for metric in model.metrics for weight in metric.weights}
    return max(0, len({id(weight) for weight in model.weights} - counters) - stored)


def _check_swell(size: int, path: Path) -> None:
    if size > _ALLOWANCE + _MAX_SWELL * path.stat().st_size:
        raise LoadError(
            f"would unpack to {size:,} bytes, over {_MAX_SWELL} times its size",
            hint="It looks like a decompression bomb and was not opened.",
        )


def _explained(error: Exception, where: str) -> LoadError:
    if found := _UNKNOWN.search(str(error)):
        return _unknown(found[1], where=where)
    return LoadError(
        f"tf_keras can't rebuild the model: {_first_line(error)}",
        where=where,
        hint="The file is damaged, or another version of Keras wrote it: save it again.",
    )


def _unknown(name: str, module: str = "MODULE", where: str = "") -> LoadError:
    return LoadError(
        f"uses '{name}', which is not part of tf_keras and not registered",
        where=where,
        hint=f"Register it: --custom-objects {module}:{name.split('>')[-1]} on the command "
        f"line, custom_objects={{'{name}': ...}} in Python.",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


# --- writing --------------------------------------------------------------------------------


def _write_keras(model: tf_keras.Model, path: Path) -> None:
    for layer in model.submodules:
        adapted = isinstance(layer, tf_keras.layers.Discretization)
        if adapted and layer.get_config()["bin_boundaries"] is None:
            raise ValueError(f"tf_keras leaves out the bins that layer '{layer.name}' adapted to")
    tf_keras.models.save_model(model, path, save_format="keras")
    with (
        zipfile.ZipFile(path) as archive,
        h5py.File(io.BytesIO(archive.read(_WEIGHTS))) as weights,
    ):
        stored = _weights_in(weights, path)
    if missing := _missing_weights(model, stored):
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
    tf_keras.models.save_model(model, path, save_format="tf", signatures=signatures)


_WRITERS: Mapping[str, Callable[[tf_keras.Model, Path], None]] = {
    "keras": _write_keras,
    "h5": _write_h5,
    "savedmodel": _write_saved_model,
}
