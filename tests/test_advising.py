"""Advice from made-up measurements: which groups, which layers to keep, which verdict."""

import numpy as np
import pytest

from layerswap import advising
from layerswap.policy import Policy
from layerswap.records import (
    Alternative,
    Calibration,
    Drift,
    LayerFit,
    Refusal,
    Site,
    Skip,
    Statistics,
    Swap,
    SwapPlan,
)


def site(path, channels=32, spatial=16):
    return Site(
        path, "BatchNormalization", {"epsilon": 1e-3}, channels, 2, 3,
        spatial=spatial, shape=(None, spatial, channels),
    )  # fmt: skip


def swap(path, groups=8, **changes):
    return Swap(site(path, **changes), {"groups": groups, "epsilon": 1.0, "axis": 2}, "match")


def plan(*decisions, **fields):
    return SwapPlan("model", Policy(**fields).to_plain(), decisions)


def fit(path, groups, error, others):
    alternatives = tuple(Alternative(*other) for other in others.items())
    return LayerFit(
        path, groups, 1.0, "calibrated", error, error, 0.1, 0.0, 1.0, alternatives=alternatives
    )


def calibration(*fits, error=0.01, agreement=None):
    drift = Drift(error, agreement, 16)
    return Calibration(48, 16, fits, True, error, error, error, drift, drift)


def statistics(channels=32):
    rng = np.random.default_rng(0)
    return Statistics(
        np.ones(channels), np.zeros(channels), rng.normal(size=channels), np.ones(channels)
    )


@pytest.mark.parametrize(
    ("error", "others", "groups", "reason"),
    [
        (0.05, {1: 0.01, 4: 0.03, 16: 0.06}, 8, "as planned"),  # 16 would do, but isn't planned
        (0.3, {1: 0.01, 4: 0.09, 16: 0.6}, 4, "fewer groups keep more"),
        (0.4, {1: 0.2, 4: 0.3, 16: 0.6}, 1, "the least that is wrong"),
        (0.9, {1: 0.6, 4: 0.7, 16: 0.5}, None, "keep it, frozen"),
    ],
)
def test_the_most_groups_that_are_good_enough(error, others, groups, reason):
    made = plan(swap("bn"))
    (advice,) = advising.advise_layers(made, {}, calibration(fit("bn", 8, error, others)))
    assert advice.groups == groups
    assert reason in advice.reason
    assert [choice.groups for choice in advice.alternatives] == sorted([8, *others])


def test_without_samples_the_statistics_predict():
    made = plan(swap("wide", groups=16, spatial=1), swap("open", spatial=None))
    wide, unknown = advising.advise_layers(made, {"wide": statistics(), "open": statistics()}, None)
    errors = [choice.error for choice in wide.alternatives]
    assert errors == sorted(errors)  # fewer groups keep more
    assert wide.groups < 16
    assert (unknown.groups, unknown.error, unknown.alternatives) == (8, None, ())
    assert "aren't fixed" in unknown.reason


def test_what_is_not_swapped_is_kept_with_the_reason():
    made = plan(Skip(site("left"), "excluded by 'left'"), Refusal(site("odd"), "renorm", "renorms"))
    left, odd = advising.advise_layers(made, {}, None)
    assert (left.groups, odd.groups) == (None, None)
    assert "excluded by 'left'" in left.reason
    assert "renorms" in odd.reason
    policy = advising.advised_policy(made, (left, odd))
    assert policy["exclude"] == ["left", "odd"]
    assert advising.judge((left, odd), policy, None).verdict == "keep"


def test_the_policy_changes_only_what_differs_and_goes_before_the_plan_s_own():
    made = plan(swap("a"), swap("b"), overrides={"b": {"epsilon": 0.5}, "*": {"groups": 8}})
    fits = [fit("a", 8, 0.05, {1: 0.01}), fit("b", 8, 0.4, {2: 0.05})]
    layers = advising.advise_layers(made, {}, calibration(*fits))
    policy = advising.advised_policy(made, layers)
    assert list(policy["overrides"]) == ["b", "*"]
    again = Policy(**policy)
    assert (again.overrides["b"].groups, again.overrides["b"].epsilon) == (2, 0.5)


@pytest.mark.parametrize(
    ("error", "agreement", "verdict"),
    [
        (0.04, None, "swap"),
        (0.2, 0.99, "swap"),
        (0.2, 0.9, "distill"),
        (0.2, None, "distill"),
        (0.6, 0.9, "keep"),
    ],
)
def test_the_verdict_follows_from_the_outputs(error, agreement, verdict):
    made = plan(swap("bn"))
    measured = calibration(fit("bn", 8, 0.05, {}), error=error, agreement=agreement)
    layers = advising.advise_layers(made, {}, measured)
    found = advising.judge(layers, advising.advised_policy(made, layers), measured)
    assert (found.verdict, found.measured) == (verdict, True)
    assert f"{error:.3g}" in found.reason


def test_what_a_pattern_set_goes_along_with_what_is_advised():
    made = plan(swap("a/bn"), overrides={"a/*": {"epsilon": 0.5, "channels_per_group": 4}})
    layers = advising.advise_layers(made, {}, calibration(fit("a/bn", 8, 0.4, {2: 0.05})))
    policy = Policy(**advising.advised_policy(made, layers))
    override = policy.overrides["a/bn"]
    assert (override.groups, override.channels_per_group, override.epsilon) == (2, None, 0.5)


def test_a_model_without_batchnorm_is_told_so():
    advice = advising.judge((), {}, None)
    assert (advice.verdict, advice.reason) == ("keep", "there is no BatchNormalization")
