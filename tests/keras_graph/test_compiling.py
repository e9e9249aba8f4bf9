"""What `compile`, `fit` and `predict` left behind: carried over, or dropped where it is stale."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import layerswap as ls
import zoo


@pytest.mark.parametrize("inplace", [False, True])
def test_no_traced_function_outlives_the_swap(inplace):
    model = zoo.build("nested")  # not compiled: only the traces have to go
    inner = model.get_layer("middle")
    x, y = zoo.sample(model), zoo.sample(inner)
    model.predict(x, verbose=0)
    inner.predict(y, verbose=0)
    converted = ls.swap(model, inplace=inplace).model
    part = converted.get_layer("middle")
    np.testing.assert_allclose(converted.predict(x, verbose=0), converted(x), atol=1e-5)
    np.testing.assert_allclose(part.predict(y, verbose=0), part(y), atol=1e-5)


def slots_of(optimizer, variable):
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        return [np.asarray(optimizer.get_slot(variable, name)) for name in ("m", "v")]
    position = optimizer._index_dict[optimizer._var_key(variable)]
    return [np.asarray(s[position]) for s in (optimizer._momentums, optimizer._velocities)]


@pytest.mark.parametrize("kind", [tf_keras.optimizers.Adam, tf_keras.optimizers.legacy.Adam])
def test_slots_stay_with_their_variables(kind):
    """All kernels have one shape: only their values tell whose slots they are."""
    blocks = [(layers.Dense(16), layers.BatchNormalization()) for _ in range(3)]
    model = tf_keras.Sequential([layers.Input((16,)), *(x for block in blocks for x in block)])
    zoo.randomize(model)
    model.compile(kind(0.01), "mse")
    x = np.asarray(zoo.sample(model, 8))
    model.fit(x, tf.zeros((8, 16)), epochs=2, verbose=0)
    converted = ls.swap(model).model
    for old, new in zip(model.layers[::2], converted.layers[::2], strict=True):
        before = slots_of(model.optimizer, old.kernel)
        assert all(slot.any() for slot in before)
        np.testing.assert_array_equal(slots_of(converted.optimizer, new.kernel), before)
