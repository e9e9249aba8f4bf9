"""The catalog of rules is in order, and says of each what users need."""

import re

import pytest

from layerswap import catalog
from layerswap.errors import UsageError

# Codes and names are stable: one that goes is left here, and none changes its meaning.
GIVEN = {
    "LS001": "unreadable",
    "LS101": "batchnorm-left",
    "LS201": "indivisible-groups",
    "LS501": "unsafe-variance",
    "LS712": "metadata-stale",
    "LS901": "swapped",
}


def test_codes_and_names_are_unique_and_in_order():
    codes = [rule.code for rule in catalog.RULES]
    assert codes == sorted(set(codes))
    assert len({rule.name for rule in catalog.RULES}) == len(codes)
    for code, name in GIVEN.items():
        assert catalog.find(code).name == name


@pytest.mark.parametrize("rule", catalog.RULES, ids=lambda rule: rule.code)
def test_every_rule_says_what_users_need(rule):
    assert re.fullmatch(r"LS\d{3}", rule.code)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", rule.name)
    for text in (rule.why, rule.remedy):
        assert text[0].isupper() or text.startswith("layerswap ")
        assert text.endswith(".")
    assert not rule.summary.endswith(".")
    assert rule.kinds
    assert all(source.startswith("https://") for source in rule.sources)


def test_rules_are_found_by_code_and_name():
    assert catalog.find("LS201") is catalog.find("ls201") is catalog.find("indivisible-groups")
    with pytest.raises(UsageError, match="did you mean 'indivisible-groups'"):
        catalog.find("indivisible-group")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LS1O1", "; did you mean 'LS101'?"),
        ("LS999", "; did you mean 'LS909'?"),
        ("indivisible_groups", "; did you mean 'indivisible-groups'?"),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_what_is_near(text, said):
    assert catalog.suggestion(text) == said
    assert catalog.matching(text) == ()
