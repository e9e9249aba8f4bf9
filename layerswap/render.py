"""Records → text for people; what is for machines is made elsewhere."""

from __future__ import annotations

import io
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from layerswap import catalog
from layerswap.difference_text import render_differences
from layerswap.formats.results import describe_parity
from layerswap.records import (
    Advice,
    Artifact,
    Calibration,
    Checked,
    Decision,
    Finding,
    LayerRecord,
    Refusal,
    Report,
    Swap,
    SwapPlan,
)

if TYPE_CHECKING:
    from rich.table import Table

# The rules by which a BatchNormalization is certain.
_BATCHNORM = frozenset({"LS101", "LS102"})
# Wide enough for the plan's columns where there is no terminal to fit into.
FILE_WIDTH = 160


def render(report: Report, report_format: str, width: int | None = None) -> str:
    """The report in one of `FORMATS`, with a newline at the end.

    Args:
        report: what a command found and did. The `plan` command's JSON is the plan itself.
        report_format: its name.
        width: of the terminal, in columns; None where there is none.
    """
    match report_format:
        case "json":
            only_plan = report.command == "plan" and report.plan is not None
            return f"{report.plan.to_json() if only_plan and report.plan else report.to_json()}\n"
        case "junit":
            from layerswap.formats.junit import to_junit

            return to_junit(report, _text(report, None))
        case "sarif":
            from layerswap.formats.sarif import to_sarif

            return to_sarif(report)
        case "github":
            from layerswap.formats.github import to_github

            return to_github(report)
    return _text(report, width)


def _text(report: Report, width: int | None) -> str:
    if report.command == "diff":
        return f"{render_differences(report)}\n"
    parts = []
    if report.plan is not None:
        if report.command == "plan" or report.plan.refusals:
            parts.append(_plan_table(report.plan, width))
        parts.append(_plan_summary(report.plan))
    for checked in report.checked:
        own = [finding for finding in report.findings if finding.file == checked.source]
        parts += _checked(checked, own, width, alone=len(report.checked) == 1)
    if not report.checked:
        # A plan's remarks are many, and in its JSON; those of later stages are few.
        planned = report.plan.notes if report.plan else ()
        parts += _findings([f for f in report.findings if f in planned and f.severity != "info"])
        parts += _findings([f for f in report.findings if f not in planned], by_message=True)
    if report.transfer is not None:
        log = report.transfer
        parts.append(
            f"variables: {len(log.copied)} copied, {len(log.fitted)} fitted, {len(log.fresh)} fresh"
        )
    if report.calibration is not None:
        parts += _calibration(report.calibration)
    if report.advice is not None:
        parts.append(_advice(report.advice, width))
    if report.artifact is not None:
        artifact = report.artifact
        opset = f", opset {artifact.opset}" if artifact.opset else ""
        parts.append(f"wrote {artifact.path} ({artifact.format}{opset}, {_size(artifact.bytes)})")
        if artifact.reference:
            parts.append(f"reference {artifact.reference}")
        elif artifact.format in ("onnx", "savedmodel"):
            parts.append(_no_reference(artifact))
    parts += [describe_parity(parity) for parity in report.parity]
    if report.drift is not None:
        parts.append(
            f"drift from the BN model on random noise: relative error "
            f"{report.drift.relative_error:.3g} (on your data it is another; measure it there)"
        )
    if report.seconds:
        spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.seconds.items())
        parts.append(f"time: {spent}")
    return "\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _advice(advice: Advice, width: int | None) -> str:
    rows = []
    for layer in advice.layers:
        errors = ", ".join(f"{choice.groups}: {choice.error:.2g}" for choice in layer.alternatives)
        groups = "keep BN" if layer.groups is None else str(layer.groups)
        channels = "?" if layer.channels is None else str(layer.channels)
        rows.append((layer.path, channels, groups, errors, layer.reason))
    kind = "measured" if advice.measured else "predicted"
    head = ("layer", "channels", "groups", f"{kind} error by groups", "why")
    verdicts = {
        "swap": "swap it",
        "distill": "swap it and distill",
        "keep": "keep its BatchNormalization, frozen",
    }
    lines = [_table(head, rows, width), f"advice: {verdicts[advice.verdict]}; {advice.reason}"]
    options = [f"--exclude {shlex.quote(path)}" for path in advice.policy["exclude"]]
    options += [
        f"--overrides {shlex.quote(path)} {shlex.quote(json.dumps(fields))}"
        for path, fields in advice.policy["overrides"].items()
    ]
    if advice.verdict == "distill":
        options.append("--samples ... --distill 200")
    if options:
        lines += ["options that do this:", *(f"  {option}" for option in options)]
    return "\n".join(lines)


def _calibration(calibration: Calibration) -> list[str]:
    fitted = sum(layer.fit == "calibrated" for layer in calibration.layers)
    lines = [
        f"calibrated {fitted} of {len(calibration.layers)} layers on {calibration.samples} "
        f"samples; on {calibration.held_out} others the outputs' error is "
        f"{calibration.error_match:.3g} without, {calibration.error_calibrated:.3g} with it "
        "(share of BN's variance)"
    ]
    if calibration.distilled is not None:
        lines.append(f"distilled: {calibration.error:.3g} after {calibration.distilled} steps")
    agreements = [
        drift.argmax_agreement
        for drift in (calibration.drift_match, calibration.drift)
        if drift is not None and drift.argmax_agreement is not None
    ]
    if len(agreements) == 2:
        before, after = agreements
        lines.append(f"same arg-max as BN on these: {before:.1%} without samples, {after:.1%} now")
    return lines


