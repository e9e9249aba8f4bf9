"""Load, plan and swap, with or without samples. Straight-line code over the Keras shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from layerswap import diagnosing, planning
from layerswap.atomic import StrPath
from layerswap.errors import PolicyError, UnsupportedModelError, UsageError
from layerswap.exporting import Converted, Progress, require_keras
from layerswap.policy import Policy
from layerswap.records import Statistics, SwapPlan
from layerswap.samples import FEWEST, MOST, Samples

# What each layer learned, by path.
Learned = Mapping[str, Statistics]


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
    policy = as_policy(policy, fields)
    return decide(*as_model(model), policy)[0]


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
    policy = as_policy(policy, fields)
    check_amounts(samples, distill, max_samples)
    say = progress or silent
    model, source = as_model(model)
    say("plan")
    made, statistics = decide(model, source, policy)
    planning.raise_refusals(made)
    if samples is None:
        say("swap")
        converted = swap_matched(model, made, statistics, inplace)
    else:
        given = read_samples(model, samples, max_samples, say)
        try:
            converted = swap_calibrated(model, made, statistics, given, distill, say)
        except UnsupportedModelError as error:
            if inplace:
                error.hint = "Samples need a copy to compare with: swap it in place without them."
            raise
        if inplace:  # the source had to be there until now
            from layerswap.keras_graph import calibrating

            fitted = swap_matched(model, converted.plan, statistics, inplace)
            calibrating.hand_over(converted.model, fitted.model, converted.plan)
            converted = replace(converted, model=fitted.model, source=None)
    if self_check:
        prove(converted)
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


def check_amounts(samples: Any, distill: int, max_samples: int) -> None:
    """Refuses numbers that make no sense, before any work.

    Raises:
        UsageError: one isn't a whole number or is too small, or there is nothing to distill with.
    """
    for name, value, least in (("distill", distill, 0), ("max_samples", max_samples, FEWEST)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if distill and samples is None:
        raise UsageError("distill needs samples", hint="Give samples, or leave distill at 0.")


def silent(stage: str, done: int = 0, total: int = 0) -> None:
    """Progress that nobody looks at."""


def as_policy(policy: Policy | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Policy:
    """A policy from a policy, its fields as a mapping, or keyword arguments.

    Raises:
        PolicyError: it is something else, or a ready policy comes with fields.
    """
    if policy is None:
        return Policy(**fields)
    if isinstance(policy, Mapping):
        return Policy(**{**policy, **fields})
    if not isinstance(policy, Policy):
        raise PolicyError(f"a policy is a layerswap.Policy, not a {type(policy).__name__}")
    if fields:
        raise PolicyError(f"give a policy or fields of one, not both: {', '.join(fields)}")
    return policy


def as_model(
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


def decide(model: Any, source: str, policy: Policy) -> tuple[SwapPlan, Learned]:
    """The plan, and what each layer learned, by path, from which the swap will fit."""
    from layerswap.keras_graph.precision import find_imprecise
    from layerswap.keras_graph.sites import find_nonfinite, find_sites

    sites, statistics, unseen = find_sites(model)
    findings = (*unseen, *find_nonfinite(model))
    made = planning.make_plan(source, sites, statistics, policy, findings)
    return replace(made, findings=(*made.findings, *find_imprecise(made))), statistics


def read_samples(model: Any, samples: Any, most: int, say: Progress) -> Samples:
    """Samples for a model; see `swap`."""
    from layerswap.keras_graph import sampling

    say("read samples")
    return sampling.read_samples(model, samples, most)


def swap_calibrated(
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
    from layerswap.keras_graph.weights import preserved

    say("swap")
    converted = swap_matched(model, made, statistics)
    work = calibrating.prepare(model, converted.model, made, statistics, given, alternatives)
    with preserved(model), preserved(converted.model, but=work.variables):
        calibration = calibrating.calibrate(work, say)
        if distill:
            calibration = distilling.distill(work, calibration, distill, say)
    return replace(
        converted,
        plan=calibrating.with_epsilons(made, work),
        calibration=calibration,
        findings=(*given.findings, *diagnosing.find_problems(calibration, list(work.pairs))),
    )


def prove(converted: Converted) -> None:
    """The self-check of `swap`.

    Raises:
        TransferError: something isn't as planned.
    """
    from layerswap.keras_graph import selfcheck

    selfcheck.check_swap(converted.model, converted.plan)


def swap_matched(
    model: Any, made: SwapPlan, statistics: Learned, inplace: bool = False
) -> Converted:
    """Applies a plan to a copy of the model, or to itself. Nothing is proven yet."""
    from layerswap.keras_graph import compiling, copying, rebuild, weights

    before = weights.snapshot(model)
    recipes = [compiling.prepare(each) for each in copying.models_in(model)]
    target, twins = (model, copying.Twins()) if inplace else copying.copy_model(model)
    rebuild.apply_plan(target, made, statistics)
    pairs = weights.surviving(before, target, twins)
    for recipe in recipes:
        recipe.apply(twins.of(recipe.source), twins, pairs)
    log = weights.account(before, target, twins, made)
    return Converted(target, made, log, None if inplace else model)
