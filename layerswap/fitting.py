"""Fits γ and β of a GroupNormalization to what a BatchNormalization puts out. NumPy, float64.

For a sample s, a group g and a channel of it, with x the GroupNormalization's input and t the
BatchNormalization's output,

    z = (x − m_sg)/√(V_sg + ε)
    γ = cov(z, t)/var(z),    β = mean(t) − γ·mean(z)

is the linear regression of t on z. It needs sums over samples and positions alone, which add up:
over batches, over calls of a shared layer, over workers. From the sums of each sample they follow
for any number of groups and any ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from layerswap import moments
from layerswap.records import Affine, Float64, Statistics

# Keeps γ finite where a channel is constant after the normalisation.
LEAST_VARIANCE = 1e-6
# Of a mean square: well above the square of what float32 rounds.
FLOAT32_ROUNDING = 1e-10
# Beside the layer's largest.
SMALL_GAMMA = 1e-2
# Factors of the adaptive epsilon that the fit chooses from. The larger, the less does the
# variance of one sample matter.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True, eq=False)
class SampleSums:
    """Sums over the positions of each sample of a batch, float64.

    Attributes:
        positions: of a sample and channel.
        shift: near the mean of each channel; taken from x, so that squares don't swamp the rest.
        x, xx, t, tt, xt: sums of x, x², t, t², x·t, with x less the shift; of shape (samples, C).
    """

    positions: int
    shift: Float64
    x: Float64
    xx: Float64
    t: Float64
    tt: Float64
    xt: Float64


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over samples and positions, for several epsilons; they add up.

    Attributes:
        samples: how many; a sample counts once for each call.
        n: how many values of a channel.
        v, vv: sums over samples of a group's variance and its square, of shape (groups,).
        t, tt: sums of t and t², of shape (C,).
        z, zz, zt: sums of z, z² and z·t, of shape (epsilons, C).
    """

    samples: Float64
    n: Float64
    v: Float64
    vv: Float64
    t: Float64
    tt: Float64
    z: Float64
    zz: Float64
    zt: Float64

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def target_variance(self) -> Float64:
        """Variance of t per channel: what an error is to be measured by."""
        variance: Float64 = np.maximum(self.tt / self.n - (self.t / self.n) ** 2, 0)
        return variance

    @property
    def spread(self) -> float:
        """Standard deviation of a group's variance over samples by its mean, over all groups."""
        mean = self.v / self.samples
        deviation = np.sqrt(np.maximum(self.vv / self.samples - mean**2, 0))
        return float(np.mean(deviation / np.maximum(mean, 1e-30)))


def normalized_moments(sums: SampleSums, groups: int, epsilons: Sequence[float]) -> Moments:
    """What the fit needs, for a number of groups and each epsilon.

    Args:
        sums: of one batch.
        groups: a divisor of C.
        epsilons: GroupNormalization's, each positive.
    """
    mean, variance = group_moments(sums, groups)
    size = sums.x.shape[1] // groups
    n = sums.positions
    inverse = 1 / np.sqrt(variance[None] + np.asarray(epsilons)[:, None, None])
    inverse = np.repeat(inverse, size, axis=2)
    centre = np.repeat(mean, size, axis=1) - sums.shift  # z = (x − centre)·inverse, for shifted x
    squares = np.maximum(sums.xx - 2 * centre * sums.x + n * centre**2, 0)
    return Moments(
        samples=np.float64(len(sums.x)),
        n=np.float64(n * len(sums.x)),
        v=variance.sum(axis=0),
        vv=(variance**2).sum(axis=0),
        t=sums.t.sum(axis=0),
        tt=sums.tt.sum(axis=0),
        z=(inverse * (sums.x - n * centre)).sum(axis=1),
        zz=(inverse**2 * squares).sum(axis=1),
        zt=(inverse * (sums.xt - centre * sums.t)).sum(axis=1),
    )


