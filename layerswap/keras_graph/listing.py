"""Looks for BatchNormalization in a live model: by class, by attribute, and by what code calls."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import tf_keras
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from layerswap import catalog
from layerswap.config_files import batchnorm_left, batchnorm_operation, described
from layerswap.keras_graph.storage import is_revived
from layerswap.keras_graph.walk import Found, find_layers
from layerswap.records import Checked, Finding, LayerRecord
from layerswap.stock_names import NORMALIZATION

_FRAMEWORK = ("tf_keras.", "keras.", "tensorflow.")
_BATCHNORM_NAME = re.compile(r"(?i)batch_?norm")
_STATISTICS = re.compile(r"(moving|running)_(mean|var)")


def check_model(model: tf_keras.Model, source: str) -> tuple[Checked, list[Finding]]:
    """What `config_files.check_config_file` does, for a loaded model.

    A class of the user's counts as a BatchNormalization if it is a subclass of Keras's. One that
    merely looks like it (its name, its variables or the functions that its `call` uses) stays
    undetermined, and so does one that was read from a SavedModel without its class.
    """
    found = [Found("", model), *find_layers(model)]
    classes = {item.path: type(item.layer).__name__ for item in found}
    records = {item.path: _record(item, classes) for item in found}
    layers = tuple(records[i.path] for i in found if _is_normalization(i.layer))
    findings = [finding for i in found for finding in _judge(i.layer, records[i.path])]
    return Checked(source, len(found) - 1, layers), findings


def _record(item: Found, classes: dict[str, str]) -> LayerRecord:
    steps = [place.start() for place in re.finditer("/", item.path)]
    holders = ["", *(item.path[:end] for end in steps)] if item.path else []
    parents = tuple(classes[path] for path in holders if path in classes)
    kind = type(item.layer)
    record = LayerRecord(item.path, kind.__name__, kind.__module__, parents)
    if not isinstance(item.layer, tf_keras.layers.GroupNormalization) or not item.layer.built:
        return record
    return described(record, item.layer.get_config(), _input_shape(item.layer))


def _input_shape(layer: Any) -> tuple[int | None, ...] | None:
    """The shape of what a layer was built for; of several calls, the first."""
    try:
        return tuple(layer.get_input_shape_at(0))
    except (AttributeError, RuntimeError, TypeError):  # not part of a graph, or several inputs
        shape = getattr(layer, "_build_input_shape", None)
        return None if shape is None else tuple(shape)


def _is_normalization(layer: Any) -> bool:
    return any(base.__name__ in NORMALIZATION and _is_stock(base) for base in type(layer).__mro__)


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith(_FRAMEWORK)


def _judge(layer: Any, record: LayerRecord) -> Iterator[Finding]:
    kind = type(layer)
    if isinstance(layer, BatchNormalizationBase):
        yield batchnorm_left(record)
    elif is_revived(layer):
        yield catalog.find("custom-class").finding(
            record.path,
            f"is a {record.class_name} without its class: only the traced call is left",
            "Name the class with --custom-objects (custom_objects= in Python).",
        )
    elif _is_stock(kind):
        if record.class_name in ("TFOpLambda", "TensorFlowOpLayer"):
            finding = batchnorm_operation(record, layer.get_config())
            if finding is not None:
                yield finding
    elif _BATCHNORM_NAME.search(record.class_name) or any(
        _STATISTICS.search(weight.name)
        for weight in (*layer._trainable_weights, *layer._non_trainable_weights)
    ):
        yield _lookalike(record, "is named like BatchNormalization or keeps statistics as it does")
    functions: list[Any] = [
        value for value in vars(layer).values() if isinstance(value, types.FunctionType)
    ]
    if not _is_stock(kind) and not isinstance(layer, BatchNormalizationBase):
        functions.append(getattr(kind, "call", None))
    for function in functions:
        name = _batchnorm_in(function, own=vars(layer))
        if name:
            yield _lookalike(record, f"runs code that uses {name}")


def _lookalike(record: LayerRecord, message: str) -> Finding:
    return catalog.find("batchnorm-lookalike").finding(record.path, message)


def _batchnorm_in(function: Any, own: Mapping[str, Any]) -> str:
    """A name in a function's code that speaks of BN and isn't that of an attribute of its own."""
    function = inspect.unwrap(function) if callable(function) else None
    code = getattr(function, "__code__", None)
    if code is None or f"{function.__module__}.".startswith(_FRAMEWORK):
        return ""
    parts = [code]
    while parts:
        part = parts.pop()
        parts += [value for value in part.co_consts if isinstance(value, types.CodeType)]
        for name in part.co_names:
            if _BATCHNORM_NAME.search(name) and name not in own:
                return str(name)
    return ""
