"""Sums over the positions of tensors, and what GroupNormalization makes of a tensor with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from layerswap.fitting import SampleSums, group_moments
from layerswap.records import Float64

# As many values are summed up in float32: it rounds them by 1e-5 of their size at most.
SHORT = 256


def sum_up(x: Any, t: Any, axis: int) -> SampleSums:
    """What `fitting` needs of a batch.

    Args:
        x: the input of a GroupNormalization, the batch first.
        t: the output of the BatchNormalization, of the same shape.
        axis: the channels', counted from 0.
    """
    # Both less their mean, so that what is rounded is small.
    (x, shift), (t, offset) = (_centred(_channels_last(tensor, axis)) for tensor in (x, t))
    positions = int(np.prod(x.shape[1:-1]))
    sx, sxx, st, stt, sxt = (_total(term) for term in (x, x * x, t, t * t, x * t))
    return SampleSums(
        positions,
        shift,
        x=sx,
        xx=sxx,
        t=st + positions * offset,
        tt=stt + 2 * offset * st + positions * offset**2,
        xt=sxt + offset * sx,
    )


def _centred(tensor: Any) -> tuple[Any, Float64]:
    mean = tf.reduce_mean(tensor, axis=list(range(len(tensor.shape) - 1)))
    return tensor - mean, tf.cast(mean, tf.float64).numpy()


def _channels_last(tensor: Any, axis: int) -> Any:
    """In float32 at least, the channels moved to the end."""
    if tensor.dtype != tf.float64:
        tensor = tf.cast(tensor, tf.float32)
    rank = len(tensor.shape)
    if axis == rank - 1:
        return tensor
    return tf.transpose(tensor, [*(i for i in range(rank) if i != axis), axis])


def _total(term: Any) -> Float64:
    """Sums over positions: of one axis in the term's own type if it is short, else in float64.

    That takes half the time, and rounds no more than the terms themselves are.
    """
    rank = len(term.shape)
    if rank > 2 and term.shape[-2] <= SHORT:
        term, rank = tf.reduce_sum(term, axis=-2), rank - 1
    total: Float64 = tf.reduce_sum(tf.cast(term, tf.float64), axis=list(range(1, rank - 1))).numpy()
    return total


def normalize(layer: Any, x: Any, sums: SampleSums) -> Any:
    """What a GroupNormalization puts out, from moments that are known already.

    Args:
        layer: built, with γ and β.
        x: its input.
        sums: `sum_up` of it.
    """
    mean, variance = group_moments(sums, layer.groups)
    size = x.shape[layer.axis] // layer.groups
    inverse = np.repeat(1 / np.sqrt(variance + layer.epsilon), size, axis=1)
    factor = inverse * np.asarray(layer.gamma, np.float64)
    offset = np.asarray(layer.beta, np.float64) - np.repeat(mean, size, axis=1) * factor
    shape = [1] * len(x.shape)
    shape[0], shape[layer.axis] = factor.shape
    wide = tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)
    scaled = wide * tf.cast(factor.reshape(shape), wide.dtype)
    return tf.cast(scaled + tf.cast(offset.reshape(shape), wide.dtype), layer.compute_dtype)
