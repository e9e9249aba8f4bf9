"""Which rules apply, how severe, and what is said of fields that make no sense."""

import pytest

from layerswap import catalog
from layerswap.criteria import Criteria
from layerswap.errors import UsageError
from layerswap.policy import Policy

ALL = {rule.code for rule in catalog.RULES}


def applied(**fields):
    criteria = Criteria(**fields)
    return {code for code in ALL if criteria.applies(code)}


def test_all_rules_apply_but_those_to_ask_for():
    assert applied() == ALL - {"LS711"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"select": "LS201"}, {"LS201"}),
        ({"select": "ls201"}, {"LS201"}),
        ({"select": "indivisible-groups"}, {"LS201"}),
        ({"select": ["LS201", "LS101"]}, {"LS201", "LS101"}),
        ({"select": "LS201, LS101"}, {"LS201", "LS101"}),
        ({"select": "LS2"}, {"LS201", "LS202", "LS203", "LS204"}),
        ({"select": "LS2", "ignore": "LS204,LS203"}, {"LS201", "LS202"}),
        ({"select": "LS711"}, {"LS711"}),
        ({"select": "LS71"}, {"LS711", "LS712", "LS713"}),
        ({"select": "ALL"}, ALL - {"LS711"}),
        ({"select": "ALL,LS711"}, ALL),
        ({"ignore": "ALL"}, set()),
    ],
)
def test_selection(fields, expected):
    assert applied(**fields) == expected | {"LS001"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"select": "LS999"}, "select holds 'LS999', which is not a rule; did you mean 'LS909'"),
        ({"ignore": "batchnorm-lift"}, "did you mean 'batchnorm-left'"),
        ({"ignore": "LS001"}, "can't be ignored"),
        ({"ignore": "unreadable"}, "can't be ignored"),
        ({"severity": {"LS2": "fatal"}}, "'error', 'undetermined', 'warning' or 'info'"),
        ({"severity": {"LS777": "error"}}, "'LS777', which is not a rule"),
        ({"target": "onnxruntme"}, "'onnxruntime'"),
        ({"runtime": "tensorrt"}, "must be one of"),
        ({"dynamic": "some"}, "'none', 'batch' or 'any'"),
        ({"min_opset": 18, "max_opset": 13}, "no file is both"),
        ({"min_opset": 0}, "greater than or equal to 1"),
        ({"max_drift": -1}, "greater than or equal to 0"),
        ({"max_drift": float("nan")}, "finite"),
        ({"weights": "yes"}, "weights"),
        ({"sellect": "LS2"}, "did you mean 'select'"),
        ({"select": 3}, "must be text or a list of texts"),
        ({"overrides": {"a/*": {"ignor": "LS2"}}}, "unknown field 'overrides.a/*.ignor'"),
    ],
)
def test_what_makes_no_sense(fields, said):
    with pytest.raises(UsageError) as caught:
        Criteria(**fields)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_severities_and_which_wins():
    criteria = Criteria(severity={"LS2": "warning", "LS201": "info", "ALL": "error"})
    assert criteria.severity_of("LS201") == "error"
    criteria = Criteria(severity={"ALL": "error", "LS2": "warning", "indivisible-groups": "info"})
    assert [criteria.severity_of(code) for code in ("LS101", "LS202", "LS201")] == [
        *("error", "warning", "info")
    ]
    assert Criteria().severity_of("LS101") is None


def test_a_file_that_can_t_be_read_fails_however_severe():
    for said in ({"ALL": "info"}, {"LS0": "warning"}, {"LS001": "error", "ALL": "info"}):
        assert Criteria(severity=said).severity_of("LS001") in (None, "error")
    for word in ("LS001", "unreadable"):
        with pytest.raises(UsageError, match=f"{word} can't be info"):
            Criteria(severity={word: "info"})


def test_the_first_override_that_matches_applies():
    criteria = Criteria(
        ignore="LS701",
        overrides={"old/**": {"ignore": "LS2"}, "**/*.onnx": {"weights": True}},
    )
    old, new, other = map(criteria.for_file, ("old/a.onnx", "new/a.onnx", "new/a.keras"))
    assert (old.ignore, old.weights) == (("LS2",), False)
    assert (new.ignore, new.weights) == (("LS701",), True)
    assert (other.ignore, other.weights) == (("LS701",), False)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, None),
        (Policy(groups=8), 8),
        (Policy(groups=-1), 64),
        (Policy(groups="auto"), 4),
        (Policy(channels_per_group=8), 8),
        (Policy(groups=24, on_indivisible="nearest"), 16),
        (Policy(channels_per_group=24, on_indivisible="nearest"), 4),
        (Policy(groups=8, exclude=["block/*"]), None),
        (Policy(groups=8, include=["head/*"]), None),
        (Policy(groups=8, overrides={"block/*": {"groups": 2}}), 2),
        (Policy(groups=8, overrides={"block/*": {"channels_per_group": 4}}), 16),
    ],
)
def test_the_groups_of_a_policy(policy, expected):
    assert Criteria(policy=policy).groups_for("block/norm", 64) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(groups=8), 8),
        (Policy(groups=-1), None),
        (Policy(groups="auto"), None),
        (Policy(channels_per_group=8), None),
        (Policy(groups=8, on_indivisible="nearest"), None),
    ],
)
def test_the_groups_of_a_layer_whose_channels_aren_t_known(policy, expected):
    assert Criteria(policy=policy).groups_for("norm", None) == expected
