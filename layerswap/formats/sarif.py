"""Reports as SARIF 2.1.0, which code scanning reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import quote

from layerswap import catalog
from layerswap.formats.results import relative_path, results
from layerswap.records import Finding, Report, Severity, encodable

if TYPE_CHECKING:
    from sarif_pydantic import Location, ReportingDescriptor, Result

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# It has no level for what nobody could decide; that fails, too.
_LEVELS: Mapping[Severity, str] = {
    "error": "error",
    "undetermined": "error",
    "warning": "warning",
    "info": "note",
}


def to_sarif(report: Report) -> str:
    """A run of layerswap: every rule there is, and a result for each finding."""
    from sarif_pydantic import Invocation, Run, Sarif, Tool, ToolDriver

    found = results(report)
    rules = [_described(rule) for rule in catalog.RULES]
    own = {finding.code: finding for finding in found if finding.code not in catalog.BY_CODE}
    rules += [_own_rule(finding, report.command) for finding in own.values()]
    release = version("layerswap")
    driver = ToolDriver(name="layerswap", version=release, rules=rules)
    # Findings are no failure of the tool.
    invocation = {"executionSuccessful": True, "exitCode": report.exit_code}
    run = Run(
        tool=Tool(driver=driver),
        invocations=[Invocation.model_validate(invocation)],
        results=_results(found, [rule.id for rule in rules]),
    )
    log = Sarif.model_validate({"$schema": _SCHEMA, "runs": [run]})
    plain = log.model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps(plain, indent=2) + "\n"


def _described(rule: catalog.Rule) -> ReportingDescriptor:
    from sarif_pydantic import Message, ReportingConfiguration, ReportingDescriptor

    sources = "".join(f"\n\n<{source}>" for source in rule.sources)
    return ReportingDescriptor(
        id=rule.code,
        name=rule.name,
        short_description=Message(text=f"{rule.summary[0].upper()}{rule.summary[1:]}."),
        full_description=Message(text=rule.why),
        help=Message(text=rule.remedy, markdown=f"{rule.why}\n\n{rule.remedy}{sources}"),
        default_configuration=ReportingConfiguration(level=_LEVELS[rule.severity]),
        properties={"severity": rule.severity},
    )


def _own_rule(finding: Finding, command: str) -> ReportingDescriptor:
    """For what other commands say: of that there is no more than its code and a finding."""
    from sarif_pydantic import Message, ReportingConfiguration, ReportingDescriptor

    words = finding.code.replace("-", " ").capitalize()
    return ReportingDescriptor(
        id=finding.code,
        name=finding.code,
        short_description=Message(text=words),
        full_description=Message(text=f"{words}: said by layerswap {command}."),
        help=Message(text=encodable(finding.hint) or "See the message."),
        default_configuration=ReportingConfiguration(level=_LEVELS[finding.severity]),
    )


def _results(found: Sequence[Finding], rules: Sequence[str]) -> list[Result]:
    from sarif_pydantic import Message, Result

    seen: Counter[str] = Counter()
    made = []
    for finding in found:
        print_ = _fingerprint(finding)
        seen[print_] += 1
        hint = f"\n{finding.hint}" if finding.hint else ""
        made.append(
            Result(
                rule_id=finding.code,
                rule_index=rules.index(finding.code),
                level=_LEVELS[finding.severity],
                message=Message(text=encodable(finding.message + hint)),
                locations=[_location(finding)],
                # The name under which code scanning looks for it; several alike are counted.
                partial_fingerprints={"primaryLocationLineHash": f"{print_}:{seen[print_]}"},
                properties={"severity": finding.severity},
            )
        )
    return made


def _fingerprint(finding: Finding) -> str:
    """Of code, file and place: the numbers in a message change from one training to the next."""
    parts = (finding.code, _uri(finding.file), finding.where)
    text = "\0".join(parts).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def _location(finding: Finding) -> Location:
    from sarif_pydantic import (
        ArtifactLocation,
        Location,
        LogicalLocation,
        PhysicalLocation,
        Region,
    )

    place = PhysicalLocation(
        artifact_location=ArtifactLocation(uri=_uri(finding.file)),
        # A model has no lines, but code scanning shows nothing that has none.
        region=Region(start_line=1),
    )
    where = encodable(finding.where)
    logical = [LogicalLocation(fully_qualified_name=where)] if where else None
    return Location(physical_location=place, logical_locations=logical)


def _uri(file: str) -> str:
    """Relative to the current folder, as the bytes of the name are, whatever their encoding."""
    path = relative_path(file)
    uri = quote(os.fsencode(path.as_posix()))
    return f"file://{'' if uri.startswith('/') else '/'}{uri}" if path.is_absolute() else uri
