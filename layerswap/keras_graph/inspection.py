"""Looks into files that nobody vouches for, before tf_keras does.

tf_keras runs the code that a file carries, imports the modules that it names, extracts bombs,
and meets what it can't read with a traceback or, worse, with None. Each `inspect_` function
reads without any of that and raises LoadError; what it lets through may go to tf_keras.
"""

from __future__ import annotations

import builtins
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import tf_keras
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2

from layerswap.atomic import is_saved_model
from layerswap.errors import LoadError, reason_of
from layerswap.keras_files import KERAS_3_HINT, check_config, objects, runs_code

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

# Honest weights hardly compress; a bomb swells some thousand times.
_MAX_SWELL, _ALLOWANCE = 100, 1 << 26

_FUNCTION_HOMES = frozenset(
    {"activations", "backend", "constraints", "initializers", "losses", "metrics", "regularizers"}
)
_UNKNOWN = re.compile(r"(?:Unknown [^:]+: |Could not (?:locate|deserialize) \w+ )'([^']+)'")


def inspect_archive(path: Path, known: Mapping[str, Any], unsafe: bool) -> int:
    """A `.keras` archive.

    Args:
        path: the file, a zip.
        known: classes and functions by name, besides the registered ones.
        unsafe: whether it may carry code and name modules to import.

    Returns:
        How many weights it holds.

    Raises:
        LoadError: it is damaged, no model, a bomb, of Keras 3, or carries code.
    """
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
        check_config(config, metadata.get("keras_version"))
        stored = weights_in(archive, path)
    if not unsafe:
        _check_code(config)
        _check_references(config, known)
    return stored


def inspect_h5(file: h5py.File, path: Path, unsafe: bool) -> None:
    """An HDF5 model.

    Args:
        file: the model, open.
        path: where it lies.
        unsafe: whether it may carry code.

    Raises:
        LoadError: as for `inspect_archive`.
    """
    _check_swell(sum(_sizes(file).values()), path)
    text = file.attrs.get("model_config")
    if text is None:
        raise LoadError(
            "holds weights only, no model configuration",
            hint="Build the model in Python, call load_weights() and save the whole model.",
        )
    config = json.loads(text)
    check_config(config, file.attrs.get("keras_version"))
    if "model_weights" not in file:
        raise LoadError("has no weights", hint="Save the whole model with model.save().")
    if not unsafe:
        _check_code(config)


def inspect_saved_model(path: Path, unsafe: bool) -> None:
    """A SavedModel folder.

    Args:
        path: the folder.
        unsafe: whether it may carry code.

    Raises:
        LoadError: it is none, holds no Keras model, or carries code.
    """
    if not is_saved_model(path):
        raise LoadError("is a folder but no SavedModel", hint="It has no saved_model.pb.")
    configs = [json.loads(text) for text in _saved_metadata(path)]
    if not configs:
        raise LoadError(
            "is a SavedModel without a Keras model: a tf.Module, or exported by Keras 3",
            hint=f"Save the model itself with tf_keras, model.save(). {KERAS_3_HINT}",
        )
    if not unsafe:
        for config in configs:
            _check_code(config)


def weights_in(archive: zipfile.ZipFile, path: Path) -> int:
    """How many weights a `.keras` archive holds, those of the optimizer and of metrics left out.

    Raises:
        LoadError: they are a bomb.
    """
    with h5py.File(io.BytesIO(archive.read(_WEIGHTS))) as file:
        sizes = _sizes(file)
    _check_swell(sum(sizes.values()), path)
    return sum(not name.startswith(("optimizer/", "metrics/")) for name in sizes)


def missing_weights(model: tf_keras.Model, stored: int) -> int:
    """How many of the model's weights a `.keras` archive with `stored` ones can't hold."""
    stock = tf_keras.layers.Layer.save_own_variables
    layers = (item for item in model.submodules if isinstance(item, tf_keras.layers.Layer))
    if any(type(layer).save_own_variables is not stock for layer in layers):
        return 0  # a layer that stores them its own way can't be counted
    counters = {id(weight) for metric in model.metrics for weight in metric.weights}
    return max(0, len({id(weight) for weight in model.weights} - counters) - stored)


def explained(error: Exception) -> LoadError:
    """What an exception of tf_keras during a load means, and what to do."""
    if found := _UNKNOWN.search(str(error)):
        return _unknown(found[1])
    return LoadError(
        f"tf_keras can't rebuild the model: {reason_of(error)[:300]}",
        hint="The file is damaged, or another version of Keras wrote it: save it again.",
    )


def _check_code(config: Any) -> None:
    """Refuses what would run Python or reach outside the model, be it during the load."""
    layers = [path for path, item in objects(config) if runs_code(item)]
    if layers:
        raise LoadError(
            f"carries code, which is not run unasked: {', '.join(dict.fromkeys(layers))}",
            hint="If you trust the file: --unsafe on the command line, unsafe=True in Python.",
        )


def _check_references(config: Any, known: Mapping[str, Any]) -> None:
    """Refuses classes and functions that tf_keras would import from where the file says."""
    for _, item in objects(config):
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


def _sizes(file: h5py.File) -> dict[str, int]:
    """Bytes of every dataset, by its path; one without contents may claim any size."""
    sizes: dict[str, int] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sizes[name] = int(item.nbytes)

    file.visititems(note)
    return sizes


def _check_swell(size: int, path: Path) -> None:
    if size > _ALLOWANCE + _MAX_SWELL * path.stat().st_size:
        raise LoadError(
            f"would unpack to {size:,} bytes, over {_MAX_SWELL} times its size",
            hint="It looks like a decompression bomb and was not opened.",
        )


def _unknown(name: str, module: str = "MODULE") -> LoadError:
    return LoadError(
        f"uses '{name}', which is not part of tf_keras and not registered",
        hint=f"Register it: --custom-objects {module}:{name.split('>')[-1]} on the command "
        f"line, custom_objects={{'{name}': ...}} in Python.",
    )


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
