"""The main line: load → plan → swap → export → verify. Straight-line code over the shells."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerswap import exporting, planning
from layerswap.atomic import StrPath
from layerswap.errors import PolicyError, UnsupportedModelError, UsageError
from layerswap.exporting import Converted, Progress, export, require_keras
from layerswap.options import ExportOptions, split_fields
from layerswap.policy import Policy
from layerswap.records import Report, Statistics, SwapPlan

__all__ = ["Converted", "check", "convert", "export", "load", "plan", "swap"]


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
    inplace: bool = False,
    self_check: bool = True,
    **fields: Any,
) -> Converted:
    """Replaces BatchNormalization by GroupNormalization and fits the new γ and β.

    Args:
        model: a tf_keras model, or the path of one.
        policy: what is wanted; or give its fields as keyword arguments.
        inplace: change the given model instead of a copy. A model that shares layers with others
            takes them along, and an optimizer that the caller holds is replaced by a new one.
        self_check: prove on the result that no BatchNormalization is left and that every new
            layer computes what it should.

    Raises:
        IndivisibleChannelsError, UnsupportedModelError: layers can't be swapped; all are listed,
            and nothing was changed.
        PolicyError: as for `plan`.
        TransferError: a variable is unaccounted for, or the self-check failed.
    """
    policy = _policy(policy, fields)
    model, source = _model(model)
    return _apply(model, *_plan(model, source, policy), inplace, self_check)


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


def _apply(
    model: Any, made: SwapPlan, statistics: Learned, inplace: bool, self_check: bool
) -> Converted:
    planning.raise_refusals(made)
    from layerswap.keras_graph import compiling, copying, rebuild, selfcheck, weights

    before = weights.snapshot(model)
    recipes = [compiling.prepare(each) for each in copying.models_in(model)]
    target, twins = (model, copying.Twins()) if inplace else copying.copy_model(model)
    rebuild.apply_plan(target, made, statistics)
    pairs = weights.surviving(before, target, twins)
    for recipe in recipes:
        recipe.apply(twins.of(recipe.source), twins, pairs)
    log = weights.account(before, target, twins, made)
    if self_check:
        selfcheck.check_swap(target, made)
    return Converted(target, made, log, None if inplace else model)


def convert(
    source: StrPath | Any,
    target: StrPath,
    policy: Policy | Mapping[str, Any] | None = None,
    *,
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
        allow_no_batchnorm: export a model that has no BatchNormalization, too.
        custom_objects, unsafe: as for `load`.
        progress: called with the name of each stage.

    Raises:
        UnsupportedModelError: there is nothing to swap, or something that can't be swapped.
        LayerswapError: any other, as for `load`, `plan`, `swap` and `export`.
    """
    options, fields = split_fields(fields)
    policy = _policy(policy, fields)
    require_keras()
    wanted = exporting.prepare(target, ExportOptions(**options), source)
    seconds: dict[str, float] = {}
    stages = _Stages(seconds, progress or (lambda stage: None))

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
    stages("swap")
    converted = _apply(model, made, statistics, inplace=False, self_check=True)
    artifact = export(converted, target, wanted, progress=stages)
    stages.finish()
    return Report(
        "convert",
        name,
        plan=made,
        transfer=converted.transfer,
        artifact=artifact,
        parity=(artifact.parity,) if artifact.parity else (),
        drift=artifact.drift,
        findings=(*made.notes, *artifact.findings),
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
    stages = _Stages(seconds, progress or (lambda stage: None))
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

    def __call__(self, stage: str) -> None:
        self.finish()
        self._name, self._start = stage, time.perf_counter()
        self._say(stage)

    def finish(self) -> None:
        if self._name:
            self._seconds[self._name] = time.perf_counter() - self._start
        self._name = ""
