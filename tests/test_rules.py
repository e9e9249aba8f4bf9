"""One site, one policy, one decision; without TensorFlow."""

import numpy as np
import pytest

from layerswap import rules
from layerswap.policy import Policy
from layerswap.records import Obstacle, Refusal, Site, Skip, Statistics, Swap

CONFIG = {
    "name": "bn",
    "trainable": True,
    "dtype": "float32",
    "axis": [3],
    "momentum": 0.99,
    "epsilon": 0.002,
    "center": True,
    "scale": True,
    "beta_initializer": {"class_name": "Zeros", "config": {}},
    "gamma_initializer": {"class_name": "Ones", "config": {}},
    "beta_regularizer": None,
    "gamma_regularizer": None,
    "beta_constraint": None,
    "gamma_constraint": None,
}


def make_site(channels=32, shape=(None, 4, 4), **changes):
    config = CONFIG | changes.pop("config", {})
    spatial = None if None in shape[1:] else int(np.prod(shape[1:]))
    fields = {
        "path": "block/bn",
        "class_name": "BatchNormalization",
        "config": config,
        "channels": channels,
        "axis": len(shape),
        "rank": len(shape) + 1,
        "spatial": spatial,
        "shape": (*shape, channels),
    }
    return Site(**(fields | changes))


def make_statistics(channels=32):
    rng = np.random.default_rng(channels)
    return Statistics(
        rng.normal(1, 0.5, channels),
        rng.normal(size=channels),
        rng.normal(size=channels),
        rng.uniform(0.5, 2, channels),
    )


def decide(site, **fields):
    return rules.decide(site, Policy(**fields), make_statistics(site.channels or 32))


def test_a_swap_carries_what_batchnorm_had():
    site = make_site(
        config={
            "gamma_regularizer": {"class_name": "L2", "config": {"l2": 0.1}},
            "dtype": "float64",
        }
    )
    swap = decide(site, groups=8, epsilon="carry", weights="copy")
    assert isinstance(swap, Swap)
    assert swap.config["name"] == "bn"
    assert swap.config["dtype"] == "float64"
    assert swap.config["axis"] == 3
    assert swap.config["epsilon"] == 0.002
    assert swap.config["gamma_regularizer"] == site.config["gamma_regularizer"]
    assert "momentum" not in swap.config
    assert (swap.groups, swap.channels_per_group, swap.elements_per_group) == (8, 4, 64)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, 2),
        ({"groups": "auto"}, 2),
        ({"groups": 16}, 16),
        ({"groups": -1}, 32),
        ({"channels_per_group": 8}, 4),
        ({"groups": 12, "on_indivisible": "nearest"}, 8),
        ({"groups": 100, "on_indivisible": "nearest"}, 32),
        ({"channels_per_group": 12, "on_indivisible": "nearest"}, 4),
    ],
)
def test_groups(fields, groups):
    assert decide(make_site(), **fields).groups == groups


@pytest.mark.parametrize("fields", [{"groups": 12}, {"groups": 64}, {"channels_per_group": 12}])
def test_indivisible_channels_are_refused_with_the_legal_groups(fields):
    refusal = decide(make_site(), **fields)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "indivisible-channels"
    assert "32 channels" in refusal.reason
    assert "1, 2, 4, 8, 16, 32" in refusal.reason


def test_indivisible_channels_are_skipped_when_asked():
    assert isinstance(decide(make_site(), groups=12, on_indivisible="skip"), Skip)


@pytest.mark.parametrize(
    ("shape", "fields"),
    [((None,), {"groups": -1}), ((None, 1, 1), {"groups": 32}), ((None, 1), {"groups": -1})],
)
def test_groups_of_one_element_are_refused_unless_allowed(shape, fields):
    site = make_site(shape=shape)
    assert decide(site, **fields).code == "degenerate-groups"
    assert isinstance(decide(site, **fields, allow_degenerate=True), Swap)


