"""Models that were compiled, and mostly trained, before the swap."""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.registry import bn, builder, on

RNG = np.random.default_rng(5)


def fitted(model, *targets, shape=(4, 16), **kwargs):
    x = np.random.default_rng(5).normal(size=(4, *shape)).astype("float32")
    model.fit(x, targets[0] if targets else np.zeros((4, 3)), verbose=0, **kwargs)
    return model


def network(**kwargs):
    return on(
        (4, 16), [layers.Dense(16), bn(name="norm", **kwargs), layers.Flatten(), layers.Dense(3)]
    )


@builder
def compiled_and_fitted():
    model = network()
    model.compile("adam", "mse", metrics=["mae"])
    return fitted(model)


@builder
def compiled_with_momentum():
    model = network(gamma_regularizer="l2")
    rate = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    optimizer = tf_keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, clipnorm=1.0)
    model.compile(optimizer, tf_keras.losses.Huber())
    return fitted(model)


@builder
def compiled_with_averages():
    model = network()
    model.compile(tf_keras.optimizers.AdamW(1e-3, use_ema=True, ema_momentum=0.5), "mae")
    return fitted(model)


@builder
def compiled_with_legacy_optimizer():
    model = network()
    model.compile(tf_keras.optimizers.legacy.RMSprop(0.01, momentum=0.5), "mse")
    return fitted(model)


@builder
def compiled_by_dictionaries():
    inputs = layers.Input((4, 16))
    x = bn(name="norm")(layers.Dense(16)(inputs))
    outputs = {
        "one": layers.Dense(3, name="one")(layers.Flatten()(x)),
        "two": layers.Dense(2, name="two", activation="softmax")(x),
    }
    model = tf_keras.Model(inputs, outputs)
    model.compile(
        "rmsprop",
        loss={"one": "mse", "two": tf_keras.losses.CategoricalCrossentropy()},
        loss_weights={"one": 0.3, "two": 2.0},
        metrics={"one": ["mae"], "two": [tf_keras.metrics.CategoricalAccuracy(name="hits")]},
        weighted_metrics={"two": "mse"},
    )
    return fitted(model, {"one": np.zeros((4, 3)), "two": np.ones((4, 4, 2))})


def own_loss(y, p):
    return tf.reduce_mean(tf.abs(y - p) ** 1.5)


@builder
def compiled_with_functions():
    model = network()
    model.compile("sgd", own_loss, metrics=[own_loss], run_eagerly=True)
    return fitted(model)


@builder
def compiled_with_several_steps():
    model = network()
    model.compile("adagrad", "mse", steps_per_execution=2)
    return fitted(model, batch_size=2)


@builder
def compiled_while_frozen():
    model = network()
    model.layers[1].trainable = False
    model.compile("adam", "mse")
    fitted(model)
    model.layers[1].trainable = True
    return model


@builder
def compiled_parts():
    """An inner model that is compiled for itself."""
    inner = on((4, 16), [layers.Dense(16), bn(name="norm")])
    inner.compile("adam", "mse")
    inner.fit(np.ones((4, 4, 16)), np.ones((4, 4, 16)), verbose=0)
    model = on((4, 16), [inner, bn(name="outer")])
    model.compile("sgd", "mse")
    return model


@builder
def predicted_before():
    model = network()
    model.predict(np.ones((2, 4, 16)), verbose=0)
    return model


@builder
def compiled_and_saved():
    """Keras leaves traces of having saved a model on its layers."""
    model = network()
    model.compile("adam", "mse")
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "m"))
        model.save(Path(folder, "m.keras"))
    return model
