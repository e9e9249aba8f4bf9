"""Runs an artifact on its reference inputs and compares with what Keras answered."""

from __future__ import annotations

from pathlib import Path

from layerswap.atomic import StrPath
from layerswap.comparison import compare_parity, furthest, measure_drift
from layerswap.errors import ExportError, LoadError, MissingExtraError, ParityError, UsageError
from layerswap.records import Finding, Parity, Report, Tolerance
from layerswap.references import Reference, fingerprint, load_reference, reference_path
from layerswap.runtimes import ALL, FILE_RUNTIMES, FOLDER_RUNTIMES, RUNTIMES, Runtime


def verify(
    path: StrPath,
    reference: StrPath | None = None,
    *,
    runtime: str | None = None,
    absolute: float | None = None,
    relative: float | None = None,
) -> Parity:
    """Runs an artifact on its reference inputs and compares with what Keras answered.

    Args:
        path: an `.onnx` file or a SavedModel folder.
        reference: the reference file; by default the one beside the artifact.
        runtime: for a file "onnxruntime" (the default), "openvino", "opencv" or "reference"
            (onnx's own evaluator), for a folder "savedmodel" (TensorFlow), for either "all":
            every one that is installed.
        absolute, relative: tolerances instead of those in the reference; see `Tolerance`.

    Returns:
        The parity, of several runtimes the one furthest from fine; its `ok` says whether it is
        within tolerance.

    Raises:
        LoadError: the artifact or its reference can't be read.
        ExportError: the runtime fails on the artifact.
        ParityError: the reference was made for another artifact, or one of several runtimes
            can't run it.
        MissingExtraError: the runtime isn't installed.
        UsageError: there is no such runtime, it doesn't run such an artifact, or a tolerance is
            negative.
    """
    report = report_parity(path, reference, runtime=runtime, absolute=absolute, relative=relative)
    for finding in report.findings:
        if finding.severity == "error":
            raise ParityError(finding.message, where=finding.where, hint=finding.hint)
    return furthest(report.parity)


def report_parity(
    path: StrPath,
    reference: StrPath | None = None,
    *,
    runtime: str | None = None,
    absolute: float | None = None,
    relative: float | None = None,
) -> Report:
    """What `verify` does, as a report: a parity per runtime, and the drift from the BN model.

    A checksum that differs is an error finding in it, not an exception. So is, of `all`
    runtimes, one that fails; one that isn't installed is an `info`.
    """
    for name, limit in (("absolute", absolute), ("relative", relative)):
        if limit is not None and not limit >= 0:
            raise UsageError(f"the {name} tolerance must be zero or above, not {limit}")
    if not (Path(path).is_file() or Path(path).is_dir()):
        raise LoadError("there is no such file or folder", where=str(path))
    runtimes, findings = _open_all(path) if runtime == ALL else ([open_runtime(path, runtime)], [])
    known = load_reference(reference or reference_path(path))
    if fingerprint(path) != known.sha256:
        kind = "folder" if Path(path).is_dir() else "file"
        findings.append(
            Finding(
                "checksum-mismatch",
                "error",
                str(path),
                f"the {kind} isn't the one that the reference was made for (SHA-256 differs)",
                "Export again, or give the reference that belongs to it.",
            )
        )
    tolerance = Tolerance(
        known.tolerance.absolute if absolute is None else absolute,
        known.tolerance.relative if relative is None else relative,
    )
    parities = []
    for opened in runtimes:
        try:
            parities.append(measure_parity(opened, path, known, tolerance))
        except (LoadError, ExportError) as error:
            if runtime != ALL:
                raise
            findings.append(
                Finding("runtime-failed", "error", opened.name, error.message, error.hint)
            )
    drift = None
    if known.source_outputs is not None:
        drift = measure_drift(known.source_outputs, known.outputs)
    return Report(
        "verify", str(path), parity=tuple(parities), drift=drift, findings=tuple(findings)
    )


def measure_parity(
    runtime: Runtime, path: StrPath, reference: Reference, tolerance: Tolerance | None = None
) -> Parity:
    """What `verify` does, with the runtime and the reference in hand."""
    run = runtime.session(path)
    actual = [run(batch) for batch in reference.inputs]
    if unknown := sorted(set(actual[0]) - set(reference.outputs[0])):
        raise LoadError(
            f"the reference says nothing of the output {', '.join(unknown)}",
            where=str(path),
            hint="Export the model again to make it anew.",
        )
    return compare_parity(
        runtime.name,
        actual,
        reference.outputs,
        tolerance or reference.tolerance,
        reference.batches,
    )


def open_runtime(path: StrPath, name: str | None = None) -> Runtime:
    """The runtime for an artifact.

    Args:
        path: the artifact; what isn't a folder, or isn't there, counts as a file.
        name: one of `RUNTIMES`; by default the first that takes such an artifact.

    Raises:
        UsageError: there is no such runtime, or it doesn't take such an artifact.
        MissingExtraError: its package isn't installed.
    """
    fitting = _fitting(path)
    name = name or fitting[0]
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime '{name}'; there is {', '.join((*RUNTIMES, ALL))}")
    if name not in fitting:
        kinds = ("ONNX files", "SavedModel folders")
        theirs, this = kinds if name in FILE_RUNTIMES else kinds[::-1]
        raise UsageError(
            f"the runtime '{name}' takes {theirs} only",
            where=str(path),
            hint=f"For {this} there is {', '.join(fitting)}.",
        )
    if name in FOLDER_RUNTIMES:
        from layerswap.keras_graph.served import SavedModel

        return SavedModel()
    from layerswap.onnx_graph.runtimes import open_runtime as open_named

    return open_named(name)


def _fitting(path: StrPath) -> tuple[str, ...]:
    return FOLDER_RUNTIMES if Path(path).is_dir() else FILE_RUNTIMES


def _open_all(path: StrPath) -> tuple[list[Runtime], list[Finding]]:
    """Every installed runtime for an artifact, and a finding on each that is missing.

    Raises:
        MissingExtraError: none is installed, so that nothing would be proven.
    """
    opened: list[Runtime] = []
    missing: dict[str, MissingExtraError] = {}
    for name in _fitting(path):
        try:
            opened.append(open_runtime(path, name))
        except MissingExtraError as error:
            missing[name] = error
    if not opened:
        raise next(iter(missing.values()))
    return opened, [
        Finding("runtime-missing", "info", name, error.message, error.hint)
        for name, error in missing.items()
    ]