def test_dynamic_maps_are_not_called_degenerate():
    swap = decide(make_site(shape=(None, None, None)), groups=-1)
    assert isinstance(swap, Swap)
    assert swap.elements_per_group is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"config": {"renorm": True}}, "renorm"),
        ({"config": {"virtual_batch_size": 4}}, "virtual-batch-size"),
        ({"axis": None, "config": {"axis": [1, 3]}}, "multiple-axes"),
        ({"axis": 0}, "batch-axis"),
        ({"channels": None, "shape": ()}, "unbuilt"),
        ({"obstacles": (Obstacle("masked", "a mask reaches it"),)}, "masked"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, code):
    refusal = rules.decide(make_site(**change), Policy(), None)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code


def test_nonfinite_weights_are_refused_for_a_fit_but_not_for_a_reset():
    statistics = make_statistics()
    statistics.variance[3] = np.nan
    site = make_site()
    assert rules.decide(site, Policy(), statistics).code == "nonfinite-weights"
    assert rules.decide(site, Policy(weights="copy"), statistics).code == "nonfinite-weights"
    assert isinstance(rules.decide(site, Policy(weights="reset"), statistics), Swap)


@pytest.mark.parametrize(
    ("fields", "axis"), [({}, 3), ({"axis": 3}, 3), ({"axis": -1}, 3), ({"axis": "carry"}, 3)]
)
def test_axis_names_batchnorms_own(fields, axis):
    assert decide(make_site(), **fields).config["axis"] == axis


def test_another_axis_only_with_reset():
    assert decide(make_site(), axis=1).code == "other-axis"
    swap = decide(make_site(), axis=1, weights="reset", groups=2)
    assert (swap.config["axis"], swap.channels_per_group) == (1, 2)
    assert decide(make_site(), axis=0, weights="reset").code == "other-axis"
    assert decide(make_site(), axis=7, weights="reset").code == "other-axis"
    dynamic = make_site(shape=(None, None, 4))
    assert decide(dynamic, axis=1, weights="reset").code == "other-axis"


def test_matching_turns_on_what_batchnorm_lacked_and_says_so():
    swap = decide(make_site(config={"scale": False, "center": False}))
    assert swap.config["scale"] is True
    assert swap.config["center"] is True
    assert any(note.code == "affine-turned-on" for note in swap.notes)
    copied = decide(make_site(config={"scale": False}), weights="copy")
    assert copied.config["scale"] is False


def test_center_and_scale_can_be_set_where_nothing_is_matched():
    swap = decide(make_site(), weights="reset", center=False, scale=False)
    assert (swap.config["center"], swap.config["scale"]) == (False, False)


def test_parts_are_carried_replaced_or_removed():
    old = {"class_name": "L1", "config": {"l1": 0.5}}
    site = make_site(config={"beta_regularizer": old, "gamma_regularizer": old})
    swap = decide(site, beta_regularizer=None, gamma_regularizer="l2")
    assert swap.config["beta_regularizer"] is None
    assert swap.config["gamma_regularizer"] == "l2"
    assert decide(site).config["beta_regularizer"] == old


def test_the_change_in_regularization_loss_is_the_difference():
    old = {"class_name": "L2", "config": {"l2": 0.5}}
    site = make_site(config={"gamma_regularizer": old})
    statistics = make_statistics()
    swap = rules.decide(site, Policy(), statistics)
    fitted = rules.fit(swap, statistics)
    before, after = 0.5 * (statistics.gamma**2).sum(), 0.5 * (fitted.gamma**2).sum()
    (note,) = [note for note in swap.notes if note.code == "regularization-change"]
    assert f"{before:.6g} → {after:.6g}" in note.message


