"""Finds every layer of a model and describes each BatchNormalization as a `Site`.

Functional and Sequential models name their layers; every other layer is crawled by attribute,
so that nothing hides in a wrapper, a list or a dict. What is found but can't be swapped becomes
an obstacle of its site, never silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import Layer, TimeDistributed
from tf_keras.metrics import Metric
from tf_keras.models import Sequential
from tf_keras.src.engine.functional import Functional
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from layerswap.keras_graph.storage import is_revived
from layerswap.records import Finding, Obstacle, Site, Statistics

# What a subclass may define and still compute as BatchNormalization does.
HARMLESS = {"__init__", "get_config", "from_config"}


@dataclass(slots=True)
class Found:
    """A layer with its path and how it is used.

    `calls` counts the graph's call sites; `nodes` are the calls that the graph recorded;
    `obstacles` are those that come from where the layer lives.
    """

    path: str
    layer: Any
    calls: int = 0
    nodes: list[Any] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)


def find_layers(model: Any) -> list[Found]:
    """Every layer inside a model, each object once, parents before children.

    Args:
        model: a tf_keras model.

    Returns:
        In the order of the walk: a graph's layers in the order of `model.layers`. An object that
        is reached several times keeps its first path and adds up its calls.
    """
    walk = _Walk()
    walk.descend(Found("", model, calls=1), parents=())
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, BatchNormalizationBase) and id(layer) not in walk.found:
            reason = "Keras tracks it, but no attribute of the model leads to it"
            walk.register(Found(layer.name, layer, calls=1, obstacles={"unreached": reason}))
    return list(walk.found.values())


def find_batchnorms(model: Any) -> list[Found]:
    """The BatchNormalization objects among `find_layers`."""
    return [f for f in find_layers(model) if isinstance(f.layer, BatchNormalizationBase)]


def describe(found: Found) -> Site:
    """The plain-data description of one BatchNormalization."""
    layer = found.layer
    axes = _axes(layer)
    shape = _input_shape(found)
    built = layer.built and shape is not None
    rank = len(shape) if shape is not None else None
    axis = axes[0] if len(axes) == 1 else None
    if axis is not None and rank is not None and axis < 0:
        axis += rank
    spatial = channels = None
    if built and shape is not None and axis is not None and not layer.virtual_batch_size:
        channels = int(layer.moving_mean.shape[0])
        shape = (*shape[:axis], channels, *shape[axis + 1 :])
        others = [size for i, size in enumerate(shape) if i not in (0, axis)]
        spatial = None if None in others else math.prod(size for size in others if size)
    return Site(
        path=found.path,
        class_name=type(layer).__name__,
        config=_plain_config(layer),
        channels=channels,
        axis=axis,
        rank=rank,
        calls=max(found.calls, 1),
        spatial=spatial,
        shape=shape or (),
        trainable=bool(layer.trainable),
        obstacles=tuple(Obstacle(code, reason) for code, reason in _obstacles(found).items()),
    )


def read_statistics(layer: Any) -> Statistics | None:
    """What a BatchNormalization learned, in float64; None where it has no weights yet."""
    if not layer.built:
        return None
    mean = _float64(layer.moving_mean)
    return Statistics(
        gamma=np.ones_like(mean) if layer.gamma is None else _float64(layer.gamma),
        beta=np.zeros_like(mean) if layer.beta is None else _float64(layer.beta),
        mean=mean,
        variance=_float64(layer.moving_variance),
    )


def variables(model: Any) -> list[Any]:
    """`model.weights`; of a model that isn't built yet, those that its layers have already."""
    if model.built:
        weights = model.weights
    else:
        layers = (found.layer for found in find_layers(model))
        weights = [v for x in layers for v in (*x._trainable_weights, *x._non_trainable_weights)]
    # Lookup layers list their tables among the weights, which are no variables.
    return list({id(v): v for v in weights if isinstance(v, tf.Variable)}.values())


def find_nonfinite(model: Any) -> Iterator[Finding]:
    """A warning for each variable that holds NaN or Inf."""
    for variable in variables(model):
        if not variable.dtype.is_floating:
            continue
        values = np.asarray(variable).astype(np.float32)
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            yield Finding(
                "nonfinite-weights",
                "warning",
                variable.name.removesuffix(":0"),
                f"{bad} of {values.size} values are NaN or Inf",
                "Repair or retrain the model: its output can't be trusted.",
            )


class _Walk:
    """Collects layers by identity; paths stay unique."""

    def __init__(self) -> None:
        self.found: dict[int, Found] = {}
        self._paths: set[str] = set()

    def register(self, found: Found) -> None:
        path, number = found.path, 1
        while found.path in self._paths:
            number += 1
            found.path = f"{path}#{number}"
        self._paths.add(found.path)
        self.found[id(found.layer)] = found

    def visit(self, found: Found, parents: tuple[int, ...]) -> None:
        if id(found.layer) in parents:
            return  # a layer that leads back to its own parent
        known = self.found.get(id(found.layer))
        if known is None:
            self.register(found)
            self.descend(found, parents)
            return
        known.calls += found.calls
        known.nodes += found.nodes
        known.obstacles |= found.obstacles
        if _runs_its_graph(found.layer):  # the calls inside it count once more
            again = Found(known.path, known.layer, found.calls, [], found.obstacles)
            self.descend(again, parents)

    def descend(self, found: Found, parents: tuple[int, ...]) -> None:
        if not isinstance(found.layer, BatchNormalizationBase):
            for child in _children(found):
                self.visit(child, (*parents, id(found.layer)))


def _runs_its_graph(layer: Any) -> bool:
    """Whether a call of the layer runs the layers of its graph and nothing else."""
    return isinstance(layer, Functional | Sequential) and type(layer).call in (
        Functional.call,
        Sequential.call,
    )


