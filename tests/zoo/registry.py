"""Collects the builders, and makes models and inputs of them."""

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

BUILDERS = {}  # name → builder of a model that can be swapped
REFUSED = {}  # name → (builder, what `swap` is asked for, {path: code})
IN_PLACE = {}  # name → builder of a model that can be swapped in place only
TOLERANCES = {}  # name → tolerance, where it isn't that of float32
IMAGE = (8, 8, 3)
WORDS = ("0", "1", "cat", "a dog", "")


def builder(function):
    """Adds a model that can be swapped."""
    BUILDERS[function.__name__] = function
    return function


def in_place(function):
    """Adds a model that can't be copied."""
    IN_PLACE[function.__name__] = function
    return function


def tolerance(value):
    """Says how far a model may be from the oracle."""

    def mark(function):
        TOLERANCES[function.__name__] = value
        return function

    return mark


def refused(codes, **fields):
    """Adds a model that is refused with `codes` (path → code), given these fields of a policy."""

    def mark(function):
        REFUSED[function.__name__] = (function, fields, codes)
        return function

    return mark


def build(name, seed=0):
    tf_keras.utils.set_random_seed(seed)
    model = (BUILDERS.get(name) or IN_PLACE.get(name) or REFUSED[name][0])()
    randomize(model, seed)
    return model


def randomize(model, seed=0):
    """Gives every BatchNormalization seeded γ, β, mean and variance."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalizationBase) and layer.built:
            randomize_layer(layer, rng)


def randomize_layer(layer, rng=None):
    rng = rng or np.random.default_rng(0)
    size = layer.moving_mean.shape
    if np.isnan(layer.moving_mean).any():
        return
    if layer.gamma is not None:
        layer.gamma.assign(rng.normal(1.0, 0.4, size))
    if layer.beta is not None:
        layer.beta.assign(rng.normal(0.0, 0.5, size))
    layer.moving_mean.assign(rng.normal(0.0, 0.7, size))
    layer.moving_variance.assign(rng.uniform(0.3, 3.0, size))


def sample(model, batch=3, seed=1):
    """Random inputs in the structure that the model takes."""
    rng = np.random.default_rng(seed)

    def draw(tensor):
        first = tensor.shape[0] or batch
        if isinstance(getattr(tensor, "type_spec", None), tf.SparseTensorSpec):
            return tf.sparse.from_dense(rng.integers(0, 2, (first, *tensor.shape[1:])).astype("f"))
        shape = [first, *(6 if size is None else size for size in tensor.shape[1:])]
        if tensor.dtype == tf.string:
            return tf.constant(rng.choice(WORDS, shape))
        if not tensor.dtype.is_floating:
            return tf.constant(rng.integers(0, 5, shape), tensor.dtype)
        return tf.constant(rng.normal(size=shape), tensor.dtype)

    nested = getattr(model, "_nested_inputs", None)
    if nested is None and model.save_spec() is None:  # built by its shape alone
        nested = tf.TensorSpec(model._build_input_shape)
    return tf.nest.map_structure(draw, model.save_spec()[0][0] if nested is None else nested)


def bn(**kwargs):
    return layers.BatchNormalization(**{"epsilon": 0.02, **kwargs})


def on(shape, layer, **kwargs):
    """A model of one layer, or several in a row."""
    x = inputs = layers.Input(shape, **kwargs)
    for each in layer if isinstance(layer, list) else [layer]:
        x = each(x)
    return tf_keras.Model(inputs, x)
