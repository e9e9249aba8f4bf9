"""Reads the configuration of Keras files without TensorFlow, and looks at every layer in it.

Nothing in a file is trusted: no code is run, no module imported, and a name counts as one of
tf_keras only where tf_keras itself would take it for that.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerswap.atomic import is_saved_model
from layerswap.errors import LoadError
from layerswap.records import Checked, Finding, LayerRecord

KERAS_3_HINT = (
    "A Keras 3 model has to be rebuilt under tf_keras (set TF_USE_LEGACY_KERAS=1 before "
    "TensorFlow is imported), given its weights and saved again."
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")

BATCHNORM = _names(
    """
    BatchNormalization BatchNormalizationBase BatchNormalizationV1 BatchNormalizationV2
    SyncBatchNormalization
    """
)
NORMALIZATION = BATCHNORM | _names(
    """
    GroupNormalization LayerNormalization Normalization SpectralNormalization UnitNormalization
    """
)

# What tf_keras knows by these names, and rebuilds from the configuration alone.
LAYERS = NORMALIZATION | _names(
    """
    AbstractRNNCell Activation ActivityRegularization Add AddLoss AddMetric AdditiveAttention
    AlphaDropout Attention Average AveragePooling1D AveragePooling2D AveragePooling3D AvgPool1D
    AvgPool2D AvgPool3D BaseRandomLayer Bidirectional CategoryEncoding CenterCrop ClassMethod
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM1D
    ConvLSTM2D ConvLSTM3D ConvLSTMCell Convolution1D Convolution1DTranspose Convolution2D
    Convolution2DTranspose Convolution3D Convolution3DTranspose Cropping1D Cropping2D Cropping3D
    CuDNNGRU CuDNNLSTM Dense DenseFeatures DepthwiseConv1D DepthwiseConv2D DeviceWrapper
    Discretization Dot Dropout DropoutWrapper ELU EinsumDense Embedding Flatten Functional GRU
    GRUCell GRUCellV1 GRUCellV2 GRUV1 GRUV2 GaussianDropout GaussianNoise GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalAvgPool1D GlobalAvgPool2D
    GlobalAvgPool3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D HashedCrossing Hashing Identity InputLayer
    InstanceMethod InstanceProperty IntegerLookup LSTM LSTMCell LSTMCellV1 LSTMCellV2 LSTMV1
    LSTMV2 Lambda Layer LeakyReLU LinearModel LocallyConnected1D LocallyConnected2D Masking
    MaxPool1D MaxPool2D MaxPool3D MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum Model
    MultiHeadAttention Multiply PReLU Permute RNN RandomBrightness RandomContrast RandomCrop
    RandomFlip RandomFourierFeatures RandomHeight RandomRotation RandomTranslation RandomWidth
    RandomZoom ReLU RepeatVector Rescaling Reshape ResidualWrapper Resizing SeparableConv1D
    SeparableConv2D SeparableConvolution1D SeparableConvolution2D SequenceFeatures Sequential
    SharpnessAwareMinimization SimpleRNN SimpleRNNCell SlicingOpLambda Softmax SpatialDropout1D
    SpatialDropout2D SpatialDropout3D StackedRNNCells StringLookup Subtract TFOpLambda
    TensorFlowOpLayer TextVectorization ThresholdedReLU TimeDistributed UpSampling1D
    UpSampling2D UpSampling3D WideDeepModel Wrapper ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """
)
# Their helpers, by class and (in older files) by function name. None can hold a layer.
HELPERS = _names(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform
    Ones Orthogonal RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros constant
    glorot_normal glorot_uniform he_normal he_uniform identity lecun_normal lecun_uniform ones
    orthogonal random_normal random_uniform truncated_normal variance_scaling zeros one zero
    normal uniform L1 L1L2 L2 OrthogonalRegularizer l1 l1_l2 l2 orthogonal_regularizer MaxNorm
    MinMaxNorm NonNeg RadialConstraint UnitNorm max_norm maxnorm min_max_norm non_neg nonneg
    radial_constraint unit_norm unitnorm Policy PolicyV1
    """
)
ACTIVATIONS = _names(
    """
    elu exponential gelu hard_sigmoid linear mish relu selu sigmoid silu softmax softplus
    softsign swish tanh
    """
)
_HELPED = ("_initializer", "_regularizer", "_constraint")
# How values, not objects, are written down.
_VALUES = re.compile(r"__(?!lambda)\w+__|TypeSpec|TensorShape|CompositeTensor")

