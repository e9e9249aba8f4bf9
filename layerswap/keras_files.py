"""Reads the configuration out of Keras files without TensorFlow.

Nothing in a file is trusted: no code is run, no module imported, and nothing is unpacked that
claims to be huge.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerswap.atomic import is_saved_model
from layerswap.errors import LoadError

KERAS_3_HINT = (
    "A Keras 3 model has to be rebuilt under tf_keras (set TF_USE_LEGACY_KERAS=1 before "
    "TensorFlow is imported), given its weights and saved again."
)

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")

# TensorFlow functions that a layer may call by name: those that only compute.
_PURE = re.compile(
    r"(compat\.v1\.)?((math|nn|linalg|image|signal|strings|sparse|ragged|sets|bitwise|quantization"
    r"|random|audio|dtypes|__operators__|experimental\.numpy)\.[\w.]+"
    r"|(?!\w*(file|load|import|func|rpc|tpu|xla|print|save|restore|session))[a-z]\w*)"
)
_IMPURE_NODE = re.compile(r"(?i)file|func|save|restore|summary|dataset|print|remote|session")

_NOTED = ("class_name", "name", "config", "build_input_shape")
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
# The largest model of tf_keras.applications has half a megabyte.
_MAX_CONFIG = 1 << 27


def check_config(config: Any, version: Any) -> None:
    """Refuses what isn't a model's configuration, or is one of Keras 3.

    Raises:
        LoadError: says which of the two.
    """
    if not isinstance(config, dict):
        raise LoadError(
            "its configuration is empty: the model had none when it was saved",
            hint="Give a subclassed model a get_config(), or save it as a SavedModel.",
        )
    text = version.decode() if isinstance(version, bytes) else str(version or "")
    # Files without a version give themselves away: Keras 2 calls it batch_input_shape.
    inputs = (item for _, item in objects(config) if item["class_name"] == "InputLayer")
    newer = any("batch_shape" in inner_config(item) for item in inputs)
    if newer or (text.split(".")[0].isdecimal() and int(text.split(".")[0]) >= 3):
        raise LoadError(f"was written by Keras {text or '3'}, not tf_keras", hint=KERAS_3_HINT)


def objects(config: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every serialized object in a configuration, with the path of layer names to it.

    The model's own name is left out, unless the model is all there is.
    """
    children: Any = ()
    if isinstance(config, dict):
        children = config.values()
        if "class_name" in config:
            name = inner_config(config).get("name")
            if isinstance(name, str) and not (depth == 0 and "layers" in inner_config(config)):
                path = f"{path}/{name}" if path else name
            yield path, config
    elif isinstance(config, list):
        children = config
    for child in children:
        yield from objects(child, path, depth + 1)


