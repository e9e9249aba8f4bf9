"""The regression on samples against NumPy on the raw values, and against numpy.linalg.lstsq."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from layerswap import fitting
from layerswap.records import Affine, Statistics

FIELDS = ("samples", "n", "v", "vv", "t", "tt", "z", "zz", "zt")
EPSILONS = (1e-3, 0.2, 7.0)


def sums_of(x, t, shift):
    """What calibration adds up, of arrays of shape (samples, positions, C)."""
    x = x - shift
    terms = (x, x * x, t, t * t, x * t)
    return fitting.SampleSums(x.shape[1], shift, *(term.sum(axis=1) for term in terms))


def moments_of(x, t, shift, groups, epsilons=EPSILONS):
    return fitting.normalized_moments(sums_of(x, t, shift), groups, epsilons)


def normal(x, groups, epsilon):
    return oracle.group_norm(x, groups, None, None, epsilon)


def naive_moments(x, t, groups, epsilons=EPSILONS):
    """The fields of `Moments` from their definitions."""
    z = [normal(x, groups, epsilon) for epsilon in epsilons]
    grouped = np.split(x, groups, axis=2)
    variance = np.array([[g[s].var() for g in grouped] for s in range(len(x))])
    return {
        "samples": len(x),
        "n": x.shape[0] * x.shape[1],
        "v": variance.sum(0),
        "vv": (variance**2).sum(0),
        "t": t.sum((0, 1)),
        "tt": (t**2).sum((0, 1)),
        "z": [each.sum((0, 1)) for each in z],
        "zz": [(each**2).sum((0, 1)) for each in z],
        "zt": [(each * t).sum((0, 1)) for each in z],
    }


def assert_moments(got, expected, rtol=1e-9, atol=1e-9):
    for name in FIELDS:
        value = getattr(got, name)
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=atol, err_msg=name)


def draw(samples, positions, channels, seed, mean=0.7, deviation=2.0):
    """x, and a t that has something to do with it."""
    rng = np.random.default_rng(seed)
    x = mean + deviation * rng.normal(size=(samples, positions, channels))
    x *= rng.uniform(0.5, 2.0, (samples, 1, 1))
    slope, offset = rng.normal(1.0, 0.5, channels), rng.normal(size=channels)
    return x, slope * x + offset + 0.1 * rng.normal(size=x.shape)


@st.composite
def data(draw_from):
    groups, size = draw_from(st.integers(1, 4)), draw_from(st.integers(1, 4))
    samples, positions = draw_from(st.integers(1, 5)), draw_from(st.integers(1, 6))
    x, t = draw(samples, positions, groups * size, draw_from(st.integers(0, 10**6)))
    shift = draw_from(st.sampled_from([0.0, 1.0, -5.0])) * np.arange(1.0, groups * size + 1)
    return x, t, shift, groups


@settings(deadline=None)
@given(data())
def test_moments_from_sums_are_those_of_the_raw_values(case):
    x, t, shift, groups = case
    assert_moments(moments_of(x, t, shift, groups), naive_moments(x, t, groups))


@settings(deadline=None)
@given(data())
def test_group_moments_are_those_of_each_samples_raw_values(case):
    x, t, shift, groups = case
    mean, variance = fitting.group_moments(sums_of(x, t, shift), groups)
    blocks = x.reshape(*x.shape[:2], groups, -1)
    np.testing.assert_allclose(mean, blocks.mean(axis=(1, 3)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variance, blocks.var(axis=(1, 3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [1e3, 0.0, 990.0])
def test_a_mean_of_a_thousand_deviations_costs_no_accuracy(shift):
    """With the shift at the mean, as a converged layer has it, and without any."""
    x, t = draw(6, 50, 8, 3, mean=0.0, deviation=1.0)
    x += 1e3
    expected = naive_moments(x, t, 2)
    tolerance = 1e-11 if shift == 1e3 else 1e-8
    got = moments_of(x, t, np.full(8, shift), 2)
    assert_moments(got, expected, rtol=tolerance, atol=1e-6 * tolerance + 1e-7)
    truth = regression(normal(x, 2, EPSILONS[1]), t, fitting.LEAST_VARIANCE)
    np.testing.assert_allclose(fitting.regress(got, 1).gamma, truth.gamma, rtol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 11), max_size=4))
def test_moments_add_up_wherever_the_batches_are_split(seed, cuts):
    x, t = draw(12, 3, 6, seed)
    shift = np.arange(6.0)
    borders = [0, *sorted(set(cuts)), 12]
    parts = [moments_of(x[a:b], t[a:b], shift, 3) for a, b in pairwise(borders)]
    whole = moments_of(x, t, shift, 3)
    expected = {name: getattr(whole, name) for name in FIELDS}
    assert_moments(reduce(add, parts), expected, rtol=1e-10, atol=1e-10)


def test_calls_on_other_shapes_add_up_to_one_regression_over_all_values():
    (x1, t1), (x2, t2) = draw(4, 9, 6, 1), draw(4, 2, 6, 2, mean=-3.0)
    shift = np.zeros(6)
    pooled = moments_of(x1, t1, shift, 2) + moments_of(x2, t2, shift, 2)
    assert (pooled.samples, pooled.n) == (8, 4 * 9 + 4 * 2)
    z = np.concatenate([normal(x, 2, EPSILONS[0]).reshape(-1, 6) for x in (x1, x2)])
    t = np.concatenate([each.reshape(-1, 6) for each in (t1, t2)])
    truth = regression(z[None], t[None])
    got = fitting.regress(pooled, 0)
    np.testing.assert_allclose(got.gamma, truth.gamma, rtol=1e-5)
    np.testing.assert_allclose(got.beta, truth.beta, rtol=1e-5, atol=1e-5)


def regression(z, t, ridge=0.0):
    """Least squares per channel on raw values; with a ridge as a row more."""
    channels = z.shape[-1]
    gamma, beta = np.empty(channels), np.empty(channels)
    for c in range(channels):
        a, b = z[..., c].reshape(-1), t[..., c].reshape(-1)
        centre = a.mean()
        rows = np.stack([a - centre, np.ones_like(a)], axis=1)
        penalty = [np.sqrt(ridge * a.size), 0.0]
        solution, *_ = np.linalg.lstsq(np.vstack([rows, penalty]), np.append(b, 0.0), rcond=None)
        gamma[c], beta[c] = solution[0], solution[1] - solution[0] * centre
    return Affine(gamma, beta)


@settings(deadline=None, max_examples=50)
@given(data(), st.integers(0, len(EPSILONS) - 1))
def test_regress_is_least_squares_on_the_raw_values(case, index):
    x, t, shift, groups = case
    z = normal(x, groups, EPSILONS[index])
    truth = regression(z, t, fitting.LEAST_VARIANCE)
    got = fitting.regress(moments_of(x, t, shift, groups), index)
    np.testing.assert_allclose(got.gamma, truth.gamma, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.beta, truth.beta, rtol=1e-6, atol=1e-6)


def test_the_ridge_is_next_to_nothing_on_ordinary_channels():
    x, t = draw(16, 20, 8, 5)
    got = fitting.regress(moments_of(x, t, np.zeros(8), 2), 0)
    truth = regression(normal(x, 2, EPSILONS[0]), t)
    np.testing.assert_allclose(got.gamma, truth.gamma, rtol=1e-5)
    np.testing.assert_allclose(got.beta, truth.beta, rtol=1e-5, atol=1e-5)


def test_a_channel_that_is_constant_after_the_normalisation_gets_the_mean_and_no_gamma():
    """One value per group: z is 0 whatever x is."""
    x, t = draw(10, 1, 4, 6)
    got = fitting.regress(moments_of(x, t, np.zeros(4), 4), 0)
    np.testing.assert_allclose(got.gamma, 0.0, atol=1e-6)
    np.testing.assert_allclose(got.beta, t.mean((0, 1)), rtol=1e-9)


@settings(deadline=None)
@given(data(), st.integers(0, 10**6), st.integers(0, len(EPSILONS) - 1))
def test_squared_error_is_the_mean_over_raw_values(case, seed, index):
    x, t, shift, groups = case
    rng = np.random.default_rng(seed)
    affine = Affine(rng.normal(size=x.shape[2]), rng.normal(size=x.shape[2]))
    y = oracle.group_norm(x, groups, affine.gamma, affine.beta, EPSILONS[index])
    got = fitting.squared_error(moments_of(x, t, shift, groups), index, affine)
    np.testing.assert_allclose(got, ((y - t) ** 2).mean((0, 1)), rtol=1e-7, atol=1e-8)


def test_target_variance_and_spread_are_those_of_the_raw_values():
    x, t = draw(9, 7, 8, 8)
    known = moments_of(x, t, np.ones(8), 2)
    np.testing.assert_allclose(known.target_variance, t.var((0, 1)), rtol=1e-9)
    variance = np.array([[x[s, :, :4].var(), x[s, :, 4:].var()] for s in range(9)])
    spread = (variance.std(0) / variance.mean(0)).mean()
    assert known.spread == pytest.approx(spread, rel=1e-9)


def test_spread_is_zero_where_all_samples_are_alike_and_finite_where_all_are_constant():
    x, t = draw(1, 7, 4, 9)
    alike = moments_of(np.repeat(x, 5, 0), np.repeat(t, 5, 0), np.zeros(4), 2)
    assert alike.spread == pytest.approx(0.0, abs=1e-6)
    constant = moments_of(np.ones((5, 7, 4)), np.ones((5, 7, 4)), np.zeros(4), 2)
    assert constant.spread == 0.0


def share(x, t, groups, affine, epsilon):
    """Σ(GN − BN)² by the variance of BN, over raw values."""
    y = oracle.group_norm(x, groups, affine.gamma, affine.beta, epsilon)
    return ((y - t) ** 2).mean((0, 1)).sum() / t.var((0, 1)).sum()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 8))
def test_choose_is_never_worse_on_held_out_samples_than_the_data_free_fit(seed, groups, samples):
    channels = groups * 2
    x, t = draw(samples, 4, channels, seed)
    # What is held out may be of another kind altogether.
    u, s = draw(3, 4, channels, seed + 1, mean=seed % 3, deviation=1.0 + seed % 2)
    rng = np.random.default_rng(seed)
    match = Affine(rng.normal(1.0, 1.0, channels), rng.normal(size=channels))
    shift = np.zeros(channels)
    choice = fitting.choose(
        moments_of(x, t, shift, groups), moments_of(u, s, shift, groups), match, EPSILONS
    )
    free = share(u, s, groups, match, EPSILONS[0])
    kept = share(u, s, groups, choice.affine, choice.epsilon)
    assert choice.error_match == pytest.approx(free, rel=1e-6)
    assert choice.error == pytest.approx(kept, rel=1e-6, abs=1e-9)
    assert kept <= free * (1 + 1e-9)
    if not choice.calibrated:
        assert choice.affine is match
        assert choice.epsilon == EPSILONS[0]
    # And no candidate is better.
    for index, epsilon in enumerate(EPSILONS):
        candidate = fitting.regress(moments_of(x, t, shift, groups), index)
        assert kept <= share(u, s, groups, candidate, epsilon) * (1 + 1e-6) + 1e-9


def test_choose_keeps_the_data_free_fit_where_the_samples_to_fit_with_mislead():
    x, _ = draw(12, 10, 6, 11)
    match = Affine(np.full(6, 2.0), np.full(6, -1.0))
    right = oracle.group_norm(x, 2, match.gamma, match.beta, EPSILONS[0])
    right += 0.01 * np.random.default_rng(0).normal(size=x.shape)
    shift = np.zeros(6)
    wrong = moments_of(x[:8], -right[:8], shift, 2)
    choice = fitting.choose(wrong, moments_of(x[8:], right[8:], shift, 2), match, EPSILONS)
    assert not choice.calibrated
    assert choice.affine is match
    assert choice.epsilon == EPSILONS[0]
    assert choice.error == choice.error_match


def test_choose_finds_the_epsilon_that_the_target_was_made_with():
    x, _ = draw(24, 6, 6, 12)
    gamma, beta = np.linspace(1, 2, 6), np.linspace(-1, 1, 6)
    t = oracle.group_norm(x, 2, gamma, beta, 7.0)
    shift = np.zeros(6)
    fit, held_out = moments_of(x[:18], t[:18], shift, 2), moments_of(x[18:], t[18:], shift, 2)
    choice = fitting.choose(fit, held_out, Affine(np.ones(6), np.zeros(6)), EPSILONS)
    assert choice.calibrated
    assert choice.epsilon == 7.0
    assert choice.error < 1e-9 < choice.error_match
    np.testing.assert_allclose(choice.affine.gamma, gamma, rtol=1e-4)
    np.testing.assert_allclose(choice.affine.beta, beta, rtol=1e-4, atol=1e-4)


def test_choose_stays_finite_where_the_target_is_constant():
    x, _ = draw(8, 5, 4, 13)
    t = np.full(x.shape, 3.0)
    known = moments_of(x, t, np.zeros(4), 2)
    choice = fitting.choose(known, known, Affine(np.zeros(4), np.full(4, 3.0)), EPSILONS)
    assert np.isfinite([choice.error, choice.error_match]).all()
    np.testing.assert_allclose(choice.affine.beta, 3.0)


def test_least_error_is_that_of_the_best_regression_on_held_out_samples():
    x, t = draw(12, 6, 6, 14)
    u, s = draw(5, 6, 6, 15)
    fit, held_out = moments_of(x, t, np.ones(6), 3), moments_of(u, s, np.ones(6), 3)
    shares = [share(u, s, 3, fitting.regress(fit, i), e) for i, e in enumerate(EPSILONS)]
    assert fitting.least_error(fit, held_out) == pytest.approx(min(shares), rel=1e-6)


BN_EPSILON = 0.01


def learned(channels=8, seed=0):
    rng = np.random.default_rng(seed)
    return Statistics(
        gamma=rng.normal(1.0, 0.3, channels),
        beta=rng.normal(size=channels),
        mean=rng.normal(0.0, 3.0, channels),
        variance=rng.uniform(0.5, 4.0, channels),
    )


def seen(statistics, by=0.0, times=1.0, samples=200, seed=1):
    """Moments of samples whose x̂ has the mean `by` and the variance `times`."""
    s = statistics
    rng = np.random.default_rng(seed)
    normal_x = rng.normal(size=(samples, 20, s.mean.size))
    normal_x = (normal_x - normal_x.mean((0, 1))) / normal_x.std((0, 1))
    x = (normal_x * np.sqrt(times) + by) * np.sqrt(s.variance) + s.mean
    t = oracle.batch_norm(x, s.gamma, s.beta, s.mean, s.variance, BN_EPSILON)
    return moments_of(x, t, s.mean, 2, (1.0,))


@pytest.mark.parametrize(("by", "times"), [(0.0, 1.0), (0.8, 1.0), (-2.0, 1.0), (0.0, 9.0), (1, 4)])
def test_source_moments_say_how_far_the_statistics_are_off(by, times):
    statistics = learned()
    mean, variance = fitting.source_moments(seen(statistics, by, times), statistics, BN_EPSILON)
    assert mean == pytest.approx(abs(by), rel=1e-6, abs=1e-6)
    assert variance == pytest.approx(times, rel=1e-6)


def test_channels_with_no_gamma_or_no_variance_say_nothing_about_the_statistics():
    statistics = learned()
    for index, value in ((2, 0.0), (5, 1e-14)):
        statistics.variance[index] = value
    statistics.gamma[4] = 0.0
    known = seen(statistics)
    known.t[[2, 4, 5]] += 1e4  # whatever they put out
    mean, variance = fitting.source_moments(known, statistics, BN_EPSILON)
    assert mean == pytest.approx(0.0, abs=1e-6)
    assert variance == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("field", ["gamma", "variance"])
def test_a_layer_without_a_live_channel_counts_as_converged(field):
    statistics = learned()
    getattr(statistics, field)[:] = 0.0
    known = seen(learned(), by=3.0)
    assert fitting.source_moments(known, statistics, BN_EPSILON) == (0.0, 1.0)
