"""What continuous integration reads: valid by its own rules, and the same as the report."""

import dataclasses
import json
import os
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from junitparser import JUnitXml

from layerswap import catalog
from layerswap.__main__ import run
from layerswap.formats import FORMATS
from layerswap.formats.results import results
from layerswap.records import (
    Checked,
    Difference,
    Finding,
    Parity,
    Refusal,
    Report,
    Site,
    SwapPlan,
    Tolerance,
    from_json,
)
from layerswap.render import render
from schemas import SARIF, problems


def said(code, severity, where="block/norm", file="m.onnx", message="is so", hint="Do this."):
    return Finding(code, severity, where, message, hint, file)


FINDINGS = (
    said("LS101", "error"),
    said("LS101", "error", "other"),
    said("LS103", "undetermined"),
    said("LS204", "warning"),
    said("LS502", "info"),
    said("LS001", "undetermined", "", "b,c: 50%\n.keras"),
)
REPORT = Report(
    "check",
    "m.onnx, clean.onnx, b",
    findings=FINDINGS,
    checked=(
        Checked("m.onnx", 4, rules=("LS001", "LS101", "LS103", "LS104", "LS204", "LS502")),
        Checked("clean.onnx", 1, rules=("LS001", "LS101")),
        Checked("b,c: 50%\n.keras", 0, rules=("LS001",)),
    ),
)
SITE = Site("stem/bn", "BatchNormalization", {}, 30, 3, 4)
REFUSED = Report(
    "convert",
    "m.keras",
    plan=SwapPlan("m.keras", {}, (Refusal(SITE, "indivisible-channels", "30 by 4", "Take 5."),)),
    findings=(Finding("frozen", "warning", "stem/bn", "is frozen"),),
    seconds={"load": 1.5, "plan": 0.25},
)
PARITY = Parity("onnxruntime", 2.0, 1.0, Tolerance(1e-5, 1e-4), (1, 3), False, "logits")
APART = Report("verify", "m.onnx", parity=(PARITY, dataclasses.replace(PARITY, ok=True)))
CHANGED = Difference("LS906", "dense/kernel", "weights differ", "norm 1", None)
DIFFERENT = Report("diff", "a.onnx", differences=(CHANGED,))
REPORTS = [REPORT, REFUSED, APART, DIFFERENT, Report("verify", "m.onnx")]
# Everything that a name or a message can hold: controls, no characters at all, marks of each form.
NASTY = "a\x00\x1b\x85\u2028\udcff\ufffe\r\n::error::x]]>&amp;<b>\"'%0A,:γ😀"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def nasty(report):
    """The report with such text wherever there is text from a file."""
    findings = tuple(
        Finding(f.code, f.severity, NASTY, NASTY, NASTY, NASTY) for f in report.findings
    )
    checked = tuple(dataclasses.replace(c, source=NASTY) for c in report.checked[:1])
    return dataclasses.replace(report, source=NASTY, findings=findings, checked=checked)


# --- what a report comes to -----------------------------------------------------------------


@pytest.mark.parametrize("report", REPORTS, ids=lambda r: r.command)
def test_the_results_explain_the_exit_code(report):
    severities = {finding.severity for finding in results(report)}
    expected = 1 if "error" in severities else 3 if "undetermined" in severities else 0
    assert report.exit_code == expected


def test_what_is_no_finding_becomes_one():
    refusal = Finding("indivisible-channels", "error", "stem/bn", "30 by 4", "Take 5.", "m.keras")
    assert results(REFUSED)[1:] == [refusal]
    (parity,) = results(APART)
    assert (parity.code, parity.severity, parity.where) == ("LS801", "error", "onnxruntime")
    assert "largest difference 2," in parity.message
    (difference,) = results(DIFFERENT)
    assert (difference.code, difference.severity) == ("LS906", "info")
    assert difference.message == "weights differ: norm 1 → nothing"


