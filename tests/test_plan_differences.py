"""`diff` on plans: what is decided otherwise, and by which policy."""

import json

import pytest

import layerswap as ls
from layerswap.__main__ import run
from layerswap.errors import LoadError
from layerswap.records import Refusal, SwapPlan, from_json, to_json


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plans(digits, tmp_path_factory):
    """Plans of the bundled model, written by the command."""
    folder = tmp_path_factory.mktemp("plans")
    options = {
        "default": [],
        "four": ["--groups", "4"],
        "epsilon": ["--epsilon", "0.01"],
        "copied": ["--weights", "copy"],
        "excluded": ["--exclude", "*1*"],
        "refused": ["--groups", "5"],
    }
    for name, extra in options.items():
        file = str(folder / f"{name}.json")
        arguments = ["plan", str(digits), *extra, "--report-format", "json", "--output-file", file]
        assert run(arguments) == (1 if name == "refused" else 0)
    return folder


def read(file):
    return from_json(SwapPlan, file.read_bytes())


def changed(plans, change):
    """A plan in which one thing is other than in the default."""
    fields = json.loads((plans / "default.json").read_text())
    change(fields)
    with open("changed.json", "w") as file:
        json.dump(fields, file)
    return ls.diff(plans / "default.json", "changed.json")


def told(report):
    return [(d.code, d.where, d.message) for d in report.differences]


def test_a_plan_and_itself(plans):
    for file in plans.iterdir():
        assert ls.diff(file, file).differences == ()


def test_another_policy(plans):
    one, other = read(plans / "default.json"), read(plans / "four.json")
    report = ls.diff(plans / "default.json", plans / "four.json")
    policy = [d for d in report.differences if d.code == "LS904"]
    assert [(d.where, d.before, d.after) for d in policy] == [("policy/groups", '"auto"', "4")]
    expected = [
        (a.site.path, str(a.groups), str(b.groups))
        for a, b in zip(one.swaps, other.swaps, strict=True)
        if a.groups != b.groups
    ]
    assert expected
    decided = [d for d in report.differences if d.code == "LS908" and d.message == "groups"]
    assert [(d.where, d.before, d.after) for d in decided] == expected


def test_other_numbers(plans):
    report = ls.diff(plans / "default.json", plans / "epsilon.json")
    other = read(plans / "epsilon.json")
    decided = [d for d in report.differences if d.message == "epsilon"]
    assert [d.where for d in decided] == [swap.site.path for swap in other.swaps]
    assert {d.after for d in decided} == {"0.01"}


def test_other_weights(plans):
    report = ls.diff(plans / "default.json", plans / "copied.json")
    decided = {(d.before, d.after) for d in report.differences if d.message == "weights"}
    assert decided == {("match", "copy")}


@pytest.mark.parametrize("name", ["excluded", "refused"])
def test_what_is_no_longer_swapped(plans, name):
    other = read(plans / f"{name}.json")
    changed = [d for d in other.decisions if d.kind != "swap"]
    assert changed
    report = ls.diff(plans / "default.json", plans / f"{name}.json")
    found = [d for d in report.differences if d.message == "decision"]
    assert [d.where for d in found] == [d.site.path for d in changed]
    for difference, decision in zip(found, changed, strict=True):
        assert decision.reason in difference.after
        assert difference.before.startswith("GroupNormalization, ")
        if isinstance(decision, Refusal):
            assert f"[{decision.code}]" in difference.after


def test_layers_that_only_one_has(plans):
    (path, *_) = [d.site.path for d in read(plans / "default.json").decisions]
    report = changed(plans, lambda plan: plan["decisions"].pop(0))
    assert told(report) == [("LS903", path, "BatchNormalization is removed")]
    back = ls.diff("changed.json", plans / "default.json")
    assert told(back) == [("LS902", path, "BatchNormalization is added")]


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 7), ("calls", 3), ("trainable", False), ("axis", 1)]
)
def test_another_layer_under_the_name(plans, field, value):
    path = read(plans / "default.json").decisions[0].site.path
    report = changed(plans, lambda plan: plan["decisions"][0]["site"].update({field: value}))
    assert told(report) == [("LS904", path, field)]


def test_the_model_s_name_is_no_difference(plans):
    assert told(changed(plans, lambda plan: plan.update(source="elsewhere.keras"))) == []


@pytest.mark.parametrize("value", [None, "x", [1], {}])
@pytest.mark.parametrize("key", ["epsilon", "groups"])
def test_numbers_that_are_none(plans, key, value):
    """Such a plan is no use to `convert`, but it is one."""
    report = changed(plans, lambda plan: plan["decisions"][0]["config"].update({key: value}))
    assert [(d.code, d.message) for d in report.differences] == [("LS908", key)]
    for other in ("refused", "excluded"):
        assert ls.diff("changed.json", plans / f"{other}.json").differences
    assert ls.diff("changed.json", "changed.json").differences == ()


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "{", '{"source": 1}', "nonsense", "[" * 100_000, "\xff"]
)
def test_what_is_no_plan(plans, content):
    with open("bad.json", "wb") as file:
        file.write(content.encode("latin-1"))
    for pair in (("bad.json", plans / "default.json"), (plans / "default.json", "bad.json")):
        with pytest.raises(LoadError, match="no plan"):
            ls.diff(*pair)


def test_a_report_is_no_plan(plans):
    with open("report.json", "w") as file:
        file.write(ls.diff(plans / "default.json", plans / "default.json").to_json())
    with pytest.raises(LoadError, match="layerswap plan"):
        ls.diff("report.json", plans / "default.json")


def test_what_is_read_is_what_was_written(plans):
    plan = read(plans / "default.json")
    with open("again.json", "w") as file:
        file.write(to_json(plan))
    assert ls.diff(plans / "default.json", "again.json").differences == ()
