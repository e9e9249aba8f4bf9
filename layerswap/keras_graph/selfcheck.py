"""Proves a swap on the result: nothing left, nothing too much, each new layer right.

Cheap beside the swap: every new layer runs twice on a few positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import GroupNormalization
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase
from tf_keras.src.mixed_precision.autocast_variable import enable_auto_cast_variables

from layerswap.comparison import tolerance_for
from layerswap.errors import TransferError
from layerswap.keras_graph.walk import find_layers
from layerswap.moments import normalize_groups
from layerswap.records import Array, Swap, SwapPlan

BATCH = 2
# Positions along each axis but the channels'; enough to tell one axis from another.
MOST_POSITIONS = 3


def check_swap(model: Any, plan: SwapPlan) -> None:
    """Checks a model that a plan was applied to.

    No BatchNormalization is left but those that the plan skips; at the path of each swap there
    is a stock GroupNormalization of the planned configuration; it computes what NumPy in float64
    does; and a sample alone gives what it gives within a batch.

    Raises:
        TransferError: any of this isn't so; lists all that isn't.
    """
    kept = {skip.site.path for skip in plan.skips}
    layers = {found.path: found.layer for found in find_layers(model)}
    left = [
        path
        for path, layer in layers.items()
        if isinstance(layer, BatchNormalizationBase) and path not in kept
    ]
    problems = [f"{path}: BatchNormalization is left" for path in left]
    for swap in plan.swaps:
        problems += _problems(swap, layers.get(swap.site.path))
    if problems:
        raise TransferError(
            "the self-check of the swap failed:\n  " + "\n  ".join(problems),
            where=plan.source,
            hint="This is a defect of layerswap: please report it with the model's configuration.",
        )


def _problems(swap: Swap, layer: Any) -> Iterator[str]:
    path = swap.site.path
    if type(layer) is not GroupNormalization:
        yield f"{path}: is a {type(layer).__name__}, not a stock GroupNormalization"
        return
    planned = {name: swap.config[name] for name in ("groups", "axis", "epsilon")}
    actual = {name: getattr(layer, name) for name in planned}
    if planned != actual:
        yield f"{path}: has {actual}, but {planned} was planned"
        return
    x = _draw(swap)
    together, alone = _run(layer, x), _run(layer, x[:1])
    limit = tolerance_for(layer.compute_dtype)
    expected = _truth(layer, x)
    scale = limit.absolute + limit.relative * float(np.abs(expected).max())
    for what, got, want in (
        ("its output", together, expected),
        ("the output of a sample alone", alone, expected[:1]),
    ):
        error = float(np.abs(got - want).max())
        if not error <= scale:  # NaN is no agreement, either
            yield f"{path}: {what} is {error:.3g} off the float64 computation (allowed {scale:.3g})"


def _draw(swap: Swap) -> Array:
    axis = swap.config["axis"]
    sizes = [
        BATCH if i == 0 else swap.channels if i == axis else min(size or 4, MOST_POSITIONS + i)
        for i, size in enumerate(swap.site.shape)
    ]
    return np.random.default_rng(0).normal(0.5, 2.0, sizes)


def _run(layer: Any, x: Array) -> Array:
    """`call` alone: `__call__` would record the input as the layer's signature."""
    with enable_auto_cast_variables(layer._compute_dtype_object):
        y = layer.call(tf.cast(x, layer.compute_dtype))
    return np.asarray(tf.cast(y, tf.float64))


def _truth(layer: Any, x: Array) -> Array:
    rounded = np.asarray(tf.cast(tf.cast(x, layer.compute_dtype), tf.float64))
    y = normalize_groups(rounded, layer.groups, layer.epsilon, layer.axis)
    shape = [-1 if i == layer.axis else 1 for i in range(x.ndim)]
    for variable, combine in ((layer.gamma, np.multiply), (layer.beta, np.add)):
        if variable is not None:
            y = combine(y, np.asarray(tf.cast(variable, tf.float64)).reshape(shape))
    return y