def test_nothing_is_said_twice():
    finding = catalog.find("parity").finding("onnxruntime", "differs")
    report = dataclasses.replace(APART, command="check", findings=(finding,))
    assert [f.message for f in results(report)] == ["differs"]


# --- JUnit ----------------------------------------------------------------------------------


def junit(report):
    text = render(report, "junit")
    assert text.isascii()
    return JUnitXml.fromstring(text.encode())


def outcome(case):
    return [type(result).__name__ for result in case.result]


def test_a_rule_is_a_case():
    document = junit(REPORT)
    suites = {suite.name: list(suite) for suite in document}
    assert list(suites) == ["m.onnx", "clean.onnx", "b,c: 50% .keras"]
    names = [f"{code} {catalog.BY_CODE[code].name}" for code in REPORT.checked[0].rules]
    assert [case.name for case in suites["m.onnx"]] == names
    assert {case.classname for case in suites["clean.onnx"]} == {"clean.onnx"}
    assert [outcome(case) for case in suites["clean.onnx"]] == [[], []]
    cases = {case.name[:5]: case for case in suites["m.onnx"]}
    failed = {code: outcome(case) for code, case in cases.items() if outcome(case)}
    assert failed == {"LS101": ["Failure"], "LS103": ["Error"]}
    (failure,) = cases["LS101"].result
    assert (failure.type, failure.message) == ("LS101", "block/norm: is so (and 1 more)")
    assert failure.text == "error: block/norm: is so\nerror: other: is so\nDo this."
    assert cases["LS204"].system_out == "warning: block/norm: is so\nDo this."
    assert cases["LS502"].system_out == "info: block/norm: is so\nDo this."
    assert cases["LS104"].system_out is None
    (unreadable,) = suites["b,c: 50% .keras"]
    assert outcome(unreadable) == ["Error"]


@pytest.mark.parametrize("report", [*REPORTS, *map(nasty, REPORTS)])
def test_the_xml_has_the_schema_s_shape_and_right_counts(report):
    root = ET.fromstring(render(report, "junit").encode())
    assert root.tag == "testsuites"
    for counted in (root, *root):
        cases = list(counted.iter("testcase"))
        assert int(counted.get("tests")) == len(cases) > 0
        assert int(counted.get("failures")) == len(list(counted.iter("failure")))
        assert int(counted.get("errors")) == len(list(counted.iter("error")))
        assert int(counted.get("skipped")) == 0
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite.get("name")
        named = [(case.get("classname"), case.get("name")) for case in suite]
        assert len(set(named)) == len(named)
        for case in suite:
            assert case.tag == "testcase"
            assert [child.tag for child in case] in (
                [],
                ["failure"],
                ["error"],
                ["system-out"],
                ["failure", "system-out"],
            )
    fails = any(True for tag in ("failure", "error") for _ in root.iter(tag))
    assert fails == (report.exit_code != 0)


def test_a_command_is_a_case_with_its_output():
    command, *others = next(iter(junit(REFUSED)))
    assert (command.name, command.classname, command.time) == ("convert", "m.keras", 1.75)
    assert outcome(command) == []
    assert "1 refused" in command.system_out
    assert [case.name for case in others] == ["frozen", "indivisible-channels"]
    assert [outcome(case) for case in others] == [[], ["Failure"]]


def test_what_xml_can_t_hold_is_escaped():
    document = junit(nasty(REPORT))
    case = next(case for case in next(iter(document)) if outcome(case) == ["Failure"])
    assert case.result[0].message.startswith(r"a\x00\x1b")
    assert r"\udcff\ufffe" in case.result[0].message
    assert "]]>&amp;<b>\"'%0A,:γ😀" in case.result[0].text


# --- SARIF ----------------------------------------------------------------------------------


def sarif(report):
    log = json.loads(render(report, "sarif"))
    assert problems(log, SARIF) == []
    (run_,) = log["runs"]
    return run_


def test_the_schema_can_refuse():
    log = json.loads(render(REPORT, "sarif"))
    log["runs"][0]["results"][0]["level"] = "bad"
    assert any("level" in line for line in problems(log, SARIF))


