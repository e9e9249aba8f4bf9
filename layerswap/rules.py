"""What one BatchNormalization becomes: (site, policy, statistics) → Swap, Skip or Refusal.

Pure: only configuration and numbers go in, so every rule is tested without TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from layerswap import grouping, moments, penalties
from layerswap.policy import HUGE, PARTS, Policy
from layerswap.records import (
    Affine,
    Decision,
    Finding,
    Refusal,
    Site,
    Skip,
    Statistics,
    Swap,
)

# Below this many elements a group's mean and variance say more of the noise than of the sample.
FEW_ELEMENTS = 8
# Largest float16 is 65504; a sample's variance varies about the population's.
FLOAT16_REACH = 65504 / 4
CARRIED = ("name", "trainable", "dtype")


class _Refused(Exception):
    """Carries a refusal out of the straight-line code below."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason, self.hint = code, reason, hint


class _Skipped(Exception):
    """Carries a skip that the policy asked for."""


def decide(site: Site, policy: Policy, statistics: Statistics | None) -> Decision:
    """What becomes of one BatchNormalization.

    Args:
        site: the layer as the walk found it.
        policy: with the overrides for this site already applied.
        statistics: what the layer learned; None where it has no weights.
    """
    try:
        return _swap(site, policy, statistics)
    except _Refused as refused:
        return Refusal(site, refused.code, refused.reason, refused.hint)
    except _Skipped as skipped:
        return Skip(site, str(skipped))


def fit(swap: Swap, statistics: Statistics) -> Affine:
    """γ and β of the GroupNormalization that a swap makes of a BatchNormalization.

    Args:
        swap: with weights "match" or "copy".
        statistics: what the BatchNormalization learned, finite.
    """
    if swap.weights == "copy":
        return Affine(statistics.gamma, statistics.beta)
    epsilon = float(swap.site.config["epsilon"])
    return moments.match(statistics, swap.groups, epsilon, float(swap.config["epsilon"]))


def _swap(site: Site, policy: Policy, statistics: Statistics | None) -> Swap:
    _refuse_unconvertible(site)
    _refuse_unusable(policy, statistics)
    axis, channels = _choose_axis(site, policy)
    groups = _choose_groups(site, policy, channels)
    config: dict[str, Any] = {key: site.config[key] for key in CARRIED if key in site.config}
    if _dtype_name(config.get("dtype")).startswith("mixed_") and site.consumers_cast:
        config["dtype"] = "float32"  # in 16 bits a group's variance may overflow
    config |= {
        "groups": groups,
        "axis": axis,
        "epsilon": _choose_epsilon(site, policy, statistics, groups),
        "center": _switch(site, policy, "center"),
        "scale": _switch(site, policy, "scale"),
    }
    for part in PARTS:
        config[part] = _choose_part(site, policy, part)
    adaptive = policy.epsilon_rule == "adaptive"
    swap = Swap(site, config, policy.weights, adaptive_epsilon=adaptive)
    _refuse_degenerate(swap, policy)
    fitted = None if statistics is None or policy.weights == "reset" else fit(swap, statistics)
    if statistics is not None and fitted is not None:
        _refuse_overflow(swap, statistics, fitted)
    notes = tuple(_notes(swap, statistics, fitted))
    return replace(swap, notes=notes, predicted=_predict(swap, statistics))


def _predict(swap: Swap, statistics: Statistics | None) -> float | None:
    if statistics is None or swap.weights != "match" or swap.elements_per_group is None:
        return None
    epsilons = float(swap.site.config["epsilon"]), float(swap.config["epsilon"])
    return moments.predicted_error(statistics, swap.groups, *epsilons, swap.elements_per_group)


