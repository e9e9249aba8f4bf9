"""Says whether to swap a model, and with how many groups each layer: from what was measured on
samples, or else from what its statistics predict.

The thresholds are judgements, stated here and in `docs/weights.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerswap import grouping, moments, planning
from layerswap.records import (
    Advice,
    Alternative,
    Calibration,
    LayerAdvice,
    Refusal,
    Statistics,
    Swap,
    SwapPlan,
)

# The largest share of its output's variance that a layer may get wrong before fewer groups are
# advised, and before none is good enough.
ACCEPTABLE, UNUSABLE = 0.1, 0.5
# Of the whole model, from the outputs on held-out samples.
SAME_ANSWERS, SMALL_ERROR, FAIR_ERROR, LARGE_ERROR = 0.98, 0.05, 0.2, 0.5


def advise_layers(
    plan: SwapPlan, statistics: Mapping[str, Statistics], calibration: Calibration | None
) -> tuple[LayerAdvice, ...]:
    """What to do with each BatchNormalization.

    Args:
        plan: says the most groups to consider for each layer.
        statistics: what each learned, by path.
        calibration: with the errors of other numbers of groups, where there are samples.
    """
    fits = {fit.path: fit for fit in calibration.layers} if calibration else {}
    advice = []
    for decision in plan.decisions:
        site = decision.site
        if not isinstance(decision, Swap):
            what = "can't be swapped" if isinstance(decision, Refusal) else "is left out"
            reason = f"{what}: {decision.reason}"
            advice.append(LayerAdvice(site.path, site.channels, None, None, reason))
            continue
        fit = fits.get(site.path)
        if fit is not None:
            choices = (*fit.alternatives, Alternative(fit.groups, fit.error))
        else:
            choices = _predicted(decision, statistics[site.path], plan.policy["adaptive_k"])
        advice.append(_choose(decision, choices))
    return tuple(advice)


def _predicted(swap: Swap, statistics: Statistics, k: float) -> tuple[Alternative, ...]:
    positions = swap.site.spatial
    if positions is None:
        return ()
    found = []
    for groups in {*grouping.usual_groups(swap.channels), swap.groups}:
        epsilon = float(swap.config["epsilon"])
        if swap.adaptive_epsilon:
            epsilon = moments.adaptive_epsilon(statistics, groups, k)
        elements = swap.channels * positions // groups
        bn_epsilon = float(swap.site.config["epsilon"])
        error = moments.predicted_error(statistics, groups, bn_epsilon, epsilon, elements)
        found.append(Alternative(groups, error))
    return tuple(found)


def _choose(swap: Swap, choices: Sequence[Alternative]) -> LayerAdvice:
    path, channels = swap.site.path, swap.channels
    ordered = tuple(sorted(choices, key=lambda choice: choice.groups))
    allowed = [choice for choice in ordered if choice.groups <= swap.groups]
    if not allowed:
        reason = "the positions of a sample aren't fixed, so nothing can be predicted"
        return LayerAdvice(path, channels, swap.groups, None, reason, ordered)
    good = [choice for choice in allowed if choice.error <= ACCEPTABLE]
    best = good[-1] if good else min(allowed, key=lambda choice: choice.error)
    if best.error > UNUSABLE:
        reason = f"whatever the groups, {best.error:.0%} or more would be wrong: keep it, frozen"
        return LayerAdvice(path, channels, None, best.error, reason, ordered)
    reason = "as planned" if best.groups == swap.groups else "fewer groups keep more"
    if not good:
        reason = "the least that is wrong"
    return LayerAdvice(path, channels, best.groups, best.error, reason, ordered)


def advised_policy(plan: SwapPlan, layers: Sequence[LayerAdvice]) -> dict[str, Any]:
    """The fields of a policy that do what is advised: the plan's, with what differs from it.

    Args:
        plan: the one that the advice started from.
        layers: what was advised for each of its decisions.
    """
    planned = {swap.site.path: swap.groups for swap in plan.swaps}
    kept = [layer.path for layer in layers if layer.groups is None]
    changed = {
        layer.path: {"groups": layer.groups}
        for layer in layers
        if layer.groups is not None and layer.groups != planned[layer.path]
    }
    left = {name: value for name, value in plan.policy.items() if name != "include"}
    # The first match applies: what is advised goes first, with what would have matched before.
    own = plan.policy.get("overrides", {})
    for path, fields in changed.items():
        before: Mapping[str, Any] = next(
            (own[p] for p in own if planning.path_matches(p, path)), {}
        )
        changed[path] = {**{k: v for k, v in before.items() if k != "channels_per_group"}, **fields}
    overrides = {**changed, **{p: fields for p, fields in own.items() if p not in changed}}
    return {**left, "exclude": kept, "overrides": overrides}


def judge(
    layers: tuple[LayerAdvice, ...],
    policy: Mapping[str, Any],
    calibration: Calibration | None,
) -> Advice:
    """The verdict on the whole model.

    Args:
        layers: what was advised for each.
        policy: what does it.
        calibration: how good the model is when swapped as advised, where there are samples.
    """
    swapped = [layer for layer in layers if layer.groups is not None]
    if not layers:
        return Advice("keep", "there is no BatchNormalization", layers, policy, False)
    if not swapped:
        return Advice(
            "keep", "no layer can be swapped well", layers, policy, calibration is not None
        )
    if calibration is None:
        bad = [layer for layer in swapped if (layer.error or 0) > ACCEPTABLE]
        reason = (
            f"{len(swapped) - len(bad)} of {len(swapped)} layers are predicted to keep at least "
            f"{1 - ACCEPTABLE:.0%} of what they put out, if the elements of a sample are "
            "independent, which they seldom are: give samples to measure it"
        )
        return Advice("distill" if bad else "swap", reason, layers, policy, False)
    drift = calibration.drift
    agreement = drift.argmax_agreement if drift is not None else None
    numbers = f"the outputs' error on held-out samples is {calibration.error:.3g}"
    if agreement is not None:
        numbers += f", and {agreement:.1%} have the same arg-max"
    same = agreement is not None and agreement >= SAME_ANSWERS
    if calibration.error <= (FAIR_ERROR if same else SMALL_ERROR):
        return Advice("swap", numbers, layers, policy, True)
    if calibration.error <= LARGE_ERROR:
        return Advice("distill", f"{numbers}; distillation may lower it", layers, policy, True)
    return Advice("keep", f"{numbers}: too much is lost", layers, policy, True)
