"""Regularizers and constraints against Keras's own."""

import numpy as np
import pytest
import tf_keras

from layerswap.penalties import regularization_loss, violation

REGULARIZERS = [
    tf_keras.regularizers.L1(0.3),
    tf_keras.regularizers.L2(0.2),
    tf_keras.regularizers.L1L2(0.1, 0.4),
]
CONSTRAINTS = [
    tf_keras.constraints.NonNeg(),
    tf_keras.constraints.MaxNorm(1.5),
    tf_keras.constraints.UnitNorm(),
    tf_keras.constraints.MinMaxNorm(0.5, 1.5),
]


def plain(part):
    return {"class_name": type(part).__name__, "config": part.get_config()}


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda r: type(r).__name__)
def test_losses_are_those_of_keras(regularizer):
    weight = np.random.default_rng(0).normal(size=12)
    loss = regularization_loss(plain(regularizer), weight)
    assert loss == pytest.approx(float(regularizer(weight)), rel=1e-5)


def test_no_regularizer_costs_nothing_and_an_unknown_one_isn_t_guessed():
    assert regularization_loss(None, np.ones(3)) == 0.0
    assert regularization_loss({"class_name": "Mine", "config": {}}, np.ones(3)) is None


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("seed", range(8))
def test_a_violation_is_what_keras_would_change(constraint, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0.3 if seed % 2 else 0.0, 0.4, 6)
    if seed > 5:
        weight = np.abs(weight) / np.linalg.norm(weight)
    changed = not np.allclose(np.asarray(constraint(weight)), weight, atol=1e-5)
    assert (violation(plain(constraint), weight) is not None) == changed


def test_a_constraint_that_isn_t_stock_can_t_be_evaluated():
    assert "Mine" in violation({"class_name": "Mine", "config": {}}, np.ones(3))
    assert violation(None, np.ones(3)) is None