@pytest.mark.parametrize("constraint", [{"class_name": "NonNeg", "config": {}}, "non_neg"])
def test_a_constraint_that_the_fit_violates_is_refused_unless_overridden(constraint):
    site = make_site(config={"beta_constraint": constraint})
    refusal = decide(site)
    assert refusal.code == "constraint-violated"
    assert "beta_constraint" in refusal.reason
    assert isinstance(decide(site, beta_constraint=None), Swap)
    assert isinstance(decide(site, weights="reset"), Swap)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"trainable": False}, "frozen"),
        (
            {"config": {"dtype": "mixed_float16"}, "consumers_cast": True},
            "float32-statistics",
        ),
        (
            {
                "config": {"dtype": {"class_name": "Policy", "config": {"name": "mixed_bfloat16"}}},
                "consumers_cast": True,
            },
            "float32-statistics",
        ),
    ],
)
def test_warnings(change, code):
    assert code in {note.code for note in decide(make_site(**change)).notes}


def test_a_reset_in_a_frozen_layer_is_warned_of():
    notes = decide(make_site(trainable=False), weights="reset").notes
    assert {"frozen", "frozen-reset"} <= {note.code for note in notes}


def test_tiny_groups_are_warned_of():
    notes = decide(make_site(shape=(None,)), groups=16).notes
    assert "tiny-groups" in {note.code for note in notes}


def test_dead_channels_are_warned_of():
    statistics = make_statistics()
    statistics.variance[:3] = 0
    statistics.gamma[:] = np.abs(statistics.gamma)
    (note,) = rules.decide(make_site(), Policy(), statistics).notes
    assert note.code == "dead-channels"
    assert note.message.startswith("3 of 32")


def test_negative_gammas_are_counted():
    statistics = make_statistics()
    statistics.gamma[:] = np.abs(statistics.gamma)
    assert not rules.decide(make_site(), Policy(), statistics).notes
    statistics.gamma[:5] *= -1
    (note,) = rules.decide(make_site(), Policy(), statistics).notes
    assert (note.code, note.severity) == ("negative-gamma", "info")
    assert "5 of 32" in note.message


def test_the_predicted_error_is_that_of_independent_elements():
    rng = np.random.default_rng(0)
    statistics = make_statistics()
    swap = rules.decide(make_site(shape=(None, 16)), Policy(groups=4), statistics)
    elements = 16 * 32 // 4
    assert swap.elements_per_group == elements
    # As many samples of independent elements as it takes to see it.
    deviation = np.sqrt(statistics.variance)
    x = rng.normal(statistics.mean, deviation, (4000, 16, 32))
    fitted = rules.fit(swap, statistics)
    grouped = x.reshape(len(x), 16, 4, 8).transpose(0, 2, 1, 3).reshape(len(x), 4, -1)
    epsilon = swap.config["epsilon"]
    mean, spread = grouped.mean(axis=2), np.sqrt(grouped.var(axis=2) + epsilon)
    z = (x - np.repeat(mean, 8, axis=1)[:, None]) / np.repeat(spread, 8, axis=1)[:, None]
    slope = statistics.gamma / np.sqrt(statistics.variance + swap.site.config["epsilon"])
    t = slope * (x - statistics.mean) + statistics.beta
    wrong = ((fitted.gamma * z + fitted.beta - t) ** 2).mean(axis=(0, 1)).sum()
    assert swap.predicted == pytest.approx(wrong / t.var(axis=(0, 1)).sum(), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "epsilon"),
    [({"epsilon": 0.25}, 0.25), ({"epsilon": "carry"}, 0.002), ({"weights": "reset"}, 0.002)],
)
def test_epsilon(fields, epsilon):
    assert decide(make_site(), **fields).config["epsilon"] == epsilon


def test_a_16_bit_layer_stays_one_where_its_consumers_want_that():
    site = make_site(config={"dtype": "mixed_float16"})
    assert decide(site).config["dtype"] == "mixed_float16"
    assert decide(make_site(config={"dtype": "float16"}, consumers_cast=True)).config["dtype"] == (
        "float16"
    )
