"""The main line: load → plan → swap → export → verify. Straight-line code over the shells."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerswap import advising, diagnosing, exporting, planning
from layerswap.atomic import StrPath
from layerswap.errors import PolicyError, UnsupportedModelError, UsageError
from layerswap.exporting import Converted, Progress, export, require_keras
from layerswap.options import ExportOptions, split_fields
from layerswap.policy import Policy
from layerswap.records import Finding, Refusal, Report, Statistics, SwapPlan
from layerswap.samples import FEWEST, MOST, Samples

__all__ = ["Converted", "advise", "calibrate", "check", "convert", "export", "load", "plan", "swap"]


def load(
    path: StrPath, *, custom_objects: Mapping[str, Any] | None = None, unsafe: bool = False
) -> Any:
    """Reads a tf_keras model from a `.keras` or `.h5` file or a SavedModel folder.

    Args:
        path: the file or folder; it is not written to.
        custom_objects: name → class or function, for what the file refers to by name.
        unsafe: run code that the file holds (Lambda layers).

    Raises:
        LoadError: it can't be read as a tf_keras model.
        MissingExtraError: tensorflow or tf_keras isn't installed.
    """
    require_keras()
    from layerswap.keras_graph import storage

    return storage.load(path, custom_objects=custom_objects, unsafe=unsafe)


def plan(model: Any, policy: Policy | Mapping[str, Any] | None = None, **fields: Any) -> SwapPlan:
    """Decides what becomes of every BatchNormalization; nothing is changed.

    Args:
        model: a tf_keras model, or the path of one.
        policy: what is wanted; or give its fields as keyword arguments.

    Returns:
        One decision per BatchNormalization. Problems of the model are refusals in it.

    Raises:
        PolicyError: the policy is contradictory, or a pattern matches nothing.
        LoadError: `model` is a path that can't be read as a model.
    """
    policy = _policy(policy, fields)
    return _plan(*_model(model), policy)[0]


def check(
    path: StrPath,
    load: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
) -> Report:
    """Says whether a BatchNormalization is left in a file, and lists its normalization layers.

    Without `load`, TensorFlow isn't needed: what tf_keras would build is read from the file's
    configuration. What that doesn't tell, such as a class of the user's own, is a finding of the
    severity `undetermined`.

    Args:
        path: a `.keras` or `.h5` file, a SavedModel folder or an `.onnx` file.
        load: load the model and look at its live layers; an `.onnx` file needs no loading.
        custom_objects, unsafe: as for `load`.

    Returns:
        A report: its `ok` is True only where it is certain that none is left, its `exit_code` 0
        then, 1 if one is left, 3 if that is undetermined.

    Raises:
        LoadError: it can't be read as a model.
        MissingExtraError: `load` without tensorflow or tf_keras.
        UsageError: what only a load can use is given without `load`.
    """
    from layerswap import checking

    if not load and (custom_objects or unsafe):
        raise UsageError(
            "custom objects and unsafe matter only to a model that is loaded",
            hint="Add --load on the command line, load=True in Python.",
        )
    if not load or checking.is_onnx(path):
        return checking.check_file(path)
    model, source = _model(path, custom_objects=custom_objects, unsafe=unsafe)
    from layerswap.keras_graph import listing

    return checking.checked_report(*listing.check_model(model, source))


def swap(
    model: Any,
    policy: Policy | Mapping[str, Any] | None = None,
    *,
    samples: Any = None,
    distill: int = 0,
    max_samples: int = MOST,
    inplace: bool = False,
    self_check: bool = True,
    progress: Progress | None = None,
    **fields: Any,
) -> Converted:
    """Replaces BatchNormalization by GroupNormalization and fits the new γ and β.

    Args:
        model: a tf_keras model, or the path of one.
        policy: what is wanted; or give its fields as keyword arguments.
        samples: unlabelled samples of the model's inputs to calibrate with: an array (a list of
            them or a dict by name for several inputs), a `tf.data.Dataset`, a generator or
            another iterable of samples or batches, a function that gives one of these, or the
            path of a `.npy` or `.npz` file or of a folder of images. At least 8, better 64 or
            more.
        distill: steps of training γ and β on the samples to answer as the source does.
        max_samples: how many to use at most.
        inplace: change the given model instead of a copy. A model that shares layers with others
            takes them along, and an optimizer that the caller holds is replaced by a new one.
        self_check: prove on the result that no BatchNormalization is left and that every new
            layer computes what it should.
        progress: called with the name of each stage; while it calibrates or distills also with
            how many of how many steps are done.

    Raises:
        IndivisibleChannelsError, UnsupportedModelError: layers can't be swapped; all are listed,
            and nothing was changed.
        PolicyError: as for `plan`.
        UsageError, LoadError: the samples don't fit the model or can't be read.
        TransferError: a variable is unaccounted for, the self-check failed, or the model fails
            on the samples.
    """
    policy = _policy(policy, fields)
    _check_distill(samples, distill, max_samples)
    say = progress or _silent
    model, source = _model(model)
    say("plan")
    made, statistics = _plan(model, source, policy)
    planning.raise_refusals(made)
    if samples is None:
        say("swap")
        return _apply(model, made, statistics, inplace, self_check)
    given = _read_samples(model, samples, max_samples, say)
    converted = _calibrated(model, made, statistics, given, distill, say)
    if inplace:  # the source had to be there until now
        say("swap")
        fitted = _apply(model, converted.plan, statistics, inplace, self_check=False)
        fitted.model.set_weights(converted.model.get_weights())
        converted = replace(converted, model=fitted.model, source=None)
    if self_check:
        _self_check(converted)
    return converted


def calibrate(
    converted: Converted,
    samples: Any,
    *,
    distill: int = 0,
    max_samples: int = MOST,
    progress: Progress | None = None,
) -> Converted:
    """Converts once more by the same policy, with samples; the given one stays as it is.

    Args:
        converted: what `swap` gave.
        samples, distill, max_samples, progress: as for `swap`.

    Raises:
        UsageError: the source isn't known any more, as after `inplace=True`.
        LayerswapError: any other, as for `swap`.
    """
    if converted.source is None:
        raise UsageError(
            "a model that was swapped in place can't be calibrated: the BN model is gone",
            hint="Give the samples to swap(..., samples=...).",
        )
    if samples is None:
        raise UsageError("calibration needs samples")
    return swap(
        converted.source,
        Policy(**converted.plan.policy),
        samples=samples,
        distill=distill,
        max_samples=max_samples,
        progress=progress,
    )


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
            the moving statistics, which gives the least error.
        policy: the most groups to consider, and all else; or give its fields as keyword
            arguments.

    Returns:
        A report with an `advice`; with samples also the `calibration` of the model swapped as
        advised.

    Raises:
        LayerswapError: as for `plan` and `swap`.
    """
    policy = _policy(policy, fields)
    _check_distill(samples, 0, max_samples)
    say = progress or _silent
    model, source = _model(model)
    say("plan")
    made, statistics = _plan(model, source, policy)
    tried = replace(made, decisions=tuple(d for d in made.decisions if not isinstance(d, Refusal)))
    calibration = None
    findings: tuple[Finding, ...] = ()
    if samples is not None and tried.swaps:
        given = _read_samples(model, samples, max_samples, say)
        converted = _calibrated(model, tried, statistics, given, 0, say, alternatives=True)
        calibration, findings = converted.calibration, converted.findings
    layers = advising.advise_layers(made, statistics, calibration)
    wanted = advising.advised_policy(made, layers)
    if calibration is not None and any(layer.groups for layer in layers):
        again, _ = _plan(model, source, Policy(**wanted))
        if [swap.groups for swap in again.swaps] != [swap.groups for swap in tried.swaps]:
            converted = _calibrated(model, again, statistics, given, 0, say)
            calibration, findings = converted.calibration, converted.findings
    advice = advising.judge(made, layers, wanted, calibration)
    return Report(
        "advise", source, advice=advice, calibration=calibration, findings=(*made.notes, *findings)
    )


