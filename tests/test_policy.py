"""The policy: what is valid, what is refused and how that is said."""

import pytest
import tf_keras

from layerswap.errors import PolicyError
from layerswap.policy import Policy


@pytest.mark.parametrize("groups", [0, -5, -2, 3.5, 3.0, "abc", "8", True, None, [2], float("nan")])
def test_groups_are_strict(groups):
    with pytest.raises(PolicyError, match="groups must be a positive integer"):
        Policy(groups=groups)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels_per_group": 0}, "channels_per_group"),
        ({"channels_per_group": 2.0}, "channels_per_group"),
        ({"groups": 4, "channels_per_group": 4}, "exclude each other"),
        ({"epsilon": 0}, "epsilon must be a positive number"),
        ({"epsilon": -1.0}, "epsilon must be a positive number"),
        ({"epsilon": "small"}, "epsilon must be a positive number"),
        ({"epsilon": True}, "epsilon must be a positive number"),
        ({"adaptive_k": 0}, "adaptive_k"),
        ({"center": "yes"}, "center must be true, false or 'carry'"),
        ({"axis": 1.0}, "axis must be an integer or 'carry'"),
        ({"weights": "magic"}, "weights"),
        ({"on_indivisible": "round"}, "on_indivisible"),
        ({"gamma_regularizer": 3}, "gamma_regularizer must be a Keras name"),
        ({"center": False}, "weights='match' needs both center and scale"),
        ({"gorups": 8}, "unknown field 'gorups'; did you mean 'groups'"),
        ({"overrides": {"a/*": {"groups": 0}}}, "overrides.a/[*].groups must be a positive"),
        ({"overrides": {"a/*": {"include": ["x"]}}}, "unknown field 'overrides.a/[*].include'"),
        ({"overrides": {"a": {"groups": 1, "channels_per_group": 1}}}, "exclude each other"),
    ],
)
def test_bad_fields_are_refused_with_their_name(fields, message):
    with pytest.raises(PolicyError, match=message) as caught:
        Policy(**fields)
    assert caught.value.exit_code == 2


def test_all_mistakes_are_said_at_once():
    with pytest.raises(PolicyError) as caught:
        Policy(groups=0, epsilon=-1, weights="magic")
    for name in ("groups", "epsilon", "weights"):
        assert name in str(caught.value)


def test_a_policy_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Policy().groups = 8


def test_keras_objects_become_plain_data():
    policy = Policy(
        gamma_regularizer=tf_keras.regularizers.L2(0.5), beta_constraint=None, include="a/*"
    )
    assert policy.gamma_regularizer["class_name"] == "L2"
    assert policy.gamma_regularizer["config"] == {"l2": 0.5}
    assert policy.beta_constraint == "none"
    assert policy.include == ("a/*",)
    assert Policy(**policy.to_plain()) == policy


def test_epsilon_follows_the_weights_unless_given():
    assert Policy().epsilon_rule == "adaptive"
    assert Policy(weights="copy").epsilon_rule == "carry"
    assert Policy(weights="reset").epsilon_rule == "carry"
    assert Policy(epsilon=0.5).epsilon_rule == 0.5
    assert Policy(weights="reset", epsilon="adaptive").epsilon_rule == "adaptive"


def test_an_override_replaces_what_it_sets():
    policy = Policy(
        groups=8, epsilon=0.1, overrides={"x": {"channels_per_group": 4, "gamma_constraint": None}}
    )
    applied = policy.applied(policy.overrides["x"])
    assert (applied.channels_per_group, applied.epsilon) == (4, 0.1)
    assert applied.gamma_constraint == "none"
    assert policy.applied(None) is policy


def test_an_override_may_not_contradict_the_policy():
    policy = Policy(center=False, weights="copy", overrides={"x": {"weights": "match"}})
    with pytest.raises(PolicyError, match="needs both center and scale"):
        policy.applied(policy.overrides["x"])