def objection(swap: Swap, affine: Affine, epsilon: float) -> str:
    """Why a fit other than the planned one can't be used; empty where it can.

    Args:
        swap: a planned one.
        affine, epsilon: what was fitted instead.
    """
    largest = max(float(np.abs(v).max()) for v in (affine.gamma, affine.beta, np.array(epsilon)))
    if not largest <= HUGE:
        return f"the fit needs numbers of {largest:.3g}, which float32 can't hold"
    half = _dtype_name(swap.config.get("dtype")) in ("float16", "mixed_float16")
    if half and epsilon > FLOAT16_REACH:
        return f"the fit needs an epsilon of {epsilon:.3g}, too much for float16"
    for name, value in (("gamma", affine.gamma), ("beta", affine.beta)):
        broken = penalties.violation(_normalised(swap.config[f"{name}_constraint"]), value)
        if broken:
            return f"the fitted {name} would violate {name}_constraint {broken}"
    return ""


def _refuse_unconvertible(site: Site) -> None:
    if site.obstacles:
        raise _Refused(
            site.obstacles[0].code,
            "; ".join(obstacle.reason for obstacle in site.obstacles),
            f"Change how the model uses '{site.path}', or leave the layer as it is: "
            f"exclude='{site.path}'.",
        )
    if site.config.get("renorm"):
        raise _Refused(
            "renorm",
            "batch renormalization (renorm=True) has no counterpart in GroupNormalization",
            "Exclude the layer, or rebuild it with renorm=False.",
        )
    if site.config.get("virtual_batch_size"):
        raise _Refused(
            "virtual-batch-size",
            f"virtual_batch_size={site.config['virtual_batch_size']} has no counterpart in "
            "GroupNormalization",
            "Exclude the layer, or rebuild it without virtual_batch_size.",
        )
    axes = site.config.get("axis")
    if isinstance(axes, list | tuple) and len(axes) != 1:
        raise _Refused(
            "multiple-axes",
            f"it normalises the axes {list(axes)} together; GroupNormalization has one axis",
            "Exclude the layer, or rebuild it with a single axis.",
        )
    if site.channels is None or site.axis is None:
        raise _Refused(
            "unbuilt",
            "it has no weights yet, so its number of channels is unknown",
            "Call the model once on data, or build() it, before converting.",
        )
    if site.axis == 0:
        raise _Refused(
            "batch-axis",
            "it normalises axis 0, the batch; GroupNormalization works within a sample",
            "Exclude the layer.",
        )


def _choose_axis(site: Site, policy: Policy) -> tuple[int, int]:
    """The axis, counted from 0, and its size."""
    assert site.axis is not None
    assert site.channels is not None
    assert site.rank is not None
    if policy.axis == "carry":
        return site.axis, site.channels
    axis = policy.axis + site.rank if policy.axis < 0 else policy.axis
    if axis == site.axis:
        return axis, site.channels
    if policy.weights != "reset" or not 0 < axis < site.rank or site.shape[axis] is None:
        raise _Refused(
            "other-axis",
            f"axis={policy.axis} was asked for, but the layer normalises axis {site.axis} of "
            f"{site.rank}",
            "Leave axis at 'carry'; another axis of fixed size is possible with weights='reset'.",
        )
    size = site.shape[axis]
    assert size is not None
    return axis, size


def _choose_groups(site: Site, policy: Policy, channels: int) -> int:
    if policy.channels_per_group is not None:
        wanted = policy.channels_per_group
        if channels % wanted == 0:
            return channels // wanted
        asked = f"channels_per_group={wanted}"
        nearest = channels // grouping.nearest_groups(channels, wanted)
    elif policy.groups == "auto":
        return grouping.auto_groups(channels)
    elif policy.groups == -1:
        return channels
    elif channels % policy.groups == 0:
        return policy.groups
    else:
        asked = f"groups={policy.groups}"
        nearest = grouping.nearest_groups(channels, policy.groups)
    legal = _listed(grouping.legal_groups(channels))
    reason = f"{channels} channels don't divide by {asked}; legal numbers: {legal}"
    if policy.on_indivisible == "nearest":
        return nearest
    if policy.on_indivisible == "skip":
        raise _Skipped(reason)
    raise _Refused(
        "indivisible-channels",
        reason,
        "Take a legal number, groups='auto', or on_indivisible='nearest' or 'skip'.",
    )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)


def _choose_epsilon(
    site: Site, policy: Policy, statistics: Statistics | None, groups: int
) -> float:
    rule = policy.epsilon_rule
    if rule == "adaptive":
        if statistics is None or not statistics.finite or statistics.mean.size % groups:
            return moments.LEAST_ADAPTIVE_EPSILON
        return moments.adaptive_epsilon(statistics, groups, policy.adaptive_k)
    return float(site.config["epsilon"]) if rule == "carry" else float(rule)