def group_moments(sums: SampleSums, groups: int) -> tuple[Float64, Float64]:
    """Mean and variance of each sample's groups, of shape (samples, groups)."""
    samples, channels = sums.x.shape
    shifted = sums.x / sums.positions
    variance = np.maximum(sums.xx / sums.positions - shifted**2, 0)
    means = (shifted + sums.shift).reshape(samples, groups, channels // groups)
    mean = means.mean(axis=2)
    between = ((means - mean[:, :, None]) ** 2).mean(axis=2)
    return mean, variance.reshape(means.shape).mean(axis=2) + between


def regress(known: Moments, index: int) -> Affine:
    """γ and β of the least squared error, for the epsilon of that index."""
    z, t = known.z[index] / known.n, known.t / known.n
    covariance = known.zt[index] / known.n - z * t
    variance = np.maximum(known.zz[index] / known.n - z**2, 0)
    gamma = covariance / (variance + LEAST_VARIANCE)
    return Affine(gamma, t - gamma * z)


def squared_error(known: Moments, index: int, affine: Affine) -> Float64:
    """Mean of (γz + β − t)² per channel, of shape (C,)."""
    gamma, beta = affine.gamma, affine.beta
    total = (
        gamma**2 * known.zz[index]
        + 2 * gamma * (beta * known.z[index] - known.zt[index])
        - 2 * beta * known.t
        + known.tt
    )
    error: Float64 = np.maximum(total / known.n + beta**2, 0)
    return error


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What is kept for a layer.

    Attributes:
        affine, epsilon: of the GroupNormalization.
        calibrated: whether it came from the samples.
        error_match, error: of the data-free fit and of what is kept, on held-out samples, as
            shares of the variance of t.
    """

    affine: Affine
    epsilon: float
    calibrated: bool
    error_match: float
    error: float


def choose(
    fit: Moments,
    held_out: Moments,
    match: Affine,
    epsilons: Sequence[float],
) -> Choice:
    """The fit with the least error on held-out samples.

    Args:
        fit, held_out: of the samples to fit with and to judge by, for these epsilons.
        match: the data-free fit, at the first of them.
        epsilons: to choose from.

    Returns:
        One of the regressions, or the data-free fit where none is better.
    """
    scale = _scale(held_out)
    start = float(squared_error(held_out, 0, match).sum()) / scale
    best = Choice(match, epsilons[0], False, start, start)
    for index, epsilon in enumerate(epsilons):
        affine = regress(fit, index)
        error = float(squared_error(held_out, index, affine).sum()) / scale
        if error < best.error:
            best = Choice(affine, epsilon, True, start, error)
    return best


def _scale(known: Moments) -> float:
    """The variance of t over all channels, or what float32 rounds where there is none."""
    rounding = FLOAT32_ROUNDING * float((known.tt / known.n).sum())
    return max(float(known.target_variance.sum()), rounding, 1e-30)


def least_error(fit: Moments, held_out: Moments) -> float:
    """The held-out error of the best regression over all epsilons, as a share of t's variance."""
    scale = _scale(held_out)
    errors = (
        float(squared_error(held_out, index, regress(fit, index)).sum())
        for index in range(len(fit.z))
    )
    return min(errors) / scale


def source_moments(known: Moments, statistics: Statistics, epsilon: float) -> tuple[float, float]:
    """Whether BatchNormalization's moving statistics fit the samples.

    Args:
        known: of the samples.
        statistics: the layer's.
        epsilon: BatchNormalization's.

    Returns:
        Of x̂ = (x − μ)/√v: the root mean square over channels of its mean, 0 where the moving
        means fit, and the median over channels of its variance, 1 where the variances do.
        Channels with v = 0 or a γ that is next to nothing, where β and rounding drown it, say
        nothing.
    """
    size = np.abs(statistics.gamma)
    live = (size > SMALL_GAMMA * size.max()) & ~moments.dead_channels(statistics, epsilon)
    if not live.any():
        return 0.0, 1.0
    # t = γ(x − μ)/√(v + ε) + β
    slope = statistics.gamma[live] * np.sqrt(
        statistics.variance[live] / (statistics.variance[live] + epsilon)
    )
    mean = ((known.t / known.n)[live] - statistics.beta[live]) / slope
    variance = known.target_variance[live] / slope**2
    return float(np.sqrt(np.mean(mean**2))), float(np.median(variance))