def _check_distill(samples: Any, distill: int, max_samples: int) -> None:
    for name, value, least in (("distill", distill, 0), ("max_samples", max_samples, FEWEST)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if distill and samples is None:
        raise UsageError("distill needs samples", hint="Give samples, or leave distill at 0.")


def _silent(stage: str, done: int = 0, total: int = 0) -> None:
    pass


def _policy(policy: Policy | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Policy:
    if policy is None:
        return Policy(**fields)
    if isinstance(policy, Mapping):
        return Policy(**{**policy, **fields})
    if not isinstance(policy, Policy):
        raise PolicyError(f"a policy is a layerswap.Policy, not a {type(policy).__name__}")
    if fields:
        raise PolicyError(f"give a policy or fields of one, not both: {', '.join(fields)}")
    return policy


def _model(
    source: Any, *, custom_objects: Mapping[str, Any] | None = None, unsafe: bool = False
) -> tuple[Any, str]:
    """A model from a model or a path, and what to call it."""
    if isinstance(source, str | os.PathLike):
        return load(source, custom_objects=custom_objects, unsafe=unsafe), os.fspath(source)
    require_keras()
    from layerswap.keras_graph import storage

    storage.check_model(source)
    if not storage.executes_eagerly():
        raise UsageError(
            "called inside of a TensorFlow graph",
            hint="Call it outside of tf.Graph().as_default().",
        )
    return source, str(source.name)


Learned = Mapping[str, Statistics]


def _plan(model: Any, source: str, policy: Policy) -> tuple[SwapPlan, Learned]:
    """The plan, and what each layer learned, by path, from which the swap will fit."""
    from layerswap.keras_graph.precision import find_imprecise
    from layerswap.keras_graph.sites import find_nonfinite, find_sites

    sites, statistics, unseen = find_sites(model)
    findings = (*unseen, *find_nonfinite(model))
    made = planning.make_plan(source, sites, statistics, policy, findings)
    return replace(made, findings=(*made.findings, *find_imprecise(made))), statistics


def _read_samples(model: Any, samples: Any, most: int, say: Progress) -> Samples:
    from layerswap.keras_graph import sampling

    say("read samples")
    return sampling.read_samples(model, samples, most)


def _calibrated(
    model: Any,
    made: SwapPlan,
    statistics: Learned,
    given: Samples,
    distill: int,
    say: Progress,
    alternatives: bool = False,
) -> Converted:
    """A swapped copy, fitted to samples."""
    from layerswap.keras_graph import calibrating, distilling

    say("swap")
    converted = _apply(model, made, statistics, inplace=False, self_check=False)
    work = calibrating.prepare(model, converted.model, made, statistics, given, alternatives)
    calibration = calibrating.calibrate(work, say)
    if distill:
        calibration = distilling.distill(work, calibration, distill, say)
    return replace(
        converted,
        plan=calibrating.with_epsilons(made, work),
        calibration=calibration,
        findings=(*given.findings, *diagnosing.find_problems(calibration)),
    )


def _self_check(converted: Converted) -> None:
    from layerswap.keras_graph import selfcheck

    selfcheck.check_swap(converted.model, converted.plan)


def _apply(
    model: Any, made: SwapPlan, statistics: Learned, inplace: bool, self_check: bool
) -> Converted:
    from layerswap.keras_graph import compiling, copying, rebuild, weights

    before = weights.snapshot(model)
    recipes = [compiling.prepare(each) for each in copying.models_in(model)]
    target, twins = (model, copying.Twins()) if inplace else copying.copy_model(model)
    rebuild.apply_plan(target, made, statistics)
    pairs = weights.surviving(before, target, twins)
    for recipe in recipes:
        recipe.apply(twins.of(recipe.source), twins, pairs)
    log = weights.account(before, target, twins, made)
    converted = Converted(target, made, log, None if inplace else model)
    if self_check:
        _self_check(converted)
    return converted


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
    policy = _policy(policy, fields)
    _check_distill(samples, distill, max_samples)
    require_keras()
    wanted = exporting.prepare(target, ExportOptions(**options), source)
    seconds: dict[str, float] = {}
    stages = _Stages(seconds, progress or _silent)

    stages("load")
    model, name = _model(source, custom_objects=custom_objects, unsafe=unsafe)
    stages("plan")
    made, statistics = _plan(model, name, policy)
    if not made.decisions and not allow_no_batchnorm:
        raise UnsupportedModelError(
            "the model has no BatchNormalization: there is nothing to convert",
            where=name,
            hint="To export it all the same: --allow-no-batchnorm, allow_no_batchnorm=True.",
        )
    planning.raise_refusals(made)
    if samples is None or not made.decisions:
        stages("swap")
        converted = _apply(model, made, statistics, inplace=False, self_check=True)
    else:
        given = _read_samples(model, samples, max_samples, stages)
        converted = _calibrated(model, made, statistics, given, distill, stages)
        _self_check(converted)
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
    stages = _Stages(seconds, progress or _silent)
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
