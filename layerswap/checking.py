"""Judges files by what is in them, without TensorFlow and without running them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from layerswap.atomic import StrPath
from layerswap.config_files import check_config_file
from layerswap.errors import LayerswapError
from layerswap.records import Checked, Finding, Report


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
