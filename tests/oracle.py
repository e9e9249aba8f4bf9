"""Independent truth in NumPy float64: what the package's numbers are compared with.

Written naively, one sample, group or channel at a time, and sharing no code with the package,
so that a mistake would have to be made twice to go unseen.
"""

from __future__ import annotations

import math

import numpy as np


def group_norm(x, groups, gamma, beta, epsilon, axis=-1):
    """GroupNormalization of `x` over `axis`: float64, same shape as `x`.

    Args:
        x: samples on axis 0; at least two axes.
        groups: number of groups; -1 means one group per channel.
        gamma: scale per channel, or None for ones.
        beta: shift per channel, or None for zeros.
        epsilon: added to each group's variance.
        axis: the channel axis, any but 0; negative values count from the end.
    """
    channels_last, axis = _channels_last(x, axis)
    channels = channels_last.shape[-1]
    if groups == -1:
        groups = channels
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    size = channels // groups
    gamma, beta = _vector(gamma, channels, 1.0), _vector(beta, channels, 0.0)

    result = np.empty_like(channels_last)
    for sample in range(channels_last.shape[0]):
        for group in range(groups):
            members = range(group * size, (group + 1) * size)
            block = channels_last[sample, ..., group * size : (group + 1) * size]
            mean = block.sum() / block.size
            variance = ((block - mean) ** 2).sum() / block.size
            for channel in members:
                normal = (channels_last[sample, ..., channel] - mean) / math.sqrt(
                    variance + epsilon
                )
                result[sample, ..., channel] = gamma[channel] * normal + beta[channel]
    return np.moveaxis(result, -1, axis)


def batch_norm(x, gamma, beta, mean, variance, epsilon, axis=-1):
    """BatchNormalization at inference: float64, same shape as `x`.

    `gamma` may be None (ones), `beta` None (zeros); `mean` and `variance` are the moving
    statistics, one value per channel.
    """
    channels_last, axis = _channels_last(x, axis)
    channels = channels_last.shape[-1]
    gamma, beta = _vector(gamma, channels, 1.0), _vector(beta, channels, 0.0)
    mean, variance = _vector(mean, channels, 0.0), _vector(variance, channels, 1.0)

    result = np.empty_like(channels_last)
    for channel in range(channels):
        normal = (channels_last[..., channel] - mean[channel]) / math.sqrt(
            variance[channel] + epsilon
        )
        result[..., channel] = gamma[channel] * normal + beta[channel]
    return np.moveaxis(result, -1, axis)


def affine_match(gamma, beta, mean, variance, bn_epsilon, groups, gn_epsilon):
    """γ' and β' of the GroupNormalization that equals a BatchNormalization.

    They are equal for every sample whose group moments are the population's:

        m_g = mean over c in g of μ_c
        V_g = mean over c in g of v_c + (μ_c − m_g)²
        a   = γ / √(v + ε)
        γ'  = a · √(V_g + ε')
        β'  = β + a · (m_g − μ)

    Args:
        gamma: the BN's scale, or None for ones.
        beta: the BN's shift, or None for zeros.
        mean: the BN's moving mean μ.
        variance: the BN's moving variance v.
        bn_epsilon: ε.
        groups: number of groups; -1 means one group per channel.
        gn_epsilon: ε'.

    Returns:
        Two float64 arrays, one value per channel.
    """
    channels = len(mean)
    if groups == -1:
        groups = channels
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    size = channels // groups
    gamma, beta = _vector(gamma, channels, 1.0), _vector(beta, channels, 0.0)
    mean, variance = _vector(mean, channels, 0.0), _vector(variance, channels, 1.0)

    new_gamma, new_beta = np.empty(channels), np.empty(channels)
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        group_mean = sum(mean[c] for c in members) / size
        group_variance = sum(variance[c] + (mean[c] - group_mean) ** 2 for c in members) / size
        for c in members:
            slope = gamma[c] / math.sqrt(variance[c] + bn_epsilon)
            new_gamma[c] = slope * math.sqrt(group_variance + gn_epsilon)
            new_beta[c] = beta[c] + slope * (group_mean - mean[c])
    return new_gamma, new_beta


def _channels_last(x, axis):
    """A float64 copy of `x` with the channel axis last, and that axis counted from 0."""
    x = np.array(x, dtype=np.float64)
    if x.ndim < 2:
        raise ValueError(f"needs a batch axis and a channel axis, got shape {x.shape}")
    positive = axis + x.ndim if axis < 0 else axis
    if not 0 < positive < x.ndim:
        raise ValueError(f"axis {axis} is no channel axis of shape {x.shape}")
    return np.moveaxis(x, positive, -1), positive


def _vector(values, channels, default):
    if values is None:
        return np.full(channels, default)
    values = np.array(values, dtype=np.float64)
    if values.shape != (channels,):
        raise ValueError(f"expected {channels} values, got shape {values.shape}")
    return values
