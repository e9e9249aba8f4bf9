"""Calibrates γ, β and ε of a converted model with samples, layer after layer, in one pass.

Both models run side by side on all samples (see `lockstep`). Where they come to a layer, all that
comes before it is settled: the GroupNormalization sees the input that it will see in use, the
BatchNormalization shows what it should put out. The better of the data-free fit and the
regressions on these samples is kept, and both models go on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import tensorflow as tf

from layerswap import fitting, grouping, moments, rules
from layerswap.comparison import Outputs, measure_drift, output_error
from layerswap.errors import UnsupportedModelError, UsageError
from layerswap.fitting import Moments, SampleSums
from layerswap.keras_graph.lockstep import Lockstep, Side
from layerswap.keras_graph.measuring import normalize, sum_up
from layerswap.keras_graph.running import answer, interface_of
from layerswap.keras_graph.walk import find_layers
from layerswap.records import (
    Affine,
    Alternative,
    Array,
    Calibration,
    LayerFit,
    Statistics,
    Swap,
    SwapPlan,
)
from layerswap.samples import Arrays, Samples

Say = Callable[..., None]
# By number of groups: the moments of the samples to fit with, and of those held out.
_Measured = dict[int, tuple[Moments, Moments]]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A BatchNormalization, the GroupNormalization in its place, and what both start from."""

    swap: Swap
    before: Any
    after: Any
    statistics: Statistics

    def epsilons(self, groups: int) -> tuple[float, ...]:
        """What the fit may choose from: the planned one, more where the policy leaves it open."""
        planned = float(self.swap.config["epsilon"])
        if not self.swap.adaptive_epsilon:
            return (planned,)
        others = (moments.adaptive_epsilon(self.statistics, groups, k) for k in fitting.FACTORS)
        return tuple(dict.fromkeys((planned, *others)))


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Two models, the names of their outputs, the layers to fit by path, and the samples.

    `alternatives` says whether to try other numbers of groups, too.
    """

    source: Any
    target: Any
    outputs: tuple[str, ...]
    pairs: Mapping[str, Pair]
    samples: Samples
    alternatives: bool = False

    @property
    def variables(self) -> list[Any]:
        """γ and β of all pairs, in turn."""
        return [v for pair in self.pairs.values() for v in (pair.after.gamma, pair.after.beta)]

    def side(self, model: Any, batches: Sequence[Arrays]) -> Side:
        """One of the two models on batches, pausing at its layers of the pairs."""
        original = model is self.source
        return Side(
            [partial(answer, model, batch, self.outputs) for batch in batches],
            {path: p.before if original else p.after for path, p in self.pairs.items()},
        )


def prepare(
    source: Any,
    target: Any,
    plan: SwapPlan,
    statistics: Mapping[str, Statistics],
    samples: Samples,
    alternatives: bool = False,
) -> Work:
    """What calibration and distillation work on: the layers swapped with weights "match".

    Raises:
        UnsupportedModelError: the model keeps state from batch to batch.
        UsageError: there is nothing to fit.
    """
    for found in find_layers(source):
        if getattr(found.layer, "stateful", False) and getattr(found.layer, "states", None):
            raise UnsupportedModelError(
                "a recurrent layer that keeps its state from batch to batch can't be calibrated",
                where=found.path,
                hint="Convert without samples, or build the model with stateful=False.",
            )
    before = {found.path: found.layer for found in find_layers(source)}
    after = {found.path: found.layer for found in find_layers(target)}
    pairs = {
        path: Pair(swap, before[path], after[path], statistics[path])
        for swap in plan.swaps
        if swap.weights == "match" and (path := swap.site.path)
    }
    if not pairs:
        raise UsageError(
            "there is nothing to fit to the samples: no layer is swapped with weights='match'",
            where=plan.source,
        )
    outputs = interface_of(source).outputs
    return Work(source, target, outputs, pairs, samples, alternatives)


def calibrate(work: Work, say: Say) -> Calibration:
    """Sets γ, β and ε of the pairs' GroupNormalization layers.

    If the outputs on the held-out samples are nearer to the source's without the calibration,
    all is as it was before.

    Args:
        work: with the data-free fit in the target, a copy that nobody else has yet.
        say: called with "calibrate" and how many of how many steps are done.

    Raises:
        TransferError: the model fails on the samples, or calls its layers differently from
            batch to batch.
    """
    states = {path: state_of(pair.after) for path, pair in work.pairs.items()}
    with _eager_functions():
        calls, free = _count_calls(work)
        shared = {path for path, count in calls.items() if count > 1}
        fits = _fit_shared(work, shared, sum(calls.values()), say) if shared else {}
        before, after = _fit_in_order(work, fits, sum(calls.values()), say)
    error_match, error = output_error(before, free), output_error(before, after)
    kept = error <= error_match and math.isfinite(error)  # 0 and 0 where nothing can be compared
    if not kept:
        restore(work, states)
        fits = {path: _dropped(fit, work.pairs[path]) for path, fit in fits.items()}
    samples, held_out = work.samples.counts
    return Calibration(
        samples=samples,
        held_out=held_out,
        layers=tuple(fits[path] for path in calls),
        kept=kept,
        error_match=error_match,
        error_calibrated=error,
        error=min(error, error_match),
        drift_match=measure_drift(before, free),
        drift=measure_drift(before, after if kept else free),
    )


def _dropped(fit: LayerFit, pair: Pair) -> LayerFit:
    epsilon = float(pair.swap.config["epsilon"])
    return replace(fit, fit="match", epsilon=epsilon, error=fit.error_match)


def with_epsilons(plan: SwapPlan, work: Work) -> SwapPlan:
    """The plan with the epsilons that the target has now."""
    decisions = []
    for decision in plan.decisions:
        pair = work.pairs.get(decision.site.path)
        if isinstance(decision, Swap) and pair is not None:
            config = {**decision.config, "epsilon": float(pair.after.epsilon)}
            decision = replace(decision, config=config)
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def hand_over(fitted: Any, target: Any, plan: SwapPlan) -> None:
    """Gives the swapped layers of one model the γ, β and ε of another's."""
    layers = {found.path: found.layer for found in find_layers(fitted)}
    own = {found.path: found.layer for found in find_layers(target)}
    for swap in plan.swaps:
        if swap.weights == "match":
            gamma, beta, epsilon = state_of(layers[swap.site.path])
            _set(own[swap.site.path], Affine(gamma, beta), epsilon)


