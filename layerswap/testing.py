"""Assertions for the tests of those who deploy models: what is wrong, where, and what to do.

    from layerswap.testing import assert_groups, assert_no_batchnorm, assert_parity

    def test_the_model():
        assert_no_batchnorm("model.onnx")
        assert_groups("model.onnx", 32)
        assert_parity("model.onnx")

A model that can't be read at all raises a `LoadError`, as everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from layerswap.records import Finding, LayerRecord, Report

StrPath = str | os.PathLike[str]
Groups = int | Literal["auto"]

# What can't be seen.
_UNSEEN = ("LS0",)
_BATCHNORM = (*_UNSEEN, "LS1")


def assert_no_batchnorm(
    model: StrPath | Any,
    *,
    ignore: Sequence[str] = (),
    load: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
) -> None:
    """Holds that no BatchNormalization is left, and that this is certain.

    Args:
        model: a path, as for `check`, or a tf_keras model.
        ignore: rules not to apply, as for `check`: `["LS004"]` for operators of your own.
        load, custom_objects, unsafe: as for `check`; for a path only.

    Raises:
        AssertionError: one is left, or something may be one; names each.
        LayerswapError: as for `check`.
    """
    __tracebackhide__ = True
    report = _checked(
        model, _BATCHNORM, ignore, load=load, custom_objects=custom_objects, unsafe=unsafe
    )
    _assert_none_grave(report.source, report.findings)


def assert_groups(
    model: StrPath | Any,
    groups: Groups | Mapping[str, Groups],
    *,
    ignore: Sequence[str] = (),
    load: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
) -> None:
    """Holds that every GroupNormalization has the groups that it should have.

    Args:
        model: a path, as for `check`, or a tf_keras model.
        groups: how many: a number, -1 (one for each channel) or "auto", as in a policy; or glob on
            the layer's path → these, the first that matches applies, the others are left alone.
        ignore: rules not to apply, as for `check`: `["LS004"]` for operators of your own.
        load, custom_objects, unsafe: as for `check`; for a path only.

    Raises:
        AssertionError: a layer has others, or the file doesn't say how many; there is no
            GroupNormalization, none that a glob matches, or something that may hold one.
        LayerswapError: as for `check`; `groups` is nothing of this.
    """
    __tracebackhide__ = True
    from layerswap import catalog
    from layerswap.planning import path_matches
    from layerswap.policy import Policy

    wanted = groups if isinstance(groups, Mapping) else {"**": groups}
    for value in wanted.values():
        Policy(groups=value)  # says what is wrong with it
    report = _checked(
        model, _UNSEEN, ignore, load=load, custom_objects=custom_objects, unsafe=unsafe
    )
    _assert_none_grave(report.source, report.findings)
    layers = [layer for layer in report.checked[0].layers if _is_groupnorm(layer)]
    unused = [p for p in wanted if not any(path_matches(p, layer.path) for layer in layers)]
    if unused:
        paths = ", ".join(layer.path for layer in layers) or "none at all"
        raise AssertionError(
            f"{report.source}: no GroupNormalization matches {', '.join(map(repr, unused))}\n"
            f"  there is: {paths}"
        )
    rule = catalog.find("groups-differ")
    wrong = []
    for layer in layers:
        pattern = next((p for p in wanted if path_matches(p, layer.path)), None)
        if pattern is not None and (message := _compared(layer, wanted[pattern])):
            wrong.append(rule.finding(layer.path, message))
    _assert_none_grave(report.source, wrong)


def assert_parity(
    path: StrPath,
    reference: StrPath | None = None,
    *,
    runtime: str | None = None,
    absolute: float | None = None,
    relative: float | None = None,
) -> None:
    """Holds that a runtime reproduces the Keras model that a file was made of.

    Args:
        path: an `.onnx` file or a SavedModel folder.
        reference, runtime, absolute, relative: as for `verify`.

    Raises:
        AssertionError: an output is beyond tolerance, or the reference belongs to another file.
        LayerswapError: as for `verify`.
    """
    __tracebackhide__ = True
    from layerswap.formats.results import results
    from layerswap.verifying import report_parity

    report = report_parity(path, reference, runtime=runtime, absolute=absolute, relative=relative)
    _assert_none_grave(report.source, results(report))


def assert_same_graph(first: StrPath, second: StrPath) -> None:
    """Holds that two files hold the same model: layers or operators, weights, inputs and outputs.

    Args:
        first, second: two files of one format, as for `layerswap diff`.

    Raises:
        AssertionError: they differ; names each difference.
        LayerswapError: as for `layerswap diff`.
    """
    __tracebackhide__ = True
    from layerswap.differing import diff

    report = diff(first, second, exit_code=True)
    _assert_none_grave(report.source, report.findings)


def _checked(
    model: StrPath | Any, select: Sequence[str], ignore: Sequence[str], load: bool, **loading: Any
) -> Report:
    from layerswap import linting
    from layerswap.criteria import Criteria

    criteria = Criteria(select=select, ignore=ignore)
    if isinstance(model, str | os.PathLike):
        return linting.check(model, load=load, criteria=criteria, **loading)
    from layerswap.errors import UsageError

    if load or any(loading.values()):
        raise UsageError("load, custom_objects and unsafe are about files; this is a model")
    from layerswap.checking import checked_report
    from layerswap.swapping import as_model

    known, name = as_model(model)
    from layerswap.keras_graph import listing

    return checked_report(*listing.check_model(known, name), criteria)


def _is_groupnorm(layer: LayerRecord) -> bool:
    return layer.groups is not None or "GroupNorm" in layer.class_name


def _compared(layer: LayerRecord, wanted: Groups) -> str:
    """What is wrong with the groups of a layer; empty where nothing."""
    from layerswap.grouping import auto_groups

    if layer.groups is None or (layer.channels is None and wanted in ("auto", -1)):
        what = "groups" if layer.groups is None else "channels"
        return f"the model doesn't say how many {what} it has"
    if layer.channels is not None and wanted in ("auto", -1):
        expected = layer.channels if wanted == -1 else auto_groups(layer.channels)
    else:
        expected = int(wanted)
    if layer.groups == expected:
        return ""
    channels = "" if layer.channels is None else f" over {layer.channels} channels"
    rule = "" if wanted == expected else f" ({wanted})"
    return f"has {layer.groups} groups{channels}, not {expected}{rule}"


def _assert_none_grave(source: str, findings: Iterable[Finding]) -> None:
    __tracebackhide__ = True
    from layerswap.formats.results import explained

    grave = [finding for finding in findings if finding.severity in ("error", "undetermined")]
    if grave:
        raise AssertionError(explained(source, grave))
