"""Distills: trains γ and β of a converted model to answer as the BN model does. No labels.

Adam on the error of the outputs; all other weights stay as they are. What is kept is the state
with the least error on held-out samples, the start included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from layerswap.comparison import (
    LEAST_PROBABILITY,
    Outputs,
    is_inexact,
    measure_drift,
    output_error,
    probabilities,
)
from layerswap.errors import TransferError, reason_of
from layerswap.keras_graph.calibrating import Say, Work, restore, state_of
from layerswap.keras_graph.running import answer, pack_inputs
from layerswap.keras_graph.serving import affine_group_norm
from layerswap.keras_graph.tracing import begin, groupnorm_call
from layerswap.records import Array, Calibration
from layerswap.samples import Arrays

# Of each value, in units of its layer (see `_Scaled`).
LEARNING_RATE = 0.03
# How often the held-out samples are looked at, and how often without a gain until it ends.
LOOKS, PATIENCE = 20, 6
SEED = 0


def distill(work: Work, calibration: Calibration, steps: int, say: Say) -> Calibration:
    """Trains γ and β of the pairs' GroupNormalization layers.

    Each step takes a batch of the samples, half of it mixed in pairs where the inputs are
    floating point: any input will do to compare two models with, and new ones keep γ and β from
    being fitted to a few. The learning rate falls to 0 along a cosine.

    Args:
        work: what was calibrated.
        calibration: what that gave; says how good the target is now.
        steps: of Adam, at most.
        say: called with "distill" and how many of how many steps are done.

    Returns:
        The calibration with what the distillation made of it. On the held-out samples it is
        never worse.

    Raises:
        TransferError: the model can't be differentiated.
    """
    names = work.outputs
    held_out = work.samples.held_out
    expected = [answer(work.source, batch, names) for batch in held_out]
    if not any(is_inexact(array) for array in expected[0].values()):
        raise TransferError(
            "the model can't be distilled: it has no floating-point output",
            hint="Leave distill at 0.",
        )
    probable = [name in probabilities(expected) for name in expected[0]]
    schedule = tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    step = _make_step(work, _Scaled(work), tf_keras.optimizers.Adam(schedule), probable)
    batches = _Batches(work.samples.fit)

    best = {path: state_of(pair.after) for path, pair in work.pairs.items()}
    error, when, misses = calibration.error, 0, 0
    outputs: Sequence[Outputs] | None = None
    every = max(1, steps // LOOKS)
    try:
        for number in range(1, steps + 1):
            say("distill", number - 1, steps)
            _run(step, batches.draw())
            if number % every and number != steps:
                continue
            answers = [answer(work.target, batch, names) for batch in held_out]
            found = output_error(expected, answers)
            misses += 1
            if found < error:
                error, when, misses, outputs = found, number, 0, answers
                best = {path: state_of(pair.after) for path, pair in work.pairs.items()}
            if misses > PATIENCE:
                break
    finally:
        restore(work, best)
    drift = calibration.drift if outputs is None else measure_drift(expected, outputs)
    return replace(calibration, error=error, drift=drift, distilled=when)


def _run(step: Any, inputs: list[Any]) -> None:
    try:
        step(inputs)
    except Exception as error:  # whatever a user's layer raises
        raise TransferError(
            f"the model can't be distilled: {reason_of(error)}", hint="Leave distill at 0."
        ) from error


class _Scaled:
    """γ and β of all layers in units of their own layer, so that one rate suits all.

    Adam moves each value by about its rate. What that does to the output depends on the layer:
    with a large epsilon what γ multiplies is small, and γ large.
    """

    def __init__(self, work: Work) -> None:
        self.variables: list[Any] = []
        self._scales: list[float] = []
        for pair in work.pairs.values():
            gamma, beta = pair.after.gamma, pair.after.beta
            self.variables += [gamma, beta]
            # BN's output has the standard deviation |γ|, in which β is counted, too.
            self._scales += [_rms(np.asarray(gamma)), _rms(pair.statistics.gamma)]
        pairs = zip(self.variables, self._scales, strict=True)
        self.units = [tf.Variable(tf.cast(v, tf.float32) / scale) for v, scale in pairs]

    def gradients(self, gradients: Sequence[Any]) -> list[tuple[Any, Any]]:
        """Those of `variables` as pairs for an optimizer of `units`."""
        given = zip(gradients, self._scales, self.units, strict=True)
        return [(tf.cast(g, tf.float32) * scale, unit) for g, scale, unit in given]

    def assign(self) -> None:
        """Sets γ and β to what the units say, within their constraints."""
        for variable, scale, unit in zip(self.variables, self._scales, self.units, strict=True):
            variable.assign(tf.cast(unit * scale, variable.dtype))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
                unit.assign(tf.cast(variable, tf.float32) / scale)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2))) or 1.0


def _make_step(work: Work, scaled: _Scaled, optimizer: Any, probable: Sequence[bool]) -> Any:
    optimizer.build(scaled.units)

    def step(inputs: Any) -> None:
        begin()
        given = pack_inputs(work.source, inputs)
        expected = tf.nest.flatten(work.source(*given, training=False))
        with tf.GradientTape() as tape:
            actual = tf.nest.flatten(work.target(*given, training=False))
            losses = [
                _loss(tf.stop_gradient(t), y, scores)
                for t, y, scores in zip(expected, actual, probable, strict=True)
                if t.dtype.is_floating
            ]
            loss = tf.add_n(losses)
        gradients = tape.gradient(loss, scaled.variables, unconnected_gradients="zero")
        optimizer.apply_gradients(scaled.gradients(gradients))
        scaled.assign()

    traced = tf.function(step, reduce_retracing=True)

    def run(inputs: Any) -> None:
        with groupnorm_call(affine_group_norm):  # half the work of the stock form
            traced(inputs)

    return run


def _loss(expected: Any, actual: Any, scores: bool) -> Any:
    """Squared error as a share of the expected variance; of probabilities, of their logits.

    Logits are what a softmax is computed from, up to a constant for each sample.
    """
    expected, actual = (tf.cast(t, tf.float32) for t in (expected, actual))
    if scores:
        expected, actual = (_logits(t) for t in (expected, actual))
    features = expected.shape[-1] if expected.shape.rank > 1 else 1
    variance = tf.math.reduce_variance(tf.reshape(expected, (-1, features)), axis=0)
    return tf.reduce_mean(tf.square(actual - expected)) / tf.maximum(
        tf.reduce_mean(variance), 1e-12
    )


def _logits(probabilities: Any) -> Any:
    logs = tf.math.log(tf.clip_by_value(probabilities, LEAST_PROBABILITY, 1.0))
    return logs - tf.reduce_mean(logs, axis=-1, keepdims=True)


class _Batches:
    """Random batches of the samples."""

    def __init__(self, given: Sequence[Arrays]) -> None:
        self._given = given
        self._rng = np.random.default_rng(SEED)
        shapes = {tuple(array.shape[1:] for array in batch.values()) for batch in given}
        self._whole: Mapping[str, Array] | None = None
        if len(shapes) == 1:
            self._whole = {n: np.concatenate([b[n] for b in given]) for n in given[0]}

    def draw(self) -> list[Any]:
        """A batch, an array for each input."""
        if self._whole is None:
            batch = self._given[int(self._rng.integers(len(self._given)))]
            return [tf.convert_to_tensor(array) for array in batch.values()]
        size = len(next(iter(self._given[0].values())))
        count = len(next(iter(self._whole.values())))
        one, other = self._rng.integers(count, size=(2, size))
        share = self._rng.uniform(size=size).astype(np.float32)
        share[::2] = 1
        arrays = [(array[one], array[other]) for array in self._whole.values()]
        if any(first.dtype.kind != "f" for first, _ in arrays):
            return [tf.convert_to_tensor(first) for first, _ in arrays]
        return [tf.convert_to_tensor(_mix(*pair, share)) for pair in arrays]


def _mix(first: Array, second: Array, share: Array) -> Array:
    share = share.reshape(-1, *[1] * (first.ndim - 1))
    mixed: Array = (share * first + (1 - share) * second).astype(first.dtype)
    return mixed