# TensorFlow functions that a layer may call by name: those that only compute.
_PURE = re.compile(
    r"(compat\.v1\.)?((math|nn|linalg|image|signal|strings|sparse|ragged|sets|bitwise|quantization"
    r"|random|audio|dtypes|__operators__|experimental\.numpy)\.[\w.]+"
    r"|(?!\w*(file|load|import|func|rpc|tpu|xla|print|save|restore|session))[a-z]\w*)"
)
_IMPURE_NODE = re.compile(r"(?i)file|func|save|restore|summary|dataset|print|remote|session")
_BATCHNORM_OP = re.compile(r"(?i)batch_?norm")
_NODE_OP = re.compile(r'"op": *"([^"]*)"')

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
# The largest model of tf_keras.applications has half a megabyte.
_MAX_CONFIG = 1 << 27


def check_config_file(path: str | os.PathLike[str]) -> tuple[Checked, list[Finding]]:
    """Looks for BatchNormalization in the configuration of a Keras file.

    Args:
        path: a `.keras`, `.h5` or `.hdf5` file, or a SavedModel folder.

    Returns:
        The normalization layers, and a finding for each BatchNormalization and for each part
        that the configuration says too little about.

    Raises:
        LoadError: there is no configuration of a tf_keras model.
    """
    try:
        walk = _Walk()
        if Path(path).is_dir():
            walk.nodes(_saved_nodes(Path(path)))
        else:
            walk.root(_read_config(Path(path)))
    except LoadError as error:
        error.where = error.where or os.fspath(path)
        raise
    except Exception as error:  # whatever a damaged file makes of the readers
        raise LoadError(
            f"its configuration can't be read: {type(error).__name__}",
            where=os.fspath(path),
            hint="It is damaged or no Keras model: copy or save it again.",
        ) from error
    layers = [item.record for item in walk.items if item.is_normalization]
    findings = [finding for item in walk.items for finding in item.findings()]
    return Checked(os.fspath(path), len(walk.items) - 1, tuple(layers)), findings


# --- what is said about a layer -----------------------------------------------------------


def batchnorm_left(record: LayerRecord) -> Finding:
    """The finding that a layer is a BatchNormalization."""
    return Finding(
        "batchnorm-left",
        "error",
        record.path,
        f"is a {record.class_name} in {' › '.join(record.parents)}",
        "layerswap plan shows whether it can be swapped, layerswap convert swaps it.",
    )


def batchnorm_operation(record: LayerRecord, config: Mapping[str, Any]) -> Finding | None:
    """The finding that a layer calls an operator of TensorFlow that normalises by batch."""
    function = _operation(record.class_name, config)
    if not _BATCHNORM_OP.search(function):
        return None
    return Finding(
        "batchnorm-op",
        "error",
        record.path,
        f"calls the TensorFlow function {function}",
        "It is no layer and can't be swapped: replace the call in the model's code.",
    )


def undetermined(code: str, where: str, message: str, hint: str = "") -> Finding:
    """A finding that keeps the answer open."""
    return Finding(code, "undetermined", where, message, hint)


def _operation(class_name: str, config: Mapping[str, Any]) -> str:
    if class_name == "TensorFlowOpLayer":  # how TensorFlow 2.3 and before kept such calls
        node = config.get("node_def")
        if isinstance(node, Mapping):
            return str(node.get("op", ""))
        found = _NODE_OP.search(str(node))
        return found[1] if found else str(node)
    if class_name in ("TFOpLambda", "SlicingOpLambda"):
        return str(config.get("function"))
    return ""


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