def _switch(site: Site, policy: Policy, name: str) -> bool:
    wanted = getattr(policy, name)
    if policy.weights == "match":
        return True  # the statistics go into γ and β, whether or not BatchNormalization had them
    return bool(site.config.get(name, True)) if wanted == "carry" else bool(wanted)


def _choose_part(site: Site, policy: Policy, part: str) -> Any:
    """An initializer, regularizer or constraint as Keras deserializes it; None for none."""
    wanted = getattr(policy, part)
    default = {"beta_initializer": "zeros", "gamma_initializer": "ones"}.get(part)
    if wanted == "carry":
        return site.config.get(part, default)
    if wanted == "none":
        return default
    return wanted


def _refuse_unusable(policy: Policy, statistics: Statistics | None) -> None:
    """Refuses statistics from which nothing can be fitted."""
    if policy.weights == "reset" or statistics is None:
        return
    hint = "Exclude the layer, repair the model, or use weights='reset' for it."
    if not statistics.finite:
        raise _Refused(
            "nonfinite-weights",
            "γ, β or the moving statistics hold NaN or Inf, from which nothing can be fitted",
            hint,
        )
    if (statistics.variance < 0).any():
        least = float(statistics.variance.min())
        raise _Refused("negative-variance", f"a moving variance is negative ({least:.3g})", hint)


def _refuse_overflow(swap: Swap, statistics: Statistics, fitted: Affine) -> None:
    """Refuses what the type that the layer computes in can't hold."""
    epsilon = float(swap.config["epsilon"])
    largest = max(float(np.abs(fitted.gamma).max()), float(np.abs(fitted.beta).max()), epsilon)
    if not largest <= HUGE:
        raise _Refused(
            "overflow",
            f"the fit needs numbers of {largest:.3g}, which float32 can't hold",
            "The moving statistics are out of all proportion: repair the model, or exclude the "
            "layer.",
        )
    if _dtype_name(swap.config.get("dtype")) in ("float16", "mixed_float16"):
        _, variance = moments.group_moments(statistics, swap.groups)
        largest = float(variance.max()) + epsilon
        if largest > FLOAT16_REACH:
            raise _Refused(
                "sixteen-bit-overflow",
                f"its groups have variances of up to {largest:.3g}, and in float16 "
                "GroupNormalization can't compute with more than 65504",
                "Build the layer or the model in float32 or bfloat16, or exclude the layer.",
            )


def _refuse_degenerate(swap: Swap, policy: Policy) -> None:
    if swap.elements_per_group == 1 and not policy.allow_degenerate:
        raise _Refused(
            "degenerate-groups",
            f"{swap.groups} groups over {swap.channels} channels hold a single element per "
            "sample: the output would be β whatever the input",
            "Take fewer groups, or allow_degenerate=True if that is what you want.",
        )


