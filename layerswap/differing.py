"""Compares two files of one kind by what they mean, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from layerswap import catalog
from layerswap.atomic import StrPath
from layerswap.difference_text import describe
from layerswap.errors import UsageError
from layerswap.keras_files import KERAS_SUFFIXES
from layerswap.records import Difference, Finding, Report, Severity

# What could not be compared: no difference, nor a proof that there is none.
NOT_COMPARED = "LS910"


def diff(first: StrPath, second: StrPath, *, exit_code: bool = False) -> Report:
    """Says in what two files differ: models of one format, or plans. Runs and loads neither.

    Layers are compared by path, operators by what they do and what feeds them, weights by their
    Euclidean norms. Names, order and numbering that a new export changes make no difference. A
    BatchNormalization that became a GroupNormalization is told as that.

    Args:
        first: an `.onnx` file, a `.keras`, `.h5` or `.hdf5` file, or the `.json` file of a plan.
        second: a file of the same kind.
        exit_code: whether a difference is an error, so that the report isn't `ok`.

    Returns:
        A report with `differences`, and a finding for each of them.

    Raises:
        LoadError: one of them can't be read as what its suffix says.
        UsageError: they aren't of one kind, or of one that can't be compared.
    """
    one, other = Path(first), Path(second)
    kinds = {_kind(one), _kind(other)}
    if len(kinds) > 1 or None in kinds:
        raise UsageError(
            f"{os.fspath(first)} and {os.fspath(second)} can't be compared",
            hint="Give two .onnx files, two Keras files (.keras, .h5, .hdf5) or two plans (.json, "
            "written by layerswap plan --report-format json).",
        )
    found: list[Difference]
    if kinds == {"onnx"}:
        from layerswap.onnx_graph.differences import onnx_differences

        found = onnx_differences(one, other)
    elif kinds == {"keras"}:
        from layerswap.keras_differences import keras_differences

        found = keras_differences(one, other)
    else:
        from layerswap.plan_differences import plan_differences

        found = plan_differences(one, other)
    found.sort(key=lambda difference: difference.code)  # else in the order of the model
    source = f"{os.fspath(first)} → {os.fspath(second)}"
    findings = tuple(_findings(found, os.fspath(second), exit_code))
    return Report("diff", source, findings=findings, differences=tuple(found))


def _kind(path: Path) -> str | None:
    suffixes = {".onnx": "onnx", ".json": "plan", **dict.fromkeys(KERAS_SUFFIXES, "keras")}
    return None if path.is_dir() else suffixes.get(path.suffix)


def _findings(found: Iterable[Difference], file: str, exit_code: bool) -> Iterable[Finding]:
    for difference in found:
        severity: Severity = "info"
        if exit_code:
            severity = "undetermined" if difference.code == NOT_COMPARED else "error"
        message = describe(difference)
        rule = catalog.find(difference.code)
        yield Finding(rule.code, severity, difference.where, message, "", file)