@pytest.mark.parametrize("report", [*REPORTS, *map(nasty, REPORTS)])
def test_it_is_valid_and_every_result_has_its_rule(report):
    made = sarif(report)
    rules = made["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in made["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert made["invocations"] == [{"executionSuccessful": True, "exitCode": report.exit_code}]
    prints = [r["partialFingerprints"]["primaryLocationLineHash"] for r in made["results"]]
    assert len(set(prints)) == len(prints)


def test_the_results_are_the_findings():
    levels = {"error": "error", "undetermined": "error", "warning": "warning", "info": "note"}
    made = sarif(REPORT)["results"]
    assert [r["ruleId"] for r in made] == [f.code for f in FINDINGS]
    assert [r["level"] for r in made] == [levels[f.severity] for f in FINDINGS]
    assert [r["properties"]["severity"] for r in made] == [f.severity for f in FINDINGS]
    assert {r["message"]["text"] for r in made} == {"is so\nDo this."}
    (place,) = made[1]["locations"]
    assert place["logicalLocations"] == [{"fullyQualifiedName": "other"}]
    assert "logicalLocations" not in made[-1]["locations"][0]


def test_every_rule_of_the_catalog_is_described():
    rules = sarif(REPORT)["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.code for rule in catalog.RULES]
    for rule, described in zip(catalog.RULES, rules, strict=True):
        assert described["name"] == rule.name
        assert rule.summary[1:] in described["shortDescription"]["text"]
        assert described["fullDescription"]["text"] == rule.why
        assert described["help"]["text"] == rule.remedy
        assert all(source in described["help"]["markdown"] for source in rule.sources)
        level = described["defaultConfiguration"].get("level", "warning")
        assert (level == "error") == (rule.severity in ("error", "undetermined"))


def test_a_code_outside_the_catalog_gets_a_rule_of_its_own():
    driver = sarif(REFUSED)["tool"]["driver"]
    own = driver["rules"][len(catalog.RULES) :]
    assert [rule["id"] for rule in own] == ["frozen", "indivisible-channels"]
    assert own[1]["help"]["text"] == "Take 5."


ODD_NAMES = ["a b.onnx", "a:b.onnx", "50%25.onnx", "γ#?.onnx", os.fsdecode(b"caf\xe9.onnx")]


@pytest.mark.parametrize("name", [*ODD_NAMES, "sub/m.onnx", "./m.onnx", "../m.onnx"])
def test_the_address_leads_to_the_file(name, tmp_path):
    finding = said("LS101", "error", file=name)
    (result,) = sarif(Report("check", name, findings=(finding,)))["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert urlsplit(uri).scheme == ("file" if ".." in name else "")
    base = f"file://{tmp_path.as_posix()}/"
    found = unquote_to_bytes(urlsplit(urljoin(base, uri)).path)
    assert found == os.fsencode(os.path.normpath(tmp_path / name))


def test_a_full_path_inside_the_folder_is_made_relative(tmp_path):
    """As pre-commit and CI give it; code scanning compares it with the repository's paths."""
    finding = said("LS101", "error", file=str(tmp_path / "sub" / "m.onnx"))
    report = Report("check", finding.file, findings=(finding,))
    place = sarif(report)["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "sub/m.onnx"
    assert commands(render(report, "github"))[0][1]["file"] == "sub/m.onnx"


def fingerprint(**fields):
    finding = said(**{"code": "LS101", "severity": "error", **fields})
    (result,) = sarif(Report("check", "m", findings=(finding,)))["results"]
    return result["partialFingerprints"]


def test_a_fingerprint_is_that_of_the_place_and_not_of_the_numbers():
    assert fingerprint() == fingerprint(message="error 0.1", hint="", severity="warning")
    others = [fingerprint(code="LS102"), fingerprint(where="x"), fingerprint(file="x.onnx")]
    assert all(other != fingerprint() for other in others)


# --- GitHub ---------------------------------------------------------------------------------


def commands(text):
    """The commands in a log, read as the runner documents it: name, properties, message."""
    found = []
    for line in text.split("\n"):
        if match := re.fullmatch(r"::(\w+) ?([^:]*)::(.*)", line, re.DOTALL):
            pairs = (pair.split("=", 1) for pair in match[2].split(",") if pair)
            properties = {name: unescape(value, property_=True) for name, value in pairs}
            found.append((match[1], properties, unescape(match[3])))
    return found


def unescape(text, property_=False):
    codes = {"%0D": "\r", "%0A": "\n"} | ({"%3A": ":", "%2C": ","} if property_ else {})
    for code, character in codes.items():
        text = text.replace(code, character)
    return text.replace("%25", "%")


def test_a_finding_is_a_command():
    found = commands(render(REPORT, "github"))
    assert [name for name, _, _ in found] == [
        *("error", "error", "error", "warning", "notice"),
        "error",
    ]
    assert found[0][1] == {"file": "m.onnx", "title": "LS101 batchnorm-left"}
    assert found[0][2] == "block/norm: is so\nDo this."
    assert found[-1][1]["file"] == "b,c: 50%\n.keras"
    assert found[-1][2] == "is so\nDo this."


def test_the_last_line_counts():
    def last(report):
        return render(report, "github").splitlines()[-1]

    assert last(REPORT) == (
        "layerswap check in 3 files: 2 error, 2 undetermined, 1 warning, 1 info"
    )
    assert last(Report("verify", "m.onnx")) == "layerswap verify: nothing found"


@pytest.mark.parametrize("report", [*REPORTS, *map(nasty, REPORTS)])
def test_no_line_but_the_findings_and_the_count(report):
    lines = render(report, "github").removesuffix("\n").split("\n")
    assert "\r" not in "".join(lines)
    assert len(lines) == len(results(report)) + 1 == len(commands("\n".join(lines))) + 1


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters()))
def test_any_text_comes_back(name, where):
    report = Report("verify", "m", findings=(Finding("code", "error", where, name),))
    ((_, properties, message),) = commands(render(report, "github"))
    assert properties == {"file": "m", "title": "code"}
    place = where.encode("utf-8", "backslashreplace").decode()
    assert message == (f"{place}: {name}" if where else name)


# --- all of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("report_format", FORMATS)
def test_every_command_takes_every_format(report_format, digits_onnx, capsys):
    assert run(["verify", str(digits_onnx), "-q", "--report-format", report_format]) == 0
    assert run(["check", str(digits_onnx), "-q", "--report-format", report_format]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("report_format", FORMATS)
def test_a_file_s_name_needs_not_be_text(report_format, tmp_path, digits_onnx):
    name = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    try:
        name.write_bytes(digits_onnx.read_bytes())
    except OSError:
        pytest.skip("this file system takes text only")
    options = ["--report-format", report_format, "--output-file", f"out.{report_format}"]
    assert run(["check", name.name, "-q", *options]) == 0
    text = (tmp_path / f"out.{report_format}").read_text("utf-8")
    assert text.encode("utf-8")


def test_json_stands_for_such_a_name_by_text():
    report = Report("check", "caf\udce9", checked=(Checked("caf\udce9", 1),), seconds={"\udce9": 1})
    read = from_json(Report, report.to_json())
    assert (read.source, read.checked[0].source) == ("caf\\udce9", "caf\\udce9")
    assert read.seconds == {"\\udce9": 1}
    assert from_json(Report, REPORT.to_json()) == REPORT


def test_a_refused_conversion_is_reported(digits, tmp_path, capsys):
    options = ["--groups", "5", "-q", "--report-format"]
    assert run(["convert", str(digits), "out.onnx", *options, "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    assert problems(log, SARIF) == []
    assert {r["level"] for r in log["runs"][0]["results"]} == {"error"}
    assert run(["convert", str(digits), "out.onnx", *options, "junit"]) == 1
    document = JUnitXml.fromstring(capsys.readouterr().out.encode())
    assert document.failures > 0