State = tuple[Array, Array, float]


def state_of(layer: Any) -> State:
    """γ, β and ε of a GroupNormalization."""
    return layer.gamma.numpy(), layer.beta.numpy(), float(layer.epsilon)


def restore(work: Work, states: Mapping[str, State]) -> None:
    """Puts back what `state_of` gave."""
    for path, (gamma, beta, epsilon) in states.items():
        _set(work.pairs[path].after, Affine(gamma, beta), epsilon)


def _set(layer: Any, affine: Affine, epsilon: float) -> None:
    for variable, values in ((layer.gamma, affine.gamma), (layer.beta, affine.beta)):
        variable.assign(np.asarray(values).astype(variable.dtype.as_numpy_dtype))
        if variable.constraint is not None:  # rounding may have left a zero just below zero
            variable.assign(variable.constraint(variable))
    layer.epsilon = epsilon


_EAGER = threading.Lock()
# Whether functions ran eagerly before the first of the calibrations that are under way, one each.
_before: list[bool] = []


@contextmanager
def _eager_functions() -> Iterator[None]:
    """The model's own graph functions run line by line: a trace would keep an old epsilon.

    The setting is the process's; it is put back when the last calibration ends.
    """
    with _EAGER:
        _before.append(_before[0] if _before else tf.config.functions_run_eagerly())
        tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        with _EAGER:
            before = _before.pop()
            if not _before:
                tf.config.run_functions_eagerly(before)


def _count_calls(work: Work) -> tuple[dict[str, int], list[Outputs]]:
    """How often each layer is called, and what the data-free model answers when tested."""
    calls: dict[str, int] = {}
    with Lockstep(work.side(work.target, work.samples.held_out)) as steps:
        for path, _ in steps:
            calls[path] = calls.get(path, 0) + 1
    return calls, steps.results[0]


