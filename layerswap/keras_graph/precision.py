"""Measures what 16-bit policies cost GroupNormalization, beside what they cost BN.

Stock GroupNormalization casts its variance to the layer's compute type: under mixed_float16 one
above 65504 overflows. Where all consumers cast their input anyway, the plan gives the layer the
policy float32; elsewhere it says in numbers what to expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.layers import BatchNormalization, GroupNormalization, Layer

from layerswap.moments import normalize_groups
from layerswap.records import Array, Finding, SwapPlan

# Activations of a network that doesn't normalise its input, as far as float16 holds them.
MEAN, STD = 100.0, 300.0
EPSILON = 1e-3
POSITIONS = 256


def find_imprecise(plan: SwapPlan) -> Iterator[Finding]:
    """A warning for each swap that computes in 16 bits, with the errors of both layers."""
    for swap in plan.swaps:
        dtype = swap.config.get("dtype")
        probe = Layer(dtype=_policy(dtype))
        if probe.compute_dtype not in ("float16", "bfloat16"):
            continue
        ours, theirs = _errors(probe.dtype_policy.name, swap.channels_per_group)
        if ours > theirs:
            yield Finding(
                "sixteen-bit",
                "warning",
                swap.site.path,
                f"under {probe.dtype_policy.name} it computes in 16 bits, since code that uses its "
                f"output wants that type: on inputs of mean {MEAN:g} and standard deviation "
                f"{STD:g} its error is {ours:.2g}, BatchNormalization's was {theirs:.2g} (outputs "
                "have standard deviation 1)",
                "Check the accuracy, or build the model in float32.",
            )


def _policy(dtype: Any) -> Any:
    """A dtype or policy as a layer's configuration holds it."""
    if not isinstance(dtype, Mapping):
        return dtype
    return tf_keras.mixed_precision.Policy.from_config(dtype["config"])


@cache
def _errors(policy: str, channels_per_group: int) -> tuple[float, float]:
    """Largest errors of GroupNormalization and BatchNormalization on the same inputs."""
    channels = 2 * channels_per_group
    draw = np.random.default_rng(0).normal(MEAN, STD, (2, POSITIONS, channels))
    groupnorm = GroupNormalization(2, epsilon=EPSILON, dtype=policy)
    batchnorm = BatchNormalization(epsilon=EPSILON, dtype=policy)
    x = tf.cast(draw, groupnorm.compute_dtype)
    exact = _wide(x)
    batchnorm.build(x.shape)
    batchnorm.moving_mean.assign(np.full(channels, MEAN))
    batchnorm.moving_variance.assign(np.full(channels, STD**2))
    truths = (
        normalize_groups(exact, 2, EPSILON, 2),
        (exact - MEAN) / np.sqrt(STD**2 + EPSILON),
    )
    layers = (groupnorm, batchnorm)
    ours, theirs = (
        float(np.nan_to_num(np.abs(_wide(layer(x)) - truth), nan=np.inf).max())
        for layer, truth in zip(layers, truths, strict=True)
    )
    return ours, theirs


def _wide(tensor: Any) -> Array:
    return np.asarray(tf.cast(tensor, tf.float64))
