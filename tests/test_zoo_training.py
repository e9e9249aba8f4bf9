"""Models that were compiled before the swap go on training, and cached functions aren't stale."""

import numpy as np
import pytest
import tensorflow as tf
from tf_keras import layers

import layerswap as ls
import zoo
from zoo.truth import assert_close, reachable, truth

COMPILED = [
    *(name for name in zoo.BUILDERS if name.startswith("compiled_")),
    *("own_training_loop", "from_keras_file", "from_h5_file"),
]
# Each by another way of calling layers.
PREDICTED = ["predicted_before", "dictionaries", "subclass", "stacked_cells", "control_flow"]


def everything(model):
    """Bits of all weights and of what the optimizer keeps."""
    kept = model.optimizer.variables
    kept = kept() if callable(kept) else kept
    return [np.asarray(v).tobytes() for v in (*model.weights, *kept)]


def arrays(structure):
    return tf.nest.map_structure(np.asarray, structure)


@pytest.mark.parametrize("name", COMPILED)
def test_one_step_trains_the_copy_alone(name):
    model = zoo.build(name)
    x = zoo.sample(model, batch=4)
    y = tf.nest.map_structure(tf.zeros_like, model(x))
    before, steps = everything(model), int(model.optimizer.iterations)

    converted = ls.swap(model).model

    assert type(converted.optimizer) is type(model.optimizer)
    assert converted.optimizer is not model.optimizer
    assert int(converted.optimizer.iterations) == steps
    norms = reachable(converted, layers.GroupNormalization)
    old = [(np.asarray(layer.gamma), np.asarray(layer.beta)) for layer in norms]
    history = converted.fit(x, y, batch_size=4, verbose=0).history
    assert all(np.isfinite(value).all() for value in history.values())
    assert int(converted.optimizer.iterations) > steps
    for layer, (gamma, beta) in zip(norms, old, strict=True):
        moved = (np.asarray(layer.gamma) != gamma).any() or (np.asarray(layer.beta) != beta).any()
        assert moved == layer.trainable
    assert everything(model) == before


@pytest.mark.parametrize("name", PREDICTED)
def test_predictions_are_not_stale(name):
    model = zoo.build(name)
    x = arrays(zoo.sample(model))
    expected = truth(model, x)
    stale = model.predict(x, verbose=0)
    assert_close(ls.swap(model).model.predict(x, verbose=0), expected)
    assert_close(model.predict(x, verbose=0), stale, 0.0)
    assert_close(ls.swap(model, inplace=True).model.predict(x, verbose=0), expected)
