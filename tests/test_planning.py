"""Patterns, overrides, and refusals as one error."""

import pytest

from layerswap.errors import IndivisibleChannelsError, PolicyError, UnsupportedModelError
from layerswap.planning import make_plan, path_matches, raise_refusals
from layerswap.policy import Policy
from layerswap.records import Obstacle, SwapPlan, from_json
from test_rules import make_site, make_statistics

PATHS = ["stem/bn", "block1/bn", "block1/inner/bn", "head", "block2/bns[0]"]


def plan_for(paths=PATHS, **fields):
    sites = [make_site(path=path) for path in paths]
    return make_plan("m", sites, {path: make_statistics() for path in paths}, Policy(**fields))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["head"]),
        ("*/bn", ["stem/bn", "block1/bn"]),
        ("**", PATHS),
        ("**/bn", ["stem/bn", "block1/bn", "block1/inner/bn"]),
        ("**/head", ["head"]),
        ("block1/**", ["block1/bn", "block1/inner/bn"]),
        ("block?/bn", ["block1/bn"]),
        ("block2/bns[0]", ["block2/bns[0]"]),
        ("block2/bns[*]", ["block2/bns[0]"]),
        ("BLOCK1/bn", []),
        ("bn", []),
        ("stem.bn", []),
    ],
)
def test_globs(pattern, expected):
    assert [path for path in PATHS if path_matches(pattern, path)] == expected


def test_every_site_gets_exactly_one_decision_in_order():
    plan = plan_for(include="block1/**", exclude="**/inner/*")
    assert [d.site.path for d in plan.decisions] == PATHS
    assert [s.site.path for s in plan.swaps] == ["block1/bn"]
    assert len(plan.skips) == 4
    assert plan.ok


def test_the_first_override_that_matches_applies():
    plan = plan_for(overrides={"block1/*": {"groups": 4}, "**": {"groups": 8}})
    assert [s.groups for s in plan.swaps] == [8, 4, 8, 8, 8]


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_with_suggestions(field):
    with pytest.raises(PolicyError, match=r"blok1/bn.*block1/bn"):
        plan_for(**{field: "blok1/bn"})


def test_an_override_that_matches_nothing_is_an_error():
    with pytest.raises(PolicyError, match="overrides: 'nowhere'"):
        plan_for(overrides={"nowhere": {"groups": 4}})


def test_patterns_don_t_matter_without_sites():
    assert plan_for(paths=[], include="anything").decisions == ()


def test_all_indivisible_layers_are_raised_at_once():
    plan = plan_for(groups=5)
    with pytest.raises(IndivisibleChannelsError) as caught:
        raise_refusals(plan)
    for path in PATHS:
        assert path in str(caught.value)
    assert "1, 2, 4, 8, 16, 32" in str(caught.value)
    assert caught.value.plan is plan


def test_other_refusals_among_them_make_it_an_unsupported_model():
    sites = [make_site(), make_site(path="odd", obstacles=(Obstacle("masked", "a mask"),))]
    plan = make_plan("m", sites, {}, Policy(groups=5))
    with pytest.raises(UnsupportedModelError) as caught:
        raise_refusals(plan)
    assert not isinstance(caught.value, IndivisibleChannelsError)
    assert "masked" in str(caught.value)


def test_a_plan_survives_json():
    plan = plan_for(groups=5, overrides={"head": {"groups": 4}}, exclude="stem/*")
    again = from_json(SwapPlan, plan.to_json())
    assert again.to_json() == plan.to_json()
    assert [type(d) for d in again.decisions] == [type(d) for d in plan.decisions]
