"""What measurements on samples say about a model: findings, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layerswap.records import Calibration, Finding, LayerFit

# Beyond these, in standard deviations and as a factor, the moving statistics aren't taken for those
# of the samples: a judgement.
FAR_MEAN, FAR_VARIANCE = 0.5, 2.0
# A share of its output's variance that a layer gets wrong, from which on it is named.
HIGH_ERROR = 0.25
# Standard deviation by mean of a group's variance over samples, from which on it is named.
HIGH_SPREAD = 1.0


def find_problems(calibration: Calibration, paths: Iterable[str] = ()) -> Iterator[Finding]:
    """Warnings about the samples, the moving statistics and single layers.

    Args:
        calibration: what was measured.
        paths: of the layers that were to be fitted.
    """
    layers = calibration.layers
    for path in sorted({*paths} - {layer.path for layer in layers}):
        yield Finding(
            "not-calibrated",
            "warning",
            path,
            "the samples don't reach it, or it is called within a graph that can't be run line by "
            "line: it has the data-free fit",
            "Give samples that reach it, or call it outside of such a graph.",
        )
    first = layers[0] if layers else None
    if first is not None and _is_far(first):
        yield Finding(
            "samples-range",
            "warning",
            first.path,
            "the samples aren't distributed as the model's training data at the first "
            f"BatchNormalization: {_distance(first)}",
            "Preprocess them as in training (range, mean, channel order).",
        )
    else:
        for layer in layers:
            if _is_far(layer):
                yield Finding(
                    "unconverged-statistics",
                    "warning",
                    layer.path,
                    f"its moving statistics aren't those of the samples: {_distance(layer)}",
                    "Training was too short for the momentum, or the samples are of another "
                    "kind. Run the source on training data with training=True, and convert anew.",
                )
    for layer in layers:
        if layer.error >= HIGH_ERROR:
            spread = (
                f"; the variance of its groups varies by {layer.spread:.2g} times its mean "
                "from sample to sample"
                if layer.spread >= HIGH_SPREAD
                else ""
            )
            yield Finding(
                "high-drift",
                "warning",
                layer.path,
                f"with {layer.groups} groups it gets {layer.error:.0%} of its output's variance "
                f"wrong{spread}",
                "Take fewer groups, or exclude the layer.",
            )
        if layer.note:
            yield Finding(
                "fit-refused",
                "warning",
                layer.path,
                layer.note,
                "It keeps the data-free fit. A constraint goes with gamma_constraint='none' or "
                "beta_constraint='none'.",
            )
    if layers and not calibration.kept:
        yield Finding(
            "calibration-dropped",
            "info",
            "",
            "the calibrated model answers the held-out samples no better than the data-free one "
            f"(error {calibration.error_calibrated:.3g} against {calibration.error_match:.3g}), "
            "which is kept",
        )


def _is_far(layer: LayerFit) -> bool:
    ratio = layer.source_variance
    return layer.source_mean > FAR_MEAN or not 1 / FAR_VARIANCE <= ratio <= FAR_VARIANCE


def _distance(layer: LayerFit) -> str:
    return (
        f"means differ by {layer.source_mean:.2g} standard deviations, variances by a factor of "
        f"{layer.source_variance:.2g}"
    )
