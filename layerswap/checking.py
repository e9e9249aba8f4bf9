"""Judges artifacts without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerswap.atomic import StrPath
from layerswap.comparison import compare_parity, measure_drift
from layerswap.config_files import check_config_file
from layerswap.errors import LayerswapError, LoadError, ParityError, UsageError
from layerswap.records import Checked, Finding, Parity, Report, Tolerance
from layerswap.references import Reference, load_reference, reference_path, sha256_of

if TYPE_CHECKING:
    from layerswap.onnx_graph.runtimes import Runtime


def verify(
    path: StrPath,
    reference: StrPath | None = None,
    *,
    runtime: str = "onnxruntime",
    absolute: float | None = None,
    relative: float | None = None,
) -> Parity:
    """Runs an ONNX file on its reference inputs and compares with what Keras answered.

    Args:
        path: the `.onnx` file.
        reference: the reference file; by default the one beside the artifact.
        runtime: `onnxruntime` or `reference` (onnx's own evaluator).
        absolute, relative: tolerances instead of those in the reference; see `Tolerance`.

    Returns:
        The parity; its `ok` says whether it is within tolerance.

    Raises:
        LoadError: the file or its reference can't be read.
        ParityError: the reference was made for another file.
        MissingExtraError: the runtime isn't installed.
        UsageError: there is no such runtime, or a tolerance is negative.
    """
    report = report_parity(path, reference, runtime=runtime, absolute=absolute, relative=relative)
    for finding in report.findings:
        if finding.severity == "error":
            raise ParityError(finding.message, where=finding.where, hint=finding.hint)
    return report.parity[0]


def report_parity(
    path: StrPath,
    reference: StrPath | None = None,
    *,
    runtime: str = "onnxruntime",
    absolute: float | None = None,
    relative: float | None = None,
) -> Report:
    """What `verify` does, as a report that also holds the drift from the BN model.

    A checksum that differs is an error finding in it, not an exception.
    """
    for name, limit in (("absolute", absolute), ("relative", relative)):
        if limit is not None and not limit >= 0:
            raise UsageError(f"the {name} tolerance must be zero or above, not {limit}")
    from layerswap.onnx_graph.runtimes import open_runtime  # onnx, which `check` can do without

    opened = open_runtime(runtime)
    if not Path(path).is_file():
        raise LoadError("there is no such file", where=str(path))
    known = load_reference(reference or reference_path(path))
    findings = []
    if sha256_of(path) != known.sha256:
        findings.append(
            Finding(
                "checksum-mismatch",
                "error",
                str(path),
                "the file isn't the one that the reference was made for (SHA-256 differs)",
                "Export again, or give the reference that belongs to it.",
            )
        )
    tolerance = Tolerance(
        known.tolerance.absolute if absolute is None else absolute,
        known.tolerance.relative if relative is None else relative,
    )
    parity = measure_parity(opened, path, known, tolerance)
    drift = None
    if known.source_outputs is not None:
        drift = measure_drift(known.source_outputs, known.outputs)
    return Report("verify", str(path), parity=(parity,), drift=drift, findings=tuple(findings))


def measure_parity(
    runtime: Runtime, path: StrPath, reference: Reference, tolerance: Tolerance | None = None
) -> Parity:
    """What `verify` does, with the runtime and the reference in hand."""
    return compare_parity(
        runtime.name,
        [runtime.run(path, batch) for batch in reference.inputs],
        reference.outputs,
        tolerance or reference.tolerance,
        reference.batches,
    )


def check_file(path: StrPath) -> Report:
    """Looks for BatchNormalization in a file, without loading the model.

    Args:
        path: a `.keras`, `.h5`, `.hdf5` or `.onnx` file, or a SavedModel folder.

    Returns:
        Every normalization layer, and a finding for each that is a BatchNormalization or that
        the file says too little about.

    Raises:
        LoadError: it can't be read as a model.
    """
    if is_onnx(path):
        from layerswap.onnx_graph.lint import check_onnx_file

        return checked_report(*check_onnx_file(path))
    return checked_report(*check_config_file(path))


def is_onnx(path: StrPath) -> bool:
    """Whether a file is to be taken for an ONNX graph, by its suffix."""
    return Path(path).suffix == ".onnx" and not Path(path).is_dir()


def checked_report(checked: Checked, findings: Iterable[Finding]) -> Report:
    """The report on one file."""
    own = tuple(replace(finding, file=checked.source) for finding in findings)
    return Report("check", checked.source, findings=own, checked=(checked,))


def unreadable_report(path: StrPath, error: LayerswapError) -> Report:
    """The report on a file that can't be read: nobody knows what is in it."""
    source = os.fspath(path)
    finding = Finding(error.code, "undetermined", "", error.message, error.hint)
    return checked_report(Checked(source, 0), [finding])


def merge_reports(reports: Iterable[Report]) -> Report:
    """One report on all files. Its exit code: 1 if any has findings, else 3 if any is open."""
    parts = list(reports)
    return Report(
        "check",
        ", ".join(part.source for part in parts),
        findings=tuple(finding for part in parts for finding in part.findings),
        checked=tuple(checked for part in parts for checked in part.checked),
    )