def _no_reference(artifact: Artifact) -> str:
    """Why there is none, as far as that is known."""
    reason = "text and bfloat16 can't be kept in one"
    if artifact.parity is None:
        reason = (
            "the model takes or gives text or bfloat16, or it fails or answers NaN on random inputs"
        )
    return f"no reference, so `verify` has nothing to compare with: {reason}"


def rule_table(rules: Iterable[catalog.Rule], width: int | None) -> str:
    """A line for each rule, with a newline at the end."""
    rows = [(rule.code, rule.name, rule.severity, rule.summary, rule.needs) for rule in rules]
    return _table(("code", "name", "severity", "a file in which", "only with"), rows, width) + "\n"


def _plan_table(plan: SwapPlan, width: int | None) -> str:
    from rich.text import Text

    if not plan.decisions:
        return ""
    table = _empty_table()
    table.add_column("layer", overflow="fold", no_wrap=False)
    table.add_column("class", overflow="fold")
    for name in ("channels", "groups", "per group", "elements", "epsilon"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=1)
    for decision in plan.decisions:
        # Text, not str: brackets in a path are not markup.
        table.add_row(*(Text(cell) for cell in _row(decision)))
    return _printed(table, width)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> str:
    from rich.text import Text

    table = _empty_table()
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return _printed(table, width)


def _empty_table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold")


def _printed(table: Table, width: int | None) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width or FILE_WIDTH, no_color=True, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _row(decision: Decision) -> Sequence[str]:
    site = decision.site
    channels = "?" if site.channels is None else str(site.channels)
    start = (site.path, site.class_name, channels)
    if isinstance(decision, Swap):
        elements = decision.elements_per_group
        return (
            *start,
            str(decision.groups),
            str(decision.channels_per_group),
            "dynamic" if elements is None else str(elements),
            f"{decision.config['epsilon']:.4g}",
            "swap",
            "; ".join(note.message for note in decision.notes),
        )
    code = f" [{decision.code}]" if isinstance(decision, Refusal) else ""
    return (*start, "", "", "", "", decision.kind, decision.reason + code)


def _plan_summary(plan: SwapPlan) -> str:
    if not plan.decisions:
        return f"{plan.source}: no BatchNormalization; there is nothing to swap"
    counts = f"{len(plan.swaps)} to swap, {len(plan.skips)} skipped, {len(plan.refusals)} refused"
    return f"{plan.source}: {len(plan.decisions)} BatchNormalization layers: {counts}"


def _checked(
    checked: Checked, findings: Sequence[Finding], width: int | None, *, alone: bool
) -> list[str]:
    """The normalization layers of a file, a line per finding, each hint once, and the verdict.

    Of several files the layers are left out.
    """
    lines = []
    if alone and checked.layers:
        head = ("layer", "class", "groups", "channels", "inside")
        lines.append(_table(head, [_layer_row(layer) for layer in checked.layers], width))
    for finding in findings:
        where = f" {finding.where}:" if finding.where else ""
        name = catalog.find(finding.code).name
        lines.append(
            f"{checked.source}:{where} {finding.severity} {finding.code} [{name}] {finding.message}"
        )
    lines += [f"hint: {hint}" for hint in dict.fromkeys(f.hint for f in findings if f.hint)]
    left = sum(finding.code in _BATCHNORM for finding in findings)
    counts = Counter(finding.severity for finding in findings)
    verdicts = [
        f"{count} {severity}{'s' if count > 1 and severity in ('error', 'warning') else ''}"
        for severity, count in counts.items()
    ]
    if left:
        verdicts.insert(0, f"{left} BatchNormalization left")
    elif counts["undetermined"]:
        verdicts.insert(0, "undetermined whether a BatchNormalization is left")
    elif _BATCHNORM & set(checked.rules):
        verdicts.insert(0, "no BatchNormalization is left")
        if alone and any(layer.class_name == "BatchNormalization" for layer in checked.layers):
            lines.append(
                "No BatchNormalization operator listed has statistics of batches: with mean 0, "
                "variance 1 and epsilon 0 it is an affine, with the means of its own rows a "
                "LayerNormalization."
            )
    looked = f"{checked.examined} layers looked at, {len(checked.layers)} of them normalize"
    return [*lines, f"{checked.source}: {', '.join(verdicts) or 'no findings'}; {looked}"]


def _layer_row(layer: LayerRecord) -> Sequence[str]:
    sizes = ("" if size is None else str(size) for size in (layer.groups, layer.channels))
    return (layer.path, layer.class_name, *sizes, " › ".join(layer.parents))


def _findings(findings: Sequence[Finding], by_message: bool = False) -> list[str]:
    """One line per code: a model of 200 layers would otherwise say the same 200 times.

    With `by_message` one per code and message.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.code, finding.message if by_message else "")
        groups.setdefault(key, []).append(finding)
    lines = []
    for (code, _), group in groups.items():
        first = group[0]
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        hint = f" {first.hint}" if first.hint else ""
        where = f" {first.where}{more}" if first.where else ""
        lines.append(f"{first.severity} [{code}]{where}: {first.message}.{hint}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
