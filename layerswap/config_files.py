"""Reads the configuration of Keras files without TensorFlow, and looks at every layer in it.

Nothing in a file is trusted: no code is run, no module imported, and a name counts as one of
tf_keras only where tf_keras itself would take it for that.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerswap import catalog
from layerswap.errors import LoadError, reading
from layerswap.keras_files import SavedNode, inner_config, read_config, runs_code, saved_nodes
from layerswap.records import Checked, Finding, LayerRecord
from layerswap.stock_names import ACTIVATIONS, BATCHNORM, HELPERS, LAYERS, NORMALIZATION, names

_HELPED = ("_initializer", "_regularizer", "_constraint")
# How values, not objects, are written down.
_VALUES = re.compile(r"__(?!lambda)\w+__|TypeSpec|TensorShape|CompositeTensor")
_BATCHNORM_OP = re.compile(r"(?i)batch_?norm")
_NODE_OP = re.compile(r'"op": *"([^"]*)"')


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
    walk = _Walk()
    hint = "It is damaged or no Keras model: copy or save it again."
    with reading(os.fspath(path), "its configuration can't be read", hint):
        if Path(path).is_dir():
            walk.nodes(saved_nodes(Path(path)))
        else:
            walk.root(read_config(Path(path)))
    layers = [item.record for item in walk.items if item.is_normalization]
    findings = [finding for item in walk.items for finding in item.findings()]
    return Checked(os.fspath(path), len(walk.items) - 1, tuple(layers)), findings


# --- what is said about a layer -----------------------------------------------------------


def batchnorm_left(record: LayerRecord) -> Finding:
    """The finding that a layer is a BatchNormalization."""
    return catalog.find("batchnorm-left").finding(
        record.path, f"is a {record.class_name} in {' › '.join(record.parents)}"
    )


def batchnorm_operation(record: LayerRecord, config: Mapping[str, Any]) -> Finding | None:
    """The finding that a layer calls an operator of TensorFlow that normalises by batch."""
    function = _operation(record.class_name, config)
    if not _BATCHNORM_OP.search(function):
        return None
    return catalog.find("batchnorm-op").finding(
        record.path, f"calls the TensorFlow function {function}"
    )


def described(record: LayerRecord, config: Mapping[str, Any], shape: Any = None) -> LayerRecord:
    """The record with what the configuration of a GroupNormalization says of its groups.

    Args:
        record: where the layer is.
        config: what its `get_config` gave.
        shape: of its input, batch first, None where an axis is open; None where it isn't known.
    """
    epsilon, dtype = config.get("epsilon"), config.get("dtype")
    policy = inner_config(dtype).get("name") if isinstance(dtype, Mapping) else dtype
    record = replace(
        record,
        epsilon=float(epsilon) if isinstance(epsilon, int | float) else None,
        dtype=str(policy or "").removeprefix("mixed_"),
    )
    groups, axis = config.get("groups"), config.get("axis", -1)
    if record.class_name != "GroupNormalization" or not isinstance(groups, int):
        return record
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    sizes = shape if isinstance(shape, list | tuple) else ()
    channels = elements = None
    if isinstance(axis, int) and -len(sizes) <= axis < len(sizes):
        axis %= len(sizes)
        channels = sizes[axis] if isinstance(sizes[axis], int) else None
        others = [size for index, size in enumerate(sizes) if index not in (0, axis)]
        if channels and all(isinstance(size, int) for size in others):
            elements = (
                channels * math.prod(others) // (channels if groups == -1 else max(groups, 1))
            )
    if groups == -1:
        return replace(record, channels=channels, groups=channels, elements=elements)
    return replace(record, channels=channels, groups=groups, elements=elements)


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
            name = "custom-code" if self.foreign.startswith("runs") else "custom-class"
            yield catalog.find(name).finding(self.record.path, self.foreign)
        elif self.record.class_name in BATCHNORM:
            yield batchnorm_left(self.record)
        if (finding := batchnorm_operation(self.record, self.config)) is not None:
            yield finding


# Parts of a serialized object that say what it is, or how it was trained.
_IDENTITY = names(
    """
    class_name config module registered_name name shared_object_id build_config compile_config
    """
)


class _Walk:
    """Collects the layers of a configuration under the paths that the loaded model gives them."""

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self._paths: dict[str, int] = {}  # to the place in `items`
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

    def nodes(self, nodes: list[SavedNode]) -> None:
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
            if known:
                self._shape(path, node.item)
            else:
                self._visit(node.item, path, parents)

    def _shape(self, path: str, item: Mapping[str, Any]) -> None:
        """What a SavedModel says of a layer's input, which the model's configuration doesn't."""
        index = self._paths.get(path)
        if index is not None and self.items[index].record.class_name == item.get("class_name"):
            known = self.items[index]
            record = described(known.record, known.config, _sizes(item))
            self.items[index] = replace(known, record=record)

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
        self._paths[unique] = len(self.items)
        record = LayerRecord(
            unique, str(item["class_name"]), str(item.get("module") or ""), parents
        )
        config = inner_config(item)
        self.items.append(_Item(described(record, config, _sizes(item)), config, reason))
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


def _sizes(item: Mapping[str, Any]) -> Any:
    """The shape of a layer's input, where it is noted."""
    built = item.get("build_config")
    shape = built.get("input_shape") if isinstance(built, Mapping) else None
    if shape is None:  # how a SavedModel says it
        shape = item.get("build_input_shape")
    return shape.get("items") if isinstance(shape, Mapping) else shape


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
