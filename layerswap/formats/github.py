"""Reports as GitHub's workflow commands, which it shows at the file and in the job's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from layerswap.formats.results import relative_path, results, sentence, title
from layerswap.records import Finding, Report, Severity, encodable

# What nobody could decide fails the job, too.
_COMMANDS: Mapping[Severity, str] = {
    "error": "error",
    "undetermined": "error",
    "warning": "warning",
    "info": "notice",
}


def to_github(report: Report) -> str:
    """A line for each finding, and one that counts them.

    No line but these: a name out of a file that begins with `::` would else be a command, too.
    """
    found = results(report)
    counts = Counter(finding.severity for finding in found)
    severities = [f"{counts[severity]} {severity}" for severity in _COMMANDS if counts[severity]]
    files = f" in {len(report.checked)} files" if len(report.checked) > 1 else ""
    summary = f"layerswap {report.command}{files}: {', '.join(severities) or 'nothing found'}"
    return "\n".join([*map(_command, found), summary]) + "\n"


def _command(finding: Finding) -> str:
    properties = {"file": relative_path(finding.file).as_posix(), "title": title(finding.code)}
    listed = ",".join(f"{name}={_in_property(value)}" for name, value in properties.items())
    said = sentence(finding) + (f"\n{finding.hint}" if finding.hint else "")
    return f"::{_COMMANDS[finding.severity]} {listed}::{_in_message(said)}"


def _in_message(text: str) -> str:
    return encodable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _in_property(text: str) -> str:
    return _in_message(text).replace(":", "%3A").replace(",", "%2C")
