"""Reports as JUnit's XML: a rule that was applied to a file is a test case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from xml.dom import minidom

from layerswap.formats.results import results, sentence, title
from layerswap.records import Finding, Report

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

# XML has no way to write these, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report, text: str) -> str:
    """A suite for each file that was checked; for other commands one, with a case of its own.

    Args:
        report: what a command found and did.
        text: the same for people; the output of the case that stands for the command.
    """
    from junitparser import JUnitXml

    found = results(report)
    document = JUnitXml(_line(f"layerswap {report.command}"))
    for checked in report.checked:
        own = [finding for finding in found if finding.file == checked.source]
        document.add_testsuite(_suite(checked.source, _cases(checked.source, checked.rules, own)))
    if not report.checked:
        cases = [_command_case(report, text, found), *_cases(report.source, (), found)]
        document.add_testsuite(_suite(report.source, cases))
    document.update_statistics()
    pretty = minidom.parseString(document.tostring()).toprettyxml(indent="  ", encoding="utf-8")
    # Whatever the encoding of where it goes: as it is written here it is the same in all.
    return pretty.decode().encode("ascii", "xmlcharrefreplace").decode()


def _suite(name: str, cases: Iterable[TestCase]) -> TestSuite:
    from junitparser import TestSuite

    suite = TestSuite(_line(name))
    for case in cases:
        suite.add_testcase(case)
    return suite


def _cases(file: str, rules: Sequence[str], found: Sequence[Finding]) -> list[TestCase]:
    codes = dict.fromkeys((*rules, *(finding.code for finding in found)))
    return [_case(file, code, [f for f in found if f.code == code]) for code in codes]


def _case(file: str, code: str, found: Sequence[Finding]) -> TestCase:
    from junitparser import Error, Failure, TestCase

    case = TestCase(_line(title(code)), _line(file))
    lines = [f"{finding.severity}: {sentence(finding)}" for finding in found]
    text = "\n".join([*lines, *dict.fromkeys(f.hint for f in found if f.hint)])
    for severity, kind in (("error", Failure), ("undetermined", Error)):
        grave = [finding for finding in found if finding.severity == severity]
        if grave:
            # One for all places: the schema has no more, and most readers show only the first.
            more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
            result = kind(_line(sentence(grave[0]) + more), code)
            result.text = _clean(text)
            case.append(result)
            break
    else:
        if text:
            case.system_out = _clean(text)
    return case


def _command_case(report: Report, text: str, found: Sequence[Finding]) -> TestCase:
    """Passes, unless the command failed for a reason that no finding gives."""
    from junitparser import Failure, TestCase

    case = TestCase(_line(report.command), _line(report.source), sum(report.seconds.values()))
    if not report.ok and all(f.severity in ("warning", "info") for f in found):
        case.append(Failure(f"exit code {report.exit_code}", "exit-code"))
    case.system_out = _clean(text)
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _line(text: str) -> str:
    """As an attribute: in there a line break would be read back as a space."""
    return _clean(" ".join(text.split()))
