"""Closed-form fit of GroupNormalization to what BatchNormalization learned. NumPy, float64.

BatchNormalization at inference computes, per channel c, `y = γ(x − μ)/√(v + ε) + β`.
GroupNormalization divides each sample by the mean and variance of its own group g. Where a
sample's group moments equal the population's,

    m_g = mean over c in g of μ_c
    V_g = mean over c in g of v_c + (μ_c − m_g)²

(the law of total variance), both compute the same when, with a = γ/√(v + ε),

    γ' = a·√(V_g + ε')
    β' = β + a·(m_g − μ)

where ε' is GroupNormalization's own epsilon. Derived in `docs/weights.md`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerswap.records import Affine, Float64, Statistics

LEAST_ADAPTIVE_EPSILON = 1e-3
# A channel whose variance is below this share of what the layer's channels have carries no signal:
# float32 rounding of a constant alone leaves about 1e-14 of the squared mean.
DEAD_VARIANCE = 1e-8
# Taken as what channels have: a single huge one says nothing of the others, and neither do the
# dead ones, even where they are most.
TYPICAL_QUANTILE = 0.9


def group_moments(statistics: Statistics, groups: int) -> tuple[Float64, Float64]:
    """Mean and variance of each group over the population.

    Args:
        statistics: per channel, C values each.
        groups: a divisor of C; channels of a group are adjacent.

    Returns:
        Two arrays of shape (groups,).
    """
    mean = statistics.mean.reshape(groups, -1)
    variance = statistics.variance.reshape(groups, -1)
    group_mean = mean.mean(axis=1)
    group_variance = (variance + (mean - group_mean[:, None]) ** 2).mean(axis=1)
    return group_mean, group_variance


def adaptive_epsilon(statistics: Statistics, groups: int, k: float) -> float:
    """`max(1e-3, k · mean of V_g)`: an epsilon in proportion to the layer's own variance.

    It damps how far one sample's variance, which GroupNormalization divides by, can pull the
    output from what the population's variance would give.

    Args:
        statistics: per channel.
        groups: a divisor of the number of channels.
        k: the proportion. 10 kept most on the development networks of `benchmarks/accuracy.py`;
            from there on the samples' own variance hardly matters.
    """
    _, variance = group_moments(statistics, groups)
    return max(LEAST_ADAPTIVE_EPSILON, k * float(variance.mean()))


def dead_channels(statistics: Statistics, epsilon: float) -> NDArray[np.bool_]:
    """Which channels were constant: a = γ/√(v + ε) would only amplify the group's fluctuations.

    Args:
        statistics: per channel.
        epsilon: BatchNormalization's.

    Returns:
        Booleans of shape (C,): v is next to nothing beside the layer's 90th percentile, or v + ε
        isn't positive.
    """
    variance = statistics.variance
    typical = float(np.quantile(variance, TYPICAL_QUANTILE, method="lower"))
    negligible = variance <= DEAD_VARIANCE * typical
    return negligible | (variance + epsilon <= 0)


def match(statistics: Statistics, groups: int, epsilon: float, groupnorm_epsilon: float) -> Affine:
    """γ' and β' with which GroupNormalization computes what BatchNormalization did.

    A dead channel (see `dead_channels`) gets γ' = 0 and β' = β: what BatchNormalization puts
    out for a channel that sits at its mean.

    Args:
        statistics: what BatchNormalization learned, finite, C values each.
        groups: a divisor of C.
        epsilon: BatchNormalization's.
        groupnorm_epsilon: GroupNormalization's.

    Returns:
        γ' and β' of shape (C,).
    """
    channels = statistics.mean.size
    mean, variance = (np.repeat(m, channels // groups) for m in group_moments(statistics, groups))
    dead = dead_channels(statistics, epsilon)
    deviation = np.sqrt(np.where(dead, 1.0, statistics.variance + epsilon))
    slope = np.where(dead, 0.0, statistics.gamma / deviation)
    return Affine(
        gamma=slope * np.sqrt(variance + groupnorm_epsilon),
        beta=statistics.beta + slope * (mean - statistics.mean),
    )


def predicted_error(
    statistics: Statistics, groups: int, epsilon: float, groupnorm_epsilon: float, elements: int
) -> float:
    """What share of its output's variance a matched GroupNormalization is to get wrong.

    If the n elements of a sample's group were independent and normal, the variance of its mean
    would be v̄/n, that of its variance w/n with w = mean of 2v² + 4v·d², where d = μ − m and the
    means are over the group's channels. To the first order that gives, with a = γ/√(v + ε),

        Σ a²·(v̄ + (v + d²)·w/4(V + ε')²)/n / Σ a²·v

    summed over channels. Neighbouring positions aren't independent, so the true error is mostly
    larger; where channels cancel out it is smaller.

    Args:
        statistics: what BatchNormalization learned.
        groups: a divisor of C.
        epsilon, groupnorm_epsilon: the two layers' own.
        elements: n, per sample and group.
    """
    size = statistics.mean.size // groups
    mean, variance = (np.repeat(m, size) for m in group_moments(statistics, groups))
    own, distance = statistics.variance, (statistics.mean - mean) ** 2

    def averaged(values: Float64) -> Float64:
        return np.repeat(values.reshape(groups, -1).mean(axis=1), size)

    live = ~dead_channels(statistics, epsilon)
    slope = np.where(
        live, statistics.gamma**2 / np.where(live, statistics.variance + epsilon, 1), 0
    )
    restless = averaged(2 * own**2 + 4 * own * distance) / (4 * (variance + groupnorm_epsilon) ** 2)
    wrong = slope * (averaged(own) + (own + distance) * restless) / elements
    return float(wrong.sum() / max(float((slope * own).sum()), 1e-30))


def normalize_groups(x: Float64, groups: int, epsilon: float, axis: int) -> Float64:
    """GroupNormalization without γ and β, by definition: (x − m)/√(V + ε) per sample and group.

    Args:
        x: rank 2 or more, the batch first.
        groups: a divisor of the size of `axis`.
        epsilon: added to each variance.
        axis: the channels', counted from 0; not 0.
    """
    first = np.moveaxis(x, axis, 1)
    grouped = first.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=2, keepdims=True)
    normal = (grouped - mean) / np.sqrt(variance + epsilon)
    result: Float64 = np.moveaxis(normal.reshape(first.shape), 1, axis)
    return result
