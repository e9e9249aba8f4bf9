"""The commands `rule` and `schema`: the page of rules, and what the reports are held to."""

import copy
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from layerswap import catalog, records, rulebook
from layerswap.__main__ import run
from layerswap.json_schema import schema_of
from layerswap.records import (
    Difference,
    Drift,
    Parity,
    Report,
    SwapPlan,
    Tolerance,
    to_json,
)
from schemas import problems

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"


# --- rules ----------------------------------------------------------------------------------


def words(text):
    return " ".join(text.split())


def test_the_page_is_that_of_the_catalog():
    assert PAGE.read_text(encoding="utf-8") == rulebook.to_markdown(), "run `make docs`"


def test_the_page_shows_every_rule_as_it_is():
    """Read as Markdown: nothing of a text became a mark of it, and every link has its heading."""
    shown, links, anchors = [], [], []
    tokens = MarkdownIt().enable("table").parse(rulebook.to_markdown())
    for before, token in itertools.pairwise(tokens):
        if token.type == "inline":
            shown.append(
                "".join(c.content or " " * (c.type == "softbreak") for c in token.children)
            )
            links += [str(c.attrs["href"]) for c in token.children if c.type == "link_open"]
            if before.type == "heading_open":
                anchors.append(re.sub("[^a-z0-9 -]", "", shown[-1].lower()).replace(" ", "-"))
    text = words(" ".join(shown))
    for rule in catalog.RULES:
        for part in (rule.code, rule.name, rule.summary, rule.why, rule.remedy, rule.needs):
            assert words(part) in text
        assert f"#{rule.code.lower()}-{rule.name}" in links
        assert links.count(f"#{rule.code.lower()}-{rule.name}") == 1
        assert set(rule.sources) <= set(links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(anchors)
    assert len(anchors) == 1 + len(rulebook.FAMILIES) + len(catalog.RULES)


def test_every_rule_in_a_table(capsys):
    assert run(["rule"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "code",
        "name",
        "severity",
        "a",
        "file",
        "in",
        "which",
        "only",
        "with",
    ]
    named = [tuple(line.split()[:3]) for line in lines if line.startswith("LS")]
    assert named == [(rule.code, rule.name, rule.severity) for rule in catalog.RULES]


@pytest.mark.parametrize("rule", catalog.RULES, ids=lambda rule: rule.code)
def test_a_rule_in_full(rule, capsys):
    assert run(["rule", rule.name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{rule.code} {rule.name} ({rule.severity}): ")
    for part in (rule.summary, rule.why, rule.remedy, rule.needs, *rule.sources):
        assert words(part) in words(out)
    assert all(len(line) <= 100 or "://" in line for line in out.splitlines())


def test_several_rules_in_the_order_of_the_catalog(capsys):
    assert run(["rule", "ls503", "LS20"]) == 0
    out = capsys.readouterr().out
    assert re.findall("^LS...", out, re.MULTILINE) == ["LS201", "LS202", "LS203", "LS204", "LS503"]


@pytest.mark.parametrize(
    ("text", "near"), [("LS1011", "LS101"), ("batchnorm-let", "batchnorm-left")]
)
def test_an_unknown_rule_is_a_usage_error_and_names_the_nearest(text, near, capsys):
    assert run(["rule", "LS101", text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"did you mean '{near}'?" in err


# --- schemas --------------------------------------------------------------------------------


def strict(schema):
    """The schema without the leave to have more fields than it names."""
    closed = copy.deepcopy(schema)
    for part in (closed, *closed["$defs"].values()):
        assert "additionalProperties" not in part
        part["additionalProperties"] = False
    return closed


def printed(capsys, *arguments):
    code = run([*map(str, arguments), "-q", "--report-format", "json"])
    out, err = capsys.readouterr()
    assert code in (0, 1), err
    return json.loads(out)


@pytest.mark.parametrize(("kind", "record"), [("report", Report), ("plan", SwapPlan)])
def test_the_command_prints_a_schema(kind, record, capsys):
    assert run(["schema", kind]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == schema_of(record)
    assert (schema["title"], schema["$id"]) == (f"layerswap {kind}", f"urn:layerswap:{kind}:1")
    assert problems({}, schema) != []


def test_a_report_s_schema_is_the_default(capsys):
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of(Report)
    assert run(["schema", "nothing"]) == 2


def test_every_field_is_explained():
    schema = schema_of(Report)
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, value in part["properties"].items():
            assert value.get("description") or f"`{name}`" in part["description"], name


COMMANDS = {
    "advise": ["advise", "IN"],
    "convert": ["convert", "IN", "out.keras"],
    "refused": ["convert", "IN", "out.keras", "--groups", "5"],
    "export": ["export", "IN", "out.onnx"],
    "check": ["check", "IN", "absent.keras"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_reports_of_commands_are_valid(command, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [str(digits) if word == "IN" else word for word in COMMANDS[command]]
    report = printed(capsys, *arguments)
    assert report["command"] == arguments[0]
    assert problems(report, strict(schema_of(Report))) == []


def test_a_report_of_verify_is_valid(digits_onnx, capsys):
    assert problems(printed(capsys, "verify", digits_onnx), strict(schema_of(Report))) == []


@pytest.mark.parametrize("options", [[], ["--groups", "5"]])
def test_a_plan_is_valid(options, digits, capsys):
    plan = printed(capsys, "plan", digits, *options)
    assert problems(plan, strict(schema_of(SwapPlan))) == []


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.5])
def test_numbers_that_json_doesn_t_have_are_valid(number):
    parity = Parity("onnxruntime", number, number, Tolerance(number, 0.1), (1,), False)
    report = Report(
        "verify",
        "m.onnx",
        parity=(parity,),
        drift=Drift(number, number, 4),
        differences=(Difference("LS906", "w", "differ", norms={"after": number}),),
    )
    assert problems(json.loads(to_json(report)), strict(schema_of(Report))) == []


def test_the_schema_can_refuse():
    report = json.loads(to_json(Report("verify", "m.onnx", drift=Drift(0.5, None, 4))))
    schema = schema_of(Report)
    assert problems(report, schema) == []
    for field, value in [
        ("relative_error", "Infinite"),
        ("relative_error", None),
        ("samples", 0.5),
    ]:
        broken = {**report, "drift": {**report["drift"], field: value}}
        assert problems(broken, schema) != []
    assert problems({**report, "schema": records.SCHEMA_VERSION + 1}, schema) != []
    assert problems({k: v for k, v in report.items() if k != "findings"}, schema) != []


def test_a_record_without_infinities_has_numbers_alone():
    seconds = schema_of(Report)["properties"]["seconds"]
    assert seconds["additionalProperties"]["type"] == "number"
    assert '"load": null' in to_json(Report("plan", "m.keras", seconds={"load": math.inf}))