def inner_config(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config` of a serialized object; empty where it has none."""
    inner = item.get("config")
    return inner if isinstance(inner, dict) else {}


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, which early tf_keras wrote under `.keras`, too.

    HDF5 looks for its mark at 512, 1024, 2048 and so on as well, where the weights in an archive
    may happen to begin.
    """
    import h5py

    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) != b"PK\x03\x04" and bool(h5py.is_hdf5(path))


def read_config(path: Path) -> dict[str, Any]:
    """The model configuration in a `.keras` or `.h5` file.

    Raises:
        LoadError: there is none of a tf_keras model; other exceptions where it is damaged.
    """
    if not path.exists():
        raise LoadError("there is no such file or folder")
    if not path.is_file():  # a pipe, which nobody may ever write into
        raise LoadError("is not a regular file", hint="Copy the model into a file.")
    if path.suffix not in KERAS_SUFFIXES:
        raise LoadError(
            f"the suffix '{path.suffix}' is not that of a model",
            hint="Give a .keras, .h5, .hdf5 or .onnx file, or a SavedModel folder.",
        )
    import h5py

    if is_hdf5(path):
        with h5py.File(path, "r") as file:
            text, version = file.attrs.get("model_config"), file.attrs.get("keras_version")
        if text is None:
            raise LoadError(
                "holds weights only, no model configuration",
                hint="Build the model in Python, call load_weights() and save the whole model.",
            )
    elif zipfile.is_zipfile(path) and path.suffix == ".keras":
        text, version = _read_archive(path)
    else:
        raise LoadError(
            f"is no complete {path.suffix} file: cut short, damaged or something else",
            hint="Copy or download it again; a file under the wrong suffix needs renaming.",
        )
    config = json.loads(text)
    check_config(config, version)
    result: dict[str, Any] = config
    return result


def _read_archive(path: Path) -> tuple[bytes, Any]:
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        for needed in (_CONFIG, _WEIGHTS):
            if needed not in sizes:
                raise LoadError(
                    f"has no {needed}: not a complete .keras model",
                    hint="Save the whole model with model.save().",
                )
        for name in (_CONFIG, _METADATA):
            if sizes.get(name, 0) > _MAX_CONFIG:
                raise LoadError(
                    f"its {name} would unpack to {sizes[name]:,} bytes",
                    hint="It looks like a decompression bomb and was not opened.",
                )
        metadata = json.loads(archive.read(_METADATA)) if _METADATA in sizes else {}
        return archive.read(_CONFIG), metadata.get("keras_version")


@dataclass(frozen=True, slots=True)
class SavedNode:
    """What Keras noted about one of the objects in a SavedModel."""

    path: str  # as the objects hold each other: root.block.bns.0
    item: Mapping[str, Any]


def saved_nodes(folder: Path) -> list[SavedNode]:
    """What a SavedModel folder notes about its Keras objects.

    Raises:
        LoadError: it is no SavedModel, or holds no Keras model; other exceptions where damaged.
    """
    if not is_saved_model(folder):
        raise LoadError("is a folder but no SavedModel", hint="It has no saved_model.pb.")
    file = folder / "keras_metadata.pb"
    if file.is_file():
        triples = [
            (_text(node, 3), _text(node, 4), _text(node, 5))
            for node in _messages(file.read_bytes(), 1)
        ]
    else:  # where Keras kept it before TensorFlow 2.5
        graph = memoryview((folder / "saved_model.pb").read_bytes())
        users = [
            user
            for meta in _messages(graph, 2)
            for part in _messages(meta, 7)
            for node in _messages(part, 1)
            for user in _messages(node, 4)
        ]
        triples = [("", _text(user, 1), _text(user, 3)) for user in users]
    nodes = []
    for path, kind, metadata in triples:
        if kind.startswith("_tf_keras_") and kind != "_tf_keras_metric" and metadata:
            noted = json.loads(metadata)
            # The rest says how it was trained, or says the same twice.
            nodes.append(SavedNode(path, {key: noted.get(key) for key in _NOTED}))
    if not nodes:
        raise LoadError(
            "is a SavedModel without a Keras model: a tf.Module, or exported by Keras 3",
            hint=f"Save the model itself with tf_keras, model.save(). {KERAS_3_HINT}",
        )
    return nodes


def _messages(data: bytes | memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of a length-delimited field in a protobuf message."""
    view, position = memoryview(data), 0
    while position < len(view):
        key, position = _varint(view, position)
        kind = key & 7
        if kind == 2:
            size, position = _varint(view, position)
            if position + size > len(view):
                raise ValueError("cut short")
            if key >> 3 == wanted:
                yield view[position : position + size]
            position += size
        elif kind == 0:
            _, position = _varint(view, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError("no protobuf message")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _text(message: memoryview, field: int) -> str:
    return "".join(bytes(part).decode() for part in _messages(message, field))


def runs_code(item: Mapping[str, Any]) -> bool:
    """Whether rebuilding a serialized object runs Python or reaches outside the model."""
    kind, inner = str(item["class_name"]), inner_config(item)
    if kind in ("TFOpLambda", "SlicingOpLambda"):  # even tf.io.write_file, on constants at once
        return not _PURE.fullmatch(str(inner.get("function")))
    if kind == "ClassMethod":
        return inner.get("cls_symbol") not in ("RaggedTensor", "SparseTensor")
    if kind == "TensorFlowOpLayer":
        return bool(_IMPURE_NODE.search(str(inner.get("node_def"))))
    functions = ("function_type", "output_shape_type", "mask_type")
    return kind == "__lambda__" or "lambda" in map(inner.get, functions)
