"""What a report comes to, as one list of findings: the other formats know nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from layerswap import catalog
from layerswap.records import Difference, Finding, Parity, Report, encodable


def results(report: Report) -> list[Finding]:
    """The findings and, as findings, whatever else makes the exit code; each with its file.

    A refusal and a parity beyond tolerance are errors; a difference that no finding speaks of is
    an `info`.
    """
    found = list(report.findings)
    if report.plan is not None:
        found += [
            Finding(refusal.code, "error", refusal.site.path, refusal.reason, refusal.hint)
            for refusal in report.plan.refusals
        ]
    known = {(finding.code, finding.where) for finding in found}
    others = (*_failed_parities(report), *map(_as_finding, report.differences))
    found += [finding for finding in others if (finding.code, finding.where) not in known]
    return [replace(finding, file=finding.file or report.source) for finding in found]


def _failed_parities(report: Report) -> Iterator[Finding]:
    rule = catalog.find("parity")
    for parity in report.parity:
        if not parity.ok:
            yield rule.finding(parity.runtime, describe_parity(parity))


def _as_finding(difference: Difference) -> Finding:
    values = (difference.before, difference.after)
    change = "" if values == (None, None) else ": {} → {}".format(*(v or "nothing" for v in values))
    return Finding(difference.code, "info", difference.where, difference.message + change)


def describe_parity(parity: Parity) -> str:
    """One line: the runtime, the largest differences and what was tolerated."""
    limit = parity.tolerance
    verdict = "reproduces the Keras model" if parity.ok else "DIFFERS from the Keras model"
    batches = " and ".join(str(size) for size in parity.batches)
    return (
        f"{parity.runtime} {verdict} at batch size {batches}: largest difference "
        f"{parity.max_absolute:.3g}, relative {parity.max_relative:.3g} "
        f"(tolerance {limit.absolute:g} + {limit.relative:g} of the output's largest value)"
    )


def title(code: str) -> str:
    """A finding's code, with the rule's name where it is one of the catalog."""
    rule = catalog.BY_CODE.get(code)
    return f"{code} {rule.name}" if rule else code


def sentence(finding: Finding) -> str:
    """Where, and what."""
    return f"{finding.where}: {finding.message}" if finding.where else finding.message


def explained(file: str, findings: Iterable[Finding]) -> str:
    """What is wrong with a file, for the message of a test: a line each, and each hint once."""
    lines: list[str] = []
    hints: dict[str, None] = {}
    for code, alike in groupby(findings, lambda finding: finding.code):
        lines.append(f"{file}: {title(code)}")
        for finding in alike:
            lines.append(f"  {finding.severity}: {sentence(finding)}")
            hints[finding.hint] = None
    return encodable("\n".join([*lines, *(f"  hint: {hint}" for hint in hints if hint)]))


def relative_path(file: str) -> Path:
    """The file seen from the current folder; its full path where it lies elsewhere.

    Whoever shows a finding beside a file looks for it in the checkout, by its relative path.
    """
    path = Path(os.path.abspath(file))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
