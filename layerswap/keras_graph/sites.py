"""Describes each BatchNormalization of a model as plain data, with what rules out a swap."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import Lambda
from tf_keras.src.layers.core.tf_op_layer import SlicingOpLambda, TFOpLambda

from layerswap.errors import reason_of
from layerswap.keras_graph.observing import Observed, observe
from layerswap.keras_graph.storage import is_revived
from layerswap.keras_graph.walk import Found, find_batchnorms, find_layers, is_masked, variables
from layerswap.records import Finding, Obstacle, Site, Statistics

Shape = tuple[int | None, ...]

# What a subclass may define and still compute as BatchNormalization does.
HARMLESS = {
    *("__init__", "get_config", "from_config"),
    *("__module__", "__doc__", "__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"),
    *("__init_subclass__", "__annotations__", "__static_attributes__", "__firstlineno__"),
    *("_keras_api_names", "_keras_api_names_v1"),
}
_MASKED = (
    "a mask reaches it, which stock GroupNormalization doesn't apply as BatchNormalization does"
)


def find_sites(model: Any) -> tuple[list[Site], dict[str, Statistics], list[Finding]]:
    """Every BatchNormalization of a model, what each learned, by path, and what can't be seen.

    Layers that a graph calls are described from the graph; those that other code calls, from a
    trace of that code, once for inference and once for training.

    Args:
        model: a tf_keras model; its weights aren't touched.
    """
    batchnorms = find_batchnorms(model)
    observed = observe(model, batchnorms)
    batchnorms += observed.strangers
    tied = _tied(model)
    for found in batchnorms:
        if tied & {id(variable) for variable in found.layer.weights}:
            found.obstacles["tied-weights"] = "another layer uses its γ, β or statistics as well"
    sites = [_describe(found, observed.of.get(id(found.layer))) for found in batchnorms]
    unseen = [
        Finding(
            "unseen-code",
            "warning",
            path,
            f"its code can't be traced ({why}), so a BatchNormalization that no attribute leads to "
            "would be missed",
            "Check the code: a layer that it uses belongs into an attribute.",
        )
        for path, why in observed.unseen.items()
    ]
    return sites, _statistics(batchnorms), unseen


def _tied(model: Any) -> set[int]:
    """`id` of each variable that belongs to more than one layer."""
    owners = Counter(
        id(variable)
        for found in find_layers(model)
        for variable in (*found.layer._trainable_weights, *found.layer._non_trainable_weights)
    )
    return {variable for variable, count in owners.items() if count > 1}


def _statistics(batchnorms: Iterable[Found]) -> dict[str, Statistics]:
    learned = ((found.path, read_statistics(found.layer)) for found in batchnorms)
    return {path: statistics for path, statistics in learned if statistics is not None}


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


def find_nonfinite(model: Any) -> Iterator[Finding]:
    """A warning for each variable that holds NaN or Inf."""
    for variable in variables(model):
        if not variable.dtype.is_floating:
            continue
        values = np.asarray(variable)
        if values.dtype.kind != "f":  # bfloat16 is none of NumPy's own
            values = values.astype(np.float32)
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            yield Finding(
                "nonfinite-weights",
                "warning",
                variable.name.removesuffix(":0"),
                f"{bad} of {values.size} values are NaN or Inf",
                "Repair or retrain the model: its output can't be trusted.",
            )


def _describe(found: Found, observed: Observed | None) -> Site:
    layer = found.layer
    axes = _axes(layer)
    shape = _input_shape(found, observed)
    rank = len(shape) if shape is not None else None
    axis = axes[0] if len(axes) == 1 else None
    if axis is not None and rank is not None and axis < 0:
        axis += rank
    spatial = channels = None
    if layer.built and shape is not None and axis is not None and not layer.virtual_batch_size:
        channels = int(layer.moving_mean.shape[0])
        shape = (*shape[:axis], channels, *shape[axis + 1 :])
        others = [size for i, size in enumerate(shape) if i not in (0, axis)]
        spatial = None if None in others else math.prod(size for size in others if size)
    obstacles = _obstacles(found, observed)
    try:
        config = {**layer.get_config(), "axis": axes}
    except Exception as error:  # whatever a subclass raises
        config = {"axis": axes}
        obstacles["no-config"] = f"its get_config() fails: {reason_of(error)}"
    return Site(
        path=found.path,
        class_name=type(layer).__name__,
        config=config,
        channels=channels,
        axis=axis,
        rank=rank,
        calls=max(observed.calls if observed else found.calls, 1),
        spatial=spatial,
        shape=shape or (),
        trainable=bool(layer.trainable),
        consumers_cast=_consumers_cast(found),
        obstacles=tuple(Obstacle(code, reason) for code, reason in obstacles.items()),
    )


def _consumers_cast(found: Found) -> bool:
    """Whether all that uses the output casts it to its own type, so that it may be float32.

    Keras's layers do; operators (`bn(x) + y`), functions and code of one's own need not, and an
    output of the model would change its type.
    """
    if found.host is not None or found.is_output or not found.nodes:
        return False
    consumers = [node.layer for node in found.layer._outbound_nodes]
    return all(
        layer._autocast
        and type(layer).__module__.startswith("tf_keras.src.")
        and not isinstance(layer, TFOpLambda | SlicingOpLambda | Lambda)
        for layer in consumers
    )


def _axes(layer: Any) -> list[int]:
    axis = layer.axis
    return [int(a) for a in axis] if isinstance(axis, list | tuple) else [int(axis)]


def _input_shape(found: Found, observed: Observed | None) -> Shape | None:
    """The input's shape at the call with the fewest positions; None when unbuilt."""
    known = [node.keras_inputs[0].shape for node in found.nodes if node.keras_inputs]
    if observed and observed.shapes:
        known = list(observed.shapes)
    if not known and found.layer._build_input_shape is not None:
        known = [found.layer._build_input_shape]
    shapes: list[Shape] = [
        tuple(shape.as_list()) for shape in map(tf.TensorShape, known) if shape.rank is not None
    ]

    def positions(shape: Shape) -> float:
        return math.prod(math.inf if size is None else float(size) for size in shape[1:])

    return min(shapes, key=positions, default=None)


def _obstacles(found: Found, observed: Observed | None) -> dict[str, str]:
    layer, kind = found.layer, type(found.layer)
    obstacles = dict(found.obstacles)
    foreign = _overridden(kind)
    # Keras leaves the class's own `call` on a layer that was saved as a SavedModel.
    if getattr(vars(layer).get("call", layer.call), "__func__", None) is not kind.call:
        foreign.append("call")
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
        obstacles["tensor-argument"] = (
            "it is called with a tensor as an argument (training or mask)"
        )
    if any(map(is_masked, found.nodes)):
        obstacles["masked"] = _MASKED
    if observed is not None:
        obstacles |= observed.obstacles
        if observed.masked:
            obstacles["masked"] = _MASKED
    return obstacles


def _overridden(kind: type) -> list[str]:
    """What of Keras's own class a subclass or mixin replaces, the harmless left out.

    What a subclass adds under other names isn't called by Keras's code.
    """
    stock = next(base for base in kind.__mro__ if _is_stock(base))
    return sorted(
        name
        for name in dir(stock)
        if name not in HARMLESS
        and inspect.getattr_static(kind, name) is not inspect.getattr_static(stock, name)
    )


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith(("tf_keras.src.", "keras.src."))


def _float64(variable: Any) -> Any:
    return np.asarray(tf.cast(variable, tf.float64), dtype=np.float64)