def _both(work: Work) -> Lockstep:
    batches = [*work.samples.fit, *work.samples.held_out]
    return Lockstep(work.side(work.source, batches), work.side(work.target, batches))


def _fit_shared(work: Work, shared: set[str], total: int, say: Say) -> dict[str, LayerFit]:
    """Fits layers that are called several times, to all of their calls together.

    The first call comes before the inputs of the others are known: all are taken as the
    data-free model has them.
    """
    pooled: dict[str, _Measured] = {}
    with _both(work) as steps:
        for number, (path, tensors) in enumerate(steps):
            say("calibrate shared layers", number, total)
            if path in shared:
                pair = work.pairs[path]
                found = _measure(work, pair, _sums_of(pair, *tensors))
                known = pooled.get(path)
                pooled[path] = found if known is None else _add(known, found)
            del tensors  # else they live until the next step is complete
    return {path: _fit(work.pairs[path], found) for path, found in pooled.items()}


def _fit_in_order(
    work: Work, fits: dict[str, LayerFit], total: int, say: Say
) -> tuple[list[Outputs], list[Outputs]]:
    """Fits each layer that isn't yet in `fits`; gives both models' answers when tested."""
    with _both(work) as steps:
        for number, (path, (outputs, inputs)) in enumerate(steps):
            say("calibrate", number, total)
            if path not in fits:
                pair = work.pairs[path]
                sums = _sums_of(pair, outputs, inputs)
                fits[path] = _fit(pair, _measure(work, pair, sums))
                known = zip(inputs, sums, strict=True)
                steps.reply(1, [normalize(pair.after, *each) for each in known])
            del outputs, inputs
    first = len(work.samples.fit)
    before, after = steps.results
    return before[first:], after[first:]


def _sums_of(pair: Pair, outputs: Sequence[Any], inputs: Sequence[Any]) -> list[SampleSums]:
    axis = pair.swap.config["axis"]
    return [sum_up(x, t, axis) for x, t in zip(inputs, outputs, strict=True)]


def _measure(work: Work, pair: Pair, sums: Sequence[SampleSums]) -> _Measured:
    """The moments of a layer's call, for all numbers of groups that are of interest."""
    first = len(work.samples.fit)
    wanted = {pair.swap.groups}
    if work.alternatives:
        wanted |= set(grouping.usual_groups(pair.swap.channels))
    measured = {}
    for groups in sorted(wanted):
        epsilons = pair.epsilons(groups)
        each = [fitting.normalized_moments(part, groups, epsilons) for part in sums]
        measured[groups] = reduce(add, each[:first]), reduce(add, each[first:])
    return measured


def _add(one: _Measured, other: _Measured) -> _Measured:
    return {g: (one[g][0] + other[g][0], one[g][1] + other[g][1]) for g in one}


def _fit(pair: Pair, measured: _Measured) -> LayerFit:
    """Sets the layer to the best fit and says how good it is."""
    groups = pair.swap.groups
    known, held_out = measured[groups]
    gamma, beta, epsilon = state_of(pair.after)
    match = Affine(gamma.astype(np.float64), beta.astype(np.float64))
    choice = fitting.choose(known, held_out, match, pair.epsilons(groups))
    note = rules.objection(pair.swap, choice.affine, choice.epsilon) if choice.calibrated else ""
    if note:
        choice = replace(choice, affine=match, epsilon=epsilon, calibrated=False)
        choice = replace(choice, error=choice.error_match)
    if choice.calibrated:
        _set(pair.after, choice.affine, choice.epsilon)
    bn_epsilon = float(pair.swap.site.config["epsilon"])
    mean, variance = fitting.source_moments(known, pair.statistics, bn_epsilon)
    return LayerFit(
        path=pair.swap.site.path,
        groups=groups,
        epsilon=choice.epsilon,
        fit="calibrated" if choice.calibrated else "match",
        error_match=choice.error_match,
        error=choice.error,
        spread=known.spread,
        source_mean=mean,
        source_variance=variance,
        note=note,
        predicted=pair.swap.predicted,
        alternatives=tuple(
            Alternative(other, fitting.least_error(*both))
            for other, both in measured.items()
            if other != groups
        ),
    )
