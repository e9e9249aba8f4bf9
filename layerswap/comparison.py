"""Error metrics between the outputs of two models: parity with a runtime, drift from BN.

Outputs come as one mapping from output name to array per batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from layerswap.errors import UsageError
from layerswap.records import Array, Drift, Parity, Tolerance

Outputs = Mapping[str, Array]

DEFAULT_TOLERANCES: Mapping[str, Tolerance] = {
    "float64": Tolerance(absolute=1e-9, relative=1e-9),
    "float32": Tolerance(absolute=1e-5, relative=1e-4),
    "float16": Tolerance(absolute=2e-3, relative=1e-2),
    "bfloat16": Tolerance(absolute=1e-2, relative=4e-2),
}
"""How far a runtime may be from Keras, by the dtype that the model computes in.

The relative part is a multiple of the dtype's machine epsilon: 800 times for float32, 10 for
float16, 5 for bfloat16. Runtimes reorder sums, fuse and reassociate, so errors grow with depth
(5e-6 for a converted ResNet50), while a wrong axis, epsilon or group count shows at 1e-2 and
above; the 16-bit types have less room between the two, so their factor is small. float64 is
bounded loosely since exporters keep constants such as epsilon in float32. The absolute part
only matters to outputs that are all but zero. Integers and booleans must be equal.
"""

# Every layer rounds, not the input alone: a right export of ResNet50 was seen to differ from Keras
# by 21 times what one unit in the last place of its input changes.
_AMPLIFIED, _LOOSEST = 64, 1e-2
# Probabilities below this are taken for it: their logarithm says more of rounding than of scores.
LEAST_PROBABILITY = 1e-6
_ROUNDED_SUM = 1e-2
_EXACT = Tolerance(absolute=0.0, relative=0.0)


def tolerance_for(dtype: object) -> Tolerance:
    """The default tolerance for a model that computes in `dtype`.

    Args:
        dtype: a NumPy dtype or its name; `bfloat16` by name. Integers and booleans are exact.

    Raises:
        UsageError: there is no tolerance for such a type.
    """
    name = dtype if isinstance(dtype, str) else str(np.dtype(dtype))  # type: ignore[call-overload]
    if name in DEFAULT_TOLERANCES:
        return DEFAULT_TOLERANCES[name]
    with contextlib.suppress(TypeError):
        if np.dtype(name).kind in "biu":
            return _EXACT
    raise UsageError(f"no tolerance is known for dtype {name}", hint="Give one explicitly.")


def widened(tolerance: Tolerance, answers: Outputs, moved: Outputs) -> Tolerance:
    """The tolerance for a model that amplifies rounding.

    Deep networks with random or badly conditioned weights may turn one unit in the last place of
    their input into more than any fixed tolerance; no runtime can do better. A wrong operator is
    amplified as well, so it still shows.

    Args:
        tolerance: what holds otherwise.
        answers: the model's outputs.
        moved: its outputs where each input value is moved by one unit in the last place.

    Returns:
        The relative part at least 64 times what the move changed, up to 0.01.
    """
    changes = [_difference(moved[name], array) for name, array in answers.items()]
    change = max((_ratio(*pair) for pair in changes), default=0.0)
    if not math.isfinite(change):
        return tolerance
    relative = max(tolerance.relative, min(_AMPLIFIED * change, _LOOSEST))
    return Tolerance(tolerance.absolute, relative)


def compare_parity(
    runtime: str,
    actual: Sequence[Outputs],
    expected: Sequence[Outputs],
    tolerance: Tolerance,
    batches: Sequence[int],
) -> Parity:
    """Compares a runtime's outputs with those of the GN Keras model.

    Each output of each batch has to be there, in the same shape, finite on both sides, and
    within `absolute + relative · max|expected|`; what isn't floating point has to be equal.
    Outputs that only `actual` has are ignored.

    Args:
        runtime: the runtime's name, for the record.
        actual: the runtime's outputs, one mapping per batch.
        expected: the Keras model's outputs, in the same order.
        tolerance: applies to each output by itself.
        batches: the batch sizes, for the record.

    Returns:
        The largest errors over all outputs (infinite where an output can't be compared) and
        the output nearest to its limit, or furthest beyond.

    Raises:
        ValueError: there is nothing to compare, or the number of batches differs.
    """
    if not any(expected) or len(actual) != len(expected):
        raise ValueError(f"{len(expected)} expected batches and {len(actual)} actual ones")
    max_absolute = max_relative = 0.0
    worst, worst_output = -1.0, ""
    for ours, theirs in zip(actual, expected, strict=True):
        for name, reference in theirs.items():
            absolute, scale = _difference(ours.get(name), reference)
            allowed = tolerance if is_inexact(reference) else _EXACT
            max_absolute = max(max_absolute, absolute)
            max_relative = max(max_relative, _ratio(absolute, scale))
            strain = _ratio(absolute, allowed.absolute + allowed.relative * scale)
            if strain > worst:
                worst, worst_output = strain, name
    return Parity(
        runtime=runtime,
        max_absolute=max_absolute,
        max_relative=max_relative,
        tolerance=tolerance,
        batches=tuple(batches),
        ok=worst <= 1.0,
        worst_output=worst_output,
    )


def furthest(parities: Iterable[Parity]) -> Parity:
    """Of several parities of one artifact, the one beyond tolerance, else the least near."""
    return max(parities, key=lambda parity: (not parity.ok, parity.max_absolute))


def measure_drift(bn_outputs: Sequence[Outputs], gn_outputs: Sequence[Outputs]) -> Drift | None:
    """Measures how far the GN model's outputs are from the BN model's.

    The relative error is ‖GN − BN‖ / ‖BN‖ over all floating-point outputs, in float64;
    infinite when a value isn't finite. A score vector is a floating-point output of shape
    `(samples, K)` with K ≥ 2; samples with a value that isn't finite disagree.

    Args:
        bn_outputs: the source model's outputs, one mapping per batch.
        gn_outputs: the converted model's outputs for the same inputs.

    Returns:
        None where no output is floating point.

    Raises:
        ValueError: names, shapes or the number of batches differ.
    """
    error = norm = 0.0
    samples = compared = agreed = scored = 0
    for bn, gn in zip(bn_outputs, gn_outputs, strict=True):
        samples += _batch_size(bn)
        for name, before in bn.items():
            after = gn.get(name)
            if after is None or after.shape != before.shape:
                raise ValueError(f"the GN model lacks output {name!r} of shape {before.shape}")
            if not is_inexact(before):
                continue
            before, after = _wide(before), _wide(after)
            compared += 1
            with np.errstate(invalid="ignore", over="ignore"):  # judged by isfinite below
                error += float(np.sum(np.abs(after - before) ** 2))
                norm += float(np.sum(np.abs(before) ** 2))
            if before.ndim == 2 and before.shape[1] >= 2 and not np.iscomplexobj(before):
                finite = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
                same = before.argmax(axis=1) == after.argmax(axis=1)
                agreed += int(np.count_nonzero(same & finite))
                scored += before.shape[0]
    if not compared:
        return None
    relative = _ratio(math.sqrt(error), math.sqrt(norm)) if math.isfinite(error) else math.inf
    return Drift(
        relative_error=relative,
        argmax_agreement=agreed / scored if scored else None,
        samples=samples,
    )


def output_error(bn_outputs: Sequence[Outputs], gn_outputs: Sequence[Outputs]) -> float:
    """How much of the outputs' variance the GN model gets wrong.

    Σ(GN − BN)² / Σ(BN − mean)² of each floating-point output, in float64, averaged over the
    outputs, so that a large one doesn't drown the others. The mean is that of each feature, along
    the last axis: how features differ from each other says nothing of the input. Probabilities
    are compared as logits: where a model is sure of all samples, they hardly differ whatever was
    lost.

    Args:
        bn_outputs: the source model's outputs, one mapping per batch.
        gn_outputs: the converted model's, for the same inputs.

    Returns:
        0 where both agree; infinite where a value isn't finite.
    """
    ratios = []
    probable = probabilities(bn_outputs)
    for name, first in bn_outputs[0].items():
        if not is_inexact(first):
            continue
        before, after = (
            _features([batch[name] for batch in outputs], name in probable)
            for outputs in (bn_outputs, gn_outputs)
        )
        if not np.isfinite(after).all():
            return math.inf
        error = float(np.sum(np.abs(after - before) ** 2))
        ratios.append(_ratio(error, float(np.sum(np.abs(before - before.mean(axis=0)) ** 2))))
    return sum(ratios) / len(ratios) if ratios else 0.0


def probabilities(outputs: Sequence[Outputs]) -> set[str]:
    """The outputs that are probabilities over classes, as of a softmax.

    Args:
        outputs: one mapping per batch.
    """

    def probable(array: Array) -> bool:
        if array.ndim < 2 or array.shape[-1] < 2 or array.dtype.kind != "f":
            return False
        sums = _wide(array).sum(axis=-1)
        return bool((array >= 0).all()) and bool((np.abs(sums - 1) < _ROUNDED_SUM).all())

    return {name for name in outputs[0] if all(probable(batch[name]) for batch in outputs)}


def _features(arrays: Sequence[Array], probable: bool) -> Array:
    """All values in rows, a column for each feature."""
    rows = [
        (_logits(array) if probable else _wide(array)).reshape(-1, *array.shape[1:][-1:])
        for array in arrays
    ]
    return np.concatenate(rows)


def _logits(array: Array) -> Array:
    """What a softmax makes these probabilities of, up to a constant per sample."""
    logs = np.log(np.maximum(_wide(array), LEAST_PROBABILITY))
    centred: Array = logs - logs.mean(axis=-1, keepdims=True)
    return centred


def _difference(actual: Array | None, expected: Array) -> tuple[float, float]:
    """Largest |actual − expected| and largest |expected|; the first infinite if undefined."""
    if actual is None or np.shape(actual) != np.shape(expected):
        return math.inf, 0.0
    ours, theirs = _wide(actual), _wide(expected)
    if not is_inexact(expected) and not is_inexact(actual):
        # float64 can't tell integers above 2⁵³ apart: unequal ones differ by 1 at least.
        unequal = np.not_equal(actual, expected)
        return _largest(np.maximum(np.abs(ours - theirs), 1.0) * unequal), _largest(theirs)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf, 0.0
    return _largest(ours - theirs), _largest(theirs)


def _wide(array: Array) -> Array:
    return np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64)


def is_inexact(array: Array) -> bool:
    """Whether an output is floating point or complex: no integer, bool or text."""
    return np.asarray(array).dtype.kind not in "biuOSU"  # bfloat16 is of kind V


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 and math.isfinite(part) else math.inf


def _batch_size(outputs: Outputs) -> int:
    return next((int(array.shape[0]) for array in outputs.values() if array.ndim), 0)