# --- the files ----------------------------------------------------------------------------


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


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise LoadError("there is no such file or folder")
    if path.suffix not in KERAS_SUFFIXES:
        raise LoadError(
            f"the suffix '{path.suffix}' is not that of a model",
            hint="Give a .keras, .h5, .hdf5 or .onnx file, or a SavedModel folder.",
        )
    import h5py

    if h5py.is_hdf5(path):  # early tf_keras wrote HDF5 under .keras, too
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
class _Node:
    """What Keras noted about one of the objects in a SavedModel."""

    path: str  # as the objects hold each other: root.block.bns.0
    item: Mapping[str, Any]


def _saved_nodes(folder: Path) -> list[_Node]:
    if not is_saved_model(folder):
        raise LoadError("is a folder but no SavedModel", hint="It has no saved_model.pb.")
    file = folder / "keras_metadata.pb"
    if file.exists():
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
            nodes.append(
                _Node(path, {key: noted.get(key) for key in ("class_name", "name", "config")})
            )
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


# --- the walk -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Item:
    """A layer, or something that isn't part of tf_keras, in a configuration."""

    record: LayerRecord
    config: Mapping[str, Any]
    foreign: str = ""  # why it isn't known what it does

    @property
    def is_normalization(self) -> bool:
        return not self.foreign and self.record.class_name in NORMALIZATION

    def findings(self) -> Iterator[Finding]:
        if self.foreign:
            code = "custom-code" if self.foreign.startswith("runs") else "custom-class"
            yield undetermined(
                code,
                self.record.path,
                self.foreign,
                "To decide: --load (load=True in Python), with --custom-objects for classes of "
                "your own and --unsafe for code in a file that you trust.",
            )
        elif self.record.class_name in BATCHNORM:
            yield batchnorm_left(self.record)
        if (finding := batchnorm_operation(self.record, self.config)) is not None:
            yield finding


# Parts of a serialized object that say what it is, or how it was trained.
_IDENTITY = _names(
    """
    class_name config module registered_name name shared_object_id build_config compile_config
    """
)


class _Walk:
    """Collects the layers of a configuration under the paths that the loaded model gives them."""

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self._paths: set[str] = set()
        self._shared: set[tuple[Any, ...]] = set()

    def root(self, config: Mapping[str, Any]) -> None:
        """A whole model; its own name is left out of the paths."""
        if not isinstance(config.get("class_name"), str):
            raise LoadError(
                "its configuration is not that of a model",
                hint="Save the whole model with model.save().",
            )
        if (reason := _foreign(config)) and not self._is_graph(config):
            reason = f"{reason}, so the model's layers can't be seen"
        self._register("", config, (), reason)
        self._parts(config, "", (str(config["class_name"]),))

    def nodes(self, nodes: list[_Node]) -> None:
        """The objects of a SavedModel: the model, and whatever it holds by attribute."""
        first, *others = nodes
        self.root(first.item)
        by_path = {node.path: node.item for node in nodes}
        for node in others:
            if ".keras_api" in node.path:
                continue  # lists the same objects once more
            if node.path:
                path, parents = _attribute_path(node.path, by_path)
                known = path in self._paths
            else:  # before TensorFlow 2.5; the name is all there is
                path, parents = str(node.item.get("name")), (str(first.item["class_name"]),)
                known = any(f"/{seen}".endswith(f"/{path}") for seen in self._paths)
            if not known:
                self._visit(node.item, path, parents)

    @staticmethod
    def _is_graph(config: Mapping[str, Any]) -> bool:
        return isinstance(inner_config(config).get("layers"), list)

    def _visit(self, item: Mapping[str, Any], path: str, parents: tuple[str, ...]) -> None:
        kind = str(item["class_name"])
        if _VALUES.fullmatch(kind):
            self._parts(item, path, parents)
            return
        shared = (item.get("shared_object_id"), kind, inner_config(item).get("name"))
        if shared[0] is not None:
            if shared in self._shared:
                return  # the same object, met before
            self._shared.add(shared)
        reason = _foreign(item)
        if reason or (kind in LAYERS and not _is_helper(item, path)):
            path = self._register(path, item, parents, reason)
            parents = (*parents, kind)
        self._parts(item, path, parents)

    def _register(
        self, path: str, item: Mapping[str, Any], parents: tuple[str, ...], reason: str
    ) -> str:
        unique, number = path, 1
        while unique in self._paths:
            number += 1
            unique = f"{path}#{number}"
        self._paths.add(unique)
        record = LayerRecord(
            unique, str(item["class_name"]), str(item.get("module") or ""), parents
        )
        self.items.append(_Item(record, inner_config(item), reason))
        return unique

    def _parts(self, item: Mapping[str, Any], path: str, parents: tuple[str, ...]) -> None:
        """Whatever an object holds."""
        inner = item.get("config")
        if isinstance(inner, list):  # a Sequential of early Keras
            inner = {"layers": inner}
        for key, value in inner.items() if isinstance(inner, dict) else ():
            if key == "layers" and isinstance(value, list):
                for index, entry in enumerate(value):
                    name = _name(entry)
                    child = f"layers[{index}]" if name is None else name
                    self._crawl(entry, _join(path, child), parents)
            else:
                self._crawl(value, _join(path, key), parents, key)
        for key, value in item.items():
            if key not in _IDENTITY:
                self._crawl(value, _join(path, key), parents)

    def _crawl(self, value: Any, path: str, parents: tuple[str, ...], key: str = "") -> None:
        if isinstance(value, dict):
            if isinstance(value.get("class_name"), str):
                self._visit(value, path, parents)
                return
            for name, part in value.items():
                self._crawl(part, f"{path}[{name}]", parents)
        elif isinstance(value, list):
            for index, part in enumerate(value):
                self._crawl(part, f"{path}[{index}]", parents)
        elif isinstance(value, str) and (
            (key.endswith("activation") and value not in ACTIVATIONS | LAYERS - NORMALIZATION)
            or (key.endswith(_HELPED) and value not in HELPERS)
        ):
            item = {"class_name": "function", "config": value}
            self._register(path, item, parents, _function_reason(value))


