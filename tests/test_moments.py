"""The closed-form fit against the naive loops of the oracle and against the function itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from layerswap import moments
from layerswap.records import Statistics


def make_statistics(channels, seed):
    rng = np.random.default_rng(seed)
    return Statistics(
        gamma=rng.normal(1.0, 0.7, channels),
        beta=rng.normal(size=channels),
        mean=rng.normal(0.0, 3.0, channels),
        variance=rng.uniform(0.1, 9.0, channels),
    )


@st.composite
def fits(draw):
    groups = draw(st.integers(1, 6))
    per_group = draw(st.integers(1, 6))
    statistics = make_statistics(groups * per_group, draw(st.integers(0, 10**6)))
    return statistics, groups, draw(st.floats(1e-6, 1.0)), draw(st.floats(1e-6, 20.0))


@given(fits())
def test_match_is_the_formula_written_naively(case):
    statistics, groups, epsilon, gn_epsilon = case
    gamma, beta = oracle.affine_match(
        statistics.gamma,
        statistics.beta,
        statistics.mean,
        statistics.variance,
        epsilon,
        groups,
        gn_epsilon,
    )
    fitted = moments.match(statistics, groups, epsilon, gn_epsilon)
    np.testing.assert_allclose(fitted.gamma, gamma, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fitted.beta, beta, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(fits(), st.integers(0, 10**6))
def test_matched_groupnorm_equals_batchnorm_where_moments_agree(case, seed):
    """A sample whose channels have exactly the population's moments."""
    statistics, groups, epsilon, gn_epsilon = case
    x = np.random.default_rng(seed).normal(size=(2, 64, statistics.mean.size))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    x = x * np.sqrt(statistics.variance) + statistics.mean
    fitted = moments.match(statistics, groups, epsilon, gn_epsilon)
    got = oracle.group_norm(x, groups, fitted.gamma, fitted.beta, gn_epsilon)
    s = statistics
    expected = oracle.batch_norm(x, s.gamma, s.beta, s.mean, s.variance, epsilon)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@given(fits())
def test_group_variance_is_that_of_the_mixture(case):
    statistics, groups, _, _ = case
    mean, variance = moments.group_moments(statistics, groups)
    # Two points per channel, at μ ± √v, have exactly its moments.
    points = np.stack(
        [
            statistics.mean + np.sqrt(statistics.variance),
            statistics.mean - np.sqrt(statistics.variance),
        ]
    ).reshape(2, groups, -1)
    np.testing.assert_allclose(mean, points.mean((0, 2)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variance, points.var((0, 2)), rtol=1e-9, atol=1e-9)


def test_adaptive_epsilon_has_a_floor_and_is_proportional_above_it():
    statistics = make_statistics(32, 1)
    _, variance = moments.group_moments(statistics, 4)
    assert moments.adaptive_epsilon(statistics, 4, 1.0) == pytest.approx(variance.mean())
    assert moments.adaptive_epsilon(statistics, 4, 2.5) == pytest.approx(2.5 * variance.mean())
    tiny = Statistics(np.ones(4), np.zeros(4), np.zeros(4), np.full(4, 1e-9))
    assert moments.adaptive_epsilon(tiny, 2, 1.0) == 1e-3


def test_dead_channels_put_out_beta_and_nothing_else():
    statistics = make_statistics(8, 2)
    statistics.variance[[1, 5]] = [0.0, 1e-12]
    np.testing.assert_array_equal(
        np.flatnonzero(moments.dead_channels(statistics, 1e-3)), np.array([1, 5])
    )
    fitted = moments.match(statistics, 2, 1e-3, 1e-3)
    np.testing.assert_array_equal(fitted.gamma[[1, 5]], 0.0)
    np.testing.assert_array_equal(fitted.beta[[1, 5]], statistics.beta[[1, 5]])
    assert np.isfinite(fitted.gamma).all()
    assert (fitted.gamma[[0, 2, 3, 4, 6, 7]] != 0).all()


def test_a_layer_of_dead_channels_with_epsilon_zero_stays_finite():
    statistics = Statistics(np.ones(4), np.arange(4.0), np.ones(4), np.zeros(4))
    fitted = moments.match(statistics, 2, 0.0, 1e-3)
    np.testing.assert_array_equal(fitted.gamma, 0.0)
    np.testing.assert_array_equal(fitted.beta, np.arange(4.0))


def test_small_but_equal_variances_are_not_dead():
    statistics = Statistics(np.ones(4), np.zeros(4), np.zeros(4), np.full(4, 1e-9))
    assert not moments.dead_channels(statistics, 1e-3).any()