def _children(parent: Found) -> Iterator[Found]:
    layer = parent.layer
    prefix = f"{parent.path}/" if parent.path else ""
    inherited = dict(parent.obstacles)
    if is_revived(layer):
        inherited["revived"] = (
            f"it lives in '{type(layer).__name__}', read from a SavedModel without its class: the "
            "traced call would go on as before"
        )
    named: set[int] = set()
    if _runs_its_graph(layer):
        for child in layer.layers:
            named.add(id(child))
            nodes = _graph_nodes(layer, child)
            obstacles = dict(inherited)
            if any(_is_masked(node) for node in nodes):
                obstacles["masked"] = (
                    "a mask reaches it, which stock GroupNormalization doesn't apply as "
                    "BatchNormalization does"
                )
            calls = parent.calls * max(len(nodes), 1)
            yield Found(prefix + child.name, child, calls, nodes, obstacles)
    if type(layer) is not TimeDistributed:
        inherited["custom-container"] = (
            f"it lives in '{type(layer).__name__}', whose own code decides how it is called"
        )
    for name, child in _attributes(layer):
        if id(child) not in named:
            named.add(id(child))
            yield Found(prefix + name, child, parent.calls, [], dict(inherited))


def _attributes(layer: Any) -> Iterator[tuple[str, Any]]:
    """Layers in the attributes of a layer, through lists, tuples, dicts and modules."""
    for name, value in vars(layer).items():
        if not name.startswith(_BOOKKEEPING):
            yield from _crawl(name, value, depth=0)


# Attributes in which Keras keeps its own account of layers that are found elsewhere.
_BOOKKEEPING = (
    "_self_",
    "_inbound_nodes",
    "_outbound_nodes",
    "_obj_reference_counts",
    "_layer_call_argspecs",
    "_nodes_by_depth",
    "_nested_inputs",
    "_nested_outputs",
    "_compiled_trainable_state",
    "_metrics",
    "compiled_",
    "optimizer",
    "history",
    "inputs",
    "outputs",
    "keras_api",
)
_DEEPEST_CONTAINER = 8


def _crawl(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Layer):
        if not isinstance(value, Metric):
            yield name, value
    elif depth >= _DEEPEST_CONTAINER or isinstance(value, str | bytes | np.ndarray | tf.Tensor):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _crawl(f"{name}[{key}]", item, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _crawl(f"{name}[{index}]", item, depth + 1)
    elif isinstance(value, tf.Module) and not isinstance(value, tf.Variable):
        for key, item in vars(value).items():
            if not key.startswith(_BOOKKEEPING):
                yield from _crawl(f"{name}.{key}", item, depth + 1)


def _free_path(path: str, seen: dict[int, Found]) -> str:
    taken = {f.path for f in seen.values()}
    if path not in taken:
        return path
    number = 2
    while f"{path}#{number}" in taken:
        number += 1
    return f"{path}#{number}"


def _graph_nodes(container: Any, layer: Any) -> list[Any]:
    """The calls of `layer` that belong to the graph of `container`."""
    keys = getattr(container, "_network_nodes", ())
    return [
        node
        for index, node in enumerate(layer._inbound_nodes)
        if f"{layer.name}_ib-{index}" in keys
    ]


def _is_masked(node: Any) -> bool:
    return any(getattr(t, "_keras_mask", None) is not None for t in node.keras_inputs)


def _axes(layer: Any) -> list[int]:
    axis = layer.axis
    return [int(a) for a in axis] if isinstance(axis, list | tuple) else [int(axis)]


def _input_shape(found: Found) -> tuple[int | None, ...] | None:
    """The input's shape at the call with the fewest positions; None when unbuilt."""
    layer = found.layer
    shapes = [_shape_tuple(node.keras_inputs[0].shape) for node in found.nodes if node.keras_inputs]
    if not shapes and layer._build_input_shape is not None:
        shapes = [_shape_tuple(layer._build_input_shape)]
    shapes = [shape for shape in shapes if shape is not None]
    if not shapes:
        return None
    return min(shapes, key=lambda s: math.prod(math.inf if d is None else d for d in s[1:]))


def _shape_tuple(shape: Any) -> tuple[int | None, ...] | None:
    dimensions = tf.TensorShape(shape)
    return None if dimensions.rank is None else tuple(dimensions.as_list())


def _obstacles(found: Found) -> dict[str, str]:
    layer = found.layer
    obstacles = dict(found.obstacles)
    kind = type(layer)
    own = {
        name
        for base in kind.__mro__
        if issubclass(base, BatchNormalizationBase) and not _is_stock(base)
        for name, value in vars(base).items()
        if callable(value) or isinstance(value, property | classmethod | staticmethod)
    }
    foreign = sorted((own | ({"call"} & vars(layer).keys())) - HARMLESS)
    if is_revived(layer):
        obstacles["revived"] = (
            "it was read from a SavedModel without its class: the traced call would go on as before"
        )
    elif foreign:
        obstacles["overridden-call"] = (
            f"'{kind.__name__}' overrides {', '.join(foreign)}, so what it computes isn't known"
        )
    if getattr(layer, "adjustment", None) is not None:
        obstacles["adjustment"] = "its adjustment function has no counterpart in GroupNormalization"
    if any(len(node.keras_inputs) > 1 for node in found.nodes):
        obstacles["tensor-argument"] = "it is called with a tensor as an argument (training or mask)"
    return obstacles


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith(("tf_keras.src.", "keras.src."))


def _plain_config(layer: Any) -> dict[str, Any]:
    config = dict(layer.get_config())
    config["axis"] = _axes(layer)
    return config


def _float64(variable: Any) -> Any:
    return np.asarray(tf.cast(variable, tf.float64), dtype=np.float64)