def _notes(swap: Swap, statistics: Statistics | None, fitted: Affine | None) -> Iterator[Finding]:
    site, config = swap.site, swap.config

    def warn(code: str, message: str, hint: str = "") -> Finding:
        return Finding(code, "warning", site.path, message, hint)

    elements = swap.elements_per_group
    if elements is not None and elements < FEW_ELEMENTS:
        yield warn(
            "tiny-groups",
            f"a group holds only {elements} elements per sample",
            "Take fewer groups.",
        )
    if not site.trainable:
        yield warn(
            "frozen",
            "trainable=False is carried over: γ and β will stay as they are in fine-tuning",
            "Set layer.trainable = True after the swap to fine-tune them.",
        )
        if swap.weights == "reset":
            yield warn(
                "frozen-reset",
                "γ and β are reset in a layer that doesn't train",
                "Use weights='match', or set layer.trainable = True after the swap.",
            )
    if _dtype_name(site.config.get("dtype")) != _dtype_name(config.get("dtype")):
        yield Finding(
            "float32-statistics",
            "info",
            site.path,
            "computes in float32, since all that uses its output casts it",
        )
    if config["epsilon"] == 0:
        yield warn("zero-epsilon", "epsilon is 0: a constant group gives NaN", "Set epsilon.")
    if statistics is None or fitted is None:
        return
    dead = int(moments.dead_channels(statistics, float(site.config["epsilon"])).sum())
    if dead:
        yield warn(
            "dead-channels",
            f"{dead} of {swap.channels} channels were all but constant in training; "
            + ("they become the constant β" if swap.weights == "match" else "γ is copied as it is"),
        )
    negative = int((statistics.gamma < 0).sum())
    if negative:
        yield Finding(
            "negative-gamma",
            "info",
            site.path,
            f"γ is negative in {negative} of {swap.channels} channels, and stays so",
        )
    turned_on = [n for n in ("center", "scale") if config[n] and not site.config.get(n, True)]
    if turned_on and swap.weights == "match":
        yield Finding(
            "affine-turned-on",
            "info",
            site.path,
            f"{' and '.join(turned_on)} turned on, since the fit needs γ and β",
        )
    yield from _penalty_notes(swap, statistics, fitted)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype policy, given as a string or serialized."""
    if isinstance(dtype, Mapping):
        return str(dtype.get("config", {}).get("name", ""))
    return str(dtype or "float32")


def _penalty_notes(swap: Swap, statistics: Statistics, fitted: Affine) -> Iterator[Finding]:
    """Refuses a violated constraint and reports what regularizers will add."""
    before = after = 0.0
    unknown: list[str] = []
    pairs = (("gamma", fitted.gamma, "scale"), ("beta", fitted.beta, "center"))
    for name, value, switch in pairs:
        if not swap.config[switch]:
            continue
        constraint = swap.config[f"{name}_constraint"]
        carried = constraint == swap.site.config.get(f"{name}_constraint")
        broken = penalties.violation(_normalised(constraint), value)
        # BN's own values satisfy BN's own constraint, whatever it is.
        if broken and not (carried and swap.weights == "copy"):
            raise _Refused(
                "constraint-violated",
                f"the fitted {name} would violate {name}_constraint {broken}",
                f"Set {name}_constraint='none', or use weights='reset' for this layer.",
            )
        old = _normalised(swap.site.config.get(f"{name}_regularizer"))
        new = _normalised(swap.config[f"{name}_regularizer"])
        had = swap.site.config.get(switch, True)
        costs = (
            penalties.regularization_loss(old, getattr(statistics, name)) if had else 0.0,
            penalties.regularization_loss(new, value),
        )
        if None in costs:
            unknown.append(f"{name}_regularizer")
        else:
            before, after = before + (costs[0] or 0.0), after + (costs[1] or 0.0)
    if unknown:
        yield Finding(
            "regularization-unknown",
            "info",
            swap.site.path,
            f"{', '.join(unknown)} isn't one of Keras's own; its loss isn't evaluated here",
        )
    if before or after:
        yield Finding(
            "regularization-change",
            "info",
            swap.site.path,
            f"regularization loss of γ and β: {before:.6g} → {after:.6g}",
        )


NAMED = {
    "l1": {"class_name": "L1", "config": {"l1": 0.01}},
    "l2": {"class_name": "L2", "config": {"l2": 0.01}},
    "l1_l2": {"class_name": "L1L2", "config": {"l1": 0.01, "l2": 0.01}},
    "non_neg": {"class_name": "NonNeg", "config": {}},
    "unit_norm": {"class_name": "UnitNorm", "config": {}},
    "max_norm": {"class_name": "MaxNorm", "config": {"max_value": 2.0}},
    "min_max_norm": {"class_name": "MinMaxNorm", "config": {"min_value": 0.0, "max_value": 1.0}},
}


def _normalised(part: Any) -> Mapping[str, Any] | None:
    """A regularizer or constraint as a config dict; Keras also takes names."""
    if part is None or isinstance(part, Mapping):
        return part
    by_class = {str(entry["class_name"]): entry for entry in NAMED.values()}
    entry: Mapping[str, Any] = NAMED.get(part) or by_class.get(part) or {"class_name": part}
    return entry
