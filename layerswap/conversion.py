"""The main line: load → plan → swap → export → verify, and what judges a model on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerswap import advising, exporting, planning
from layerswap.atomic import StrPath
from layerswap.errors import UnsupportedModelError, UsageError
from layerswap.exporting import Progress, export, require_keras
from layerswap.options import ExportOptions, split_fields
from layerswap.policy import Policy
from layerswap.records import Finding, Refusal, Report
from layerswap.samples import MOST
from layerswap.swapping import (
    as_model,
    as_policy,
    check_amounts,
    decide,
    load,
    plan,
    prove,
    read_samples,
    silent,
    swap_calibrated,
    swap_matched,
)

__all__ = ["advise", "convert", "load", "plan", "report_export"]


def advise(
    model: Any,
    samples: Any = None,
    *,
    policy: Policy | Mapping[str, Any] | None = None,
    max_samples: int = MOST,
    progress: Progress | None = None,
    **fields: Any,
) -> Report:
    """Says whether to swap a model, and with how many groups each layer. Nothing is changed.

    Args:
        model: a tf_keras model, or the path of one.
        samples, max_samples, progress: as for `swap`. Without samples all is predicted from
            the moving statistics, as if the elements of a sample were independent.
        policy: the most groups to consider, and all else; or give its fields as keyword
            arguments.

    Returns:
        A report with an `advice`; with samples also the `calibration` of the model swapped as
        advised.

    Raises:
        LayerswapError: as for `plan` and `swap`.
    """
    policy = as_policy(policy, fields)
    if policy.weights != "match":
        raise UsageError("advice is on weights='match' alone: the others keep next to nothing")
    check_amounts(samples, 0, max_samples)
    say = progress or silent
    model, source = as_model(model)
    say("plan")
    made, statistics = decide(model, source, policy)
    tried = replace(made, decisions=tuple(d for d in made.decisions if not isinstance(d, Refusal)))
    calibration = None
    findings: tuple[Finding, ...] = ()
    if samples is not None and tried.swaps:
        given = read_samples(model, samples, max_samples, say)
        converted = swap_calibrated(model, tried, statistics, given, 0, say, alternatives=True)
        calibration, findings = converted.calibration, converted.findings
    layers = advising.advise_layers(made, statistics, calibration)
    wanted = advising.advised_policy(made, layers)
    if calibration is not None and any(layer.groups for layer in layers):
        again, _ = decide(model, source, Policy(**wanted))
        if [swap.groups for swap in again.swaps] != [swap.groups for swap in tried.swaps]:
            converted = swap_calibrated(model, again, statistics, given, 0, say)
            calibration, findings = converted.calibration, converted.findings
    advice = advising.judge(layers, wanted, calibration)
    return Report(
        "advise", source, advice=advice, calibration=calibration, findings=(*made.notes, *findings)
    )


def convert(
    source: StrPath | Any,
    target: StrPath,
    policy: Policy | Mapping[str, Any] | None = None,
    *,
    samples: Any = None,
    distill: int = 0,
    max_samples: int = MOST,
    allow_no_batchnorm: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> Report:
    """The whole line: load, plan, swap, export, verify.

    Args:
        source: the path of a tf_keras model, or the model.
        target: where the artifact goes.
        policy: what is wanted; or give its fields as keyword arguments. The options of
            `export` (`format`, `opset`, `groupnorm`, ...) are keyword arguments, too.
        samples, distill, max_samples: as for `swap`.
        allow_no_batchnorm: export a model that has no BatchNormalization, too.
        custom_objects, unsafe: as for `load`.
        progress: called with the name of each stage.

    Raises:
        UnsupportedModelError: there is nothing to swap, or something that can't be swapped.
        LayerswapError: any other, as for `load`, `plan`, `swap` and `export`.
    """
    options, fields = split_fields(fields)
    policy = as_policy(policy, fields)
    check_amounts(samples, distill, max_samples)
    require_keras()
    wanted = exporting.prepare(target, ExportOptions(**options), source)
    seconds: dict[str, float] = {}
    stages = _Stages(seconds, progress or silent)

    stages("load")
    model, name = as_model(source, custom_objects=custom_objects, unsafe=unsafe)
    stages("plan")
    made, statistics = decide(model, name, policy)
    if not made.decisions and not allow_no_batchnorm:
        raise UnsupportedModelError(
            "the model has no BatchNormalization: there is nothing to convert",
            where=name,
            hint="To export it all the same: --allow-no-batchnorm, allow_no_batchnorm=True.",
        )
    planning.raise_refusals(made)
    if samples is None or not made.decisions:
        stages("swap")
        converted = swap_matched(model, made, statistics)
    else:
        given = read_samples(model, samples, max_samples, stages)
        converted = swap_calibrated(model, made, statistics, given, distill, stages)
    prove(converted)
    artifact = export(converted, target, wanted, progress=stages)
    stages.finish()
    return Report(
        "convert",
        name,
        plan=converted.plan,
        transfer=converted.transfer,
        artifact=artifact,
        parity=(artifact.parity,) if artifact.parity else (),
        drift=artifact.drift,
        calibration=converted.calibration,
        findings=(*made.notes, *converted.findings, *artifact.findings),
        seconds=seconds,
    )


def report_export(
    source: StrPath,
    target: StrPath,
    *,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """What `export` does, from file to file, as a report.

    Args:
        source: the path of a tf_keras model.
        target: where the artifact goes.
        custom_objects, unsafe: as for `load`.
        progress: called with the name of each stage.
        options: as for `export`.

    Raises:
        LayerswapError: as for `load` and `export`.
    """
    require_keras()
    wanted = exporting.prepare(target, ExportOptions(**options), source)
    seconds: dict[str, float] = {}
    stages = _Stages(seconds, progress or silent)
    stages("load")
    model = load(source, custom_objects=custom_objects, unsafe=unsafe)
    artifact = export(model, target, wanted, progress=stages)
    stages.finish()
    return Report(
        "export",
        os.fspath(source),
        artifact=artifact,
        parity=(artifact.parity,) if artifact.parity else (),
        findings=artifact.findings,
        seconds=seconds,
    )


class _Stages:
    """Times stages that announce their beginning."""

    def __init__(self, seconds: dict[str, float], say: Progress) -> None:
        self._seconds, self._say = seconds, say
        self._name, self._start = "", 0.0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if stage != self._name:
            self.finish()
            self._name, self._start = stage, time.perf_counter()
        if total:
            self._say(stage, done, total)
        else:
            self._say(stage)

    def finish(self) -> None:
        if self._name:
            self._seconds[self._name] = time.perf_counter() - self._start
        self._name = ""
