"""Judges one file by what is in it, without TensorFlow and without running it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from layerswap import catalog
from layerswap.atomic import StrPath
from layerswap.config_files import check_config_file
from layerswap.criteria import Criteria
from layerswap.errors import LoadError, reading
from layerswap.keras_files import read_config
from layerswap.keras_layers import read_layers
from layerswap.keras_weights import Weight, open_weights
from layerswap.layer_rules import judge_layers
from layerswap.records import Checked, Finding, Report
from layerswap.weight_norms import widened


def check_file(path: StrPath, criteria: Criteria, proof: Iterable[Finding] = ()) -> Report:
    """Applies every rule that is asked for to a file, without loading the model.

    Args:
        path: a `.keras`, `.h5`, `.hdf5` or `.onnx` file, or a SavedModel folder.
        criteria: what it is judged by; overrides for its path are applied already.
        proof: what running it showed.

    Returns:
        Every normalization layer, and what there is to say.

    Raises:
        LoadError: it can't be read as a model.
    """
    if is_onnx(path):
        from layerswap.onnx_graph.lint import check_onnx_file

        checked, findings = check_onnx_file(path, criteria)
    else:
        checked, findings = check_config_file(path)
        checked = with_channels(checked)
        findings += judge_layers(checked.layers, criteria)
        if criteria.weights:
            findings += judge_weights(Path(path))
    return checked_report(checked, [*findings, *proof], criteria)


def with_channels(checked: Checked) -> Checked:
    """The same with the channels that the weights of an HDF5 file show.

    Its configuration has no shapes. Weights that can't be read are left to who asks for them.
    """
    path, layers = Path(checked.source), checked.layers
    unknown = any(layer.groups is not None and layer.channels is None for layer in layers)
    if not unknown or path.is_dir():
        return checked
    sizes: dict[str, int] = {}
    # What h5py and others raise for whatever a damaged file holds.
    with suppress(Exception), open_weights(path, read_layers(read_config(path))) as weights:
        sizes = {
            layer: weight.shape[0]
            for layer, own in weights.items()
            for weight in own
            if weight.name in ("gamma", "beta") and len(weight.shape) == 1
        }
    return replace(
        checked,
        layers=tuple(
            layer
            if layer.groups is None or layer.channels is not None
            else replace(layer, channels=sizes.get(layer.path))
            for layer in layers
        ),
    )


def is_onnx(path: StrPath) -> bool:
    """Whether a file is to be taken for an ONNX graph, by its suffix."""
    return Path(path).suffix == ".onnx" and not Path(path).is_dir()


def kind_of(path: StrPath) -> catalog.FileKind:
    """What rules say of a file: which of the two it is."""
    return "onnx" if is_onnx(path) else "keras"


def judge_weights(path: Path) -> Iterator[Finding]:
    """NaN, infinity, kernels and γ that are all zero in a Keras file: LS601 to LS603."""
    if path.is_dir():
        yield catalog.find("nonfinite-weights").finding(
            "",
            "the weights of a SavedModel can't be read without TensorFlow",
            "Save the model as .keras or .h5 to have them looked at, or ignore LS601.",
            severity="undetermined",
        )
        return
    hint = "It is damaged: copy or save it again."
    with (
        reading(os.fspath(path), "its weights can't be read", hint),
        open_weights(path, read_layers(read_config(path))) as layers,
    ):
        for layer, weights in layers.items():
            for weight in weights:
                yield from _judge_weight(layer, weight)


def _judge_weight(layer: str, weight: Weight) -> Iterator[Finding]:
    where = f"{layer}/{weight.name}" if layer else weight.name
    bad, zero = 0, True
    for part in weight.rows():
        values = widened(part)
        bad += int(np.count_nonzero(~np.isfinite(values)))
        zero = zero and not np.any(values)
    count = math.prod(weight.shape)
    if bad:
        yield catalog.find("nonfinite-weights").finding(
            where, f"{bad} of its {count} values are NaN or infinite"
        )
    if not zero or not count:
        return
    if weight.name == "gamma":
        yield catalog.find("zero-gamma").finding(where, f"all {count} values are 0")
    elif weight.is_kernel:
        yield catalog.find("zero-weights").finding(where, f"all {count} values are 0")


def checked_report(checked: Checked, findings: Iterable[Finding], criteria: Criteria) -> Report:
    """The report on one file: of the findings those that are asked for, as severe as asked for."""
    kind = kind_of(checked.source)
    rules = tuple(rule.code for rule in catalog.RULES if criteria.covers(rule, kind))
    own = tuple(
        replace(
            finding,
            file=checked.source,
            severity=criteria.severity_of(finding.code) or finding.severity,
        )
        for finding in dict.fromkeys(findings)
        if criteria.applies(finding.code)
    )
    checked = replace(checked, rules=rules)
    return Report("check", checked.source, findings=own, checked=(checked,))


def unreadable_report(path: StrPath, error: LoadError, criteria: Criteria) -> Report:
    """The report on a file that can't be read: nobody knows what is in it."""
    finding = catalog.find("unreadable").finding("", error.message, error.hint)
    report = checked_report(Checked(os.fspath(path), 0), [finding], criteria)
    (checked,) = report.checked
    return replace(report, checked=(replace(checked, rules=(finding.code,)),))


def merge_reports(reports: Iterable[Report]) -> Report:
    """One report on all files. Its exit code: 1 if any has findings, else 3 if any is open."""
    parts = list(reports)
    return Report(
        "check",
        ", ".join(part.source for part in parts),
        findings=tuple(finding for part in parts for finding in part.findings),
        checked=tuple(checked for part in parts for checked in part.checked),
    )
