"""Which rules count as applied to a file: those alone that could have found something."""

import json

import pytest

from layerswap import catalog
from layerswap.__main__ import run
from layerswap.criteria import Criteria
from layerswap.policy import Policy

# What to ask for, and the rules that nothing else brings.
ASKED = {
    "policy": ({"policy": Policy(groups=4)}, {"LS202"}),
    "min_opset": ({"min_opset": 13}, {"LS305"}),
    "max_opset": ({"max_opset": 21}, {"LS305"}),
    "onnxruntime": ({"target": "onnxruntime"}, {"LS401"}),
    "openvino": ({"target": "openvino"}, {"LS402"}),
    "opencv": ({"target": "opencv"}, {"LS403"}),
    "tensorrt": ({"target": "tensorrt"}, {"LS404"}),
    "weights": ({"weights": True}, {"LS601", "LS602"}),
    "select": ({"select": ["ALL", "LS711"]}, {"LS711"}),
    "runtime": ({"runtime": "reference"}, {"LS801", "LS803"}),
    "reference": ({"reference": "x.npz"}, {"LS801", "LS803"}),
    "max_drift": ({"max_drift": 0.5}, {"LS802"}),
}


def covered(kind="onnx", **fields):
    criteria = Criteria(**fields)
    return {rule.code for rule in catalog.RULES if criteria.covers(rule, kind)}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_brings_its_rules(name):
    fields, rules = ASKED[name]
    assert covered(**fields) - covered() == rules
    assert not covered() - covered(**fields)


def test_only_what_must_be_asked_for_is_left_out():
    asked = set().union(*(rules for _, rules in ASKED.values()))
    differences = {rule.code for rule in catalog.RULES if rule.code.startswith("LS9")}
    onnx = {rule.code for rule in catalog.RULES if "onnx" in rule.kinds}
    assert covered() == onnx - asked - differences
    keras = {rule.code for rule in catalog.RULES if "keras" in rule.kinds}
    assert covered("keras") == keras - asked - differences - {"LS603"}
    assert covered("keras", weights=True) - covered("keras") == {"LS601", "LS602", "LS603"}


def test_what_is_not_to_be_applied_is_not():
    assert covered(select=["LS1"]) == {"LS001", "LS101", "LS103", "LS104"}
    assert "LS101" not in covered(ignore=["LS1"])
    assert covered(select=["LS801"], ignore=["LS8"], runtime="all") == {"LS001"}


def test_nothing_was_applied_to_a_file_that_can_t_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["check", "absent.onnx", "-q", "--report-format", "json"]) == 3
    (checked,) = json.loads(capsys.readouterr().out)["checked"]
    assert checked["rules"] == ["LS001"]