def _attribute_path(
    dotted: str, by_path: Mapping[str, Mapping[str, Any]]
) -> tuple[str, tuple[str, ...]]:
    """The path of an object in a SavedModel, and the classes that lead there."""
    parts = dotted.split(".")
    path, parents = "", []
    for number in range(1, len(parts)):
        holder, here = (by_path.get(".".join(parts[:end])) for end in (number, number + 1))
        if holder is None:
            path = f"{path}[{parts[number]}]"  # what a list or dict holds
        elif here is not None and re.fullmatch(r"layer(_with_weights)?-\d+", parts[number]):
            path = _join(path, str(here.get("name")))
        else:
            path = _join(path, parts[number])
        if holder is not None:
            parents.append(str(holder.get("class_name")))
    return path, tuple(parents)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _name(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    name = inner_config(entry).get("name") or entry.get("name")
    return name if isinstance(name, str) else None


def _is_helper(item: Mapping[str, Any], path: str) -> bool:
    """Whether it is the initializer of a name that a layer has, too."""
    module = str(item.get("module"))
    return item["class_name"] in HELPERS and path.endswith(_HELPED) and "layers" not in module


def _foreign(item: Mapping[str, Any]) -> str:
    """Why tf_keras alone doesn't say what a serialized object does; empty where it does."""
    kind, module, registered = (item.get(k) for k in ("class_name", "module", "registered_name"))
    if kind == "__lambda__":
        return "runs code that the file carries"
    if kind == "function":
        name = item.get("config")
        ours = module == "builtins" or _is_keras(module)
        return "" if ours and name in ACTIVATIONS | HELPERS else _function_reason(name)
    if kind not in LAYERS | HELPERS or registered not in (None, kind):
        return f"is a {registered or kind}, a class outside tf_keras"
    if "module" in item and not _is_keras(module):
        return f"is a {kind} of the module {module}, outside tf_keras"
    if kind == "Lambda":
        return "runs a Python function"
    if runs_code(item):
        return f"runs what may be any code: {_operation(str(kind), inner_config(item)) or kind}"
    return ""


def _function_reason(name: Any) -> str:
    return f"runs the function '{name}', which is outside tf_keras"


def _is_keras(module: Any) -> bool:
    return isinstance(module, str) and module.split(".")[0] in ("keras", "tf_keras")
