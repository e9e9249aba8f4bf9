"""Keras's stock regularizers and constraints on a vector, from their serialized config.

They are evaluated here, in NumPy, so that a plan can say before anything is changed what a
fitted γ or β would cost or violate, without TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layerswap.records import Float64

# Fitted values are written as float32: a constraint counts as violated only beyond its rounding.
SLACK = 1e-6
KERAS_EPSILON = 1e-7


def regularization_loss(regularizer: Mapping[str, Any] | None, weight: Float64) -> float | None:
    """The loss that a serialized `L1`, `L2` or `L1L2` adds for `weight`.

    Returns:
        0.0 without a regularizer; None for a class that isn't stock.
    """
    if regularizer is None:
        return 0.0
    config = regularizer.get("config", {})
    if regularizer.get("class_name") not in ("L1", "L2", "L1L2"):
        return None
    l1, l2 = float(config.get("l1", 0.0)), float(config.get("l2", 0.0))
    return l1 * float(np.abs(weight).sum()) + l2 * float((weight**2).sum())


def violation(constraint: Mapping[str, Any] | None, weight: Float64) -> str | None:
    """Says how `weight` violates a serialized constraint, or None where it doesn't.

    A constraint that isn't stock can't be evaluated here; that is said, too.
    """
    if constraint is None:
        return None
    name = str(constraint.get("class_name"))
    config: Mapping[str, Any] = constraint.get("config", {})  # with Keras's defaults where it lacks
    norm = float(np.sqrt((weight**2).sum()))
    if name == "NonNeg":
        broken = float(weight.min()) < -SLACK
        return f"NonNeg, but the smallest value is {weight.min():.6g}" if broken else None
    if name == "MaxNorm":
        most = float(config.get("max_value", 2.0))
        return f"MaxNorm({most:g}), but the norm is {norm:.6g}" if _above(norm, most) else None
    if name == "UnitNorm":
        broken = abs(norm - 1.0) > SLACK + KERAS_EPSILON
        return f"UnitNorm, but the norm is {norm:.6g}" if broken else None
    if name == "MinMaxNorm":
        least, most = float(config.get("min_value", 0.0)), float(config.get("max_value", 1.0))
        broken = _above(norm, most) or _above(least, norm)
        return f"MinMaxNorm({least:g}, {most:g}), but the norm is {norm:.6g}" if broken else None
    return f"{name}, which isn't one of Keras's own and can't be evaluated"


def _above(value: float, bound: float) -> bool:
    return value > bound * (1 + SLACK) + SLACK
