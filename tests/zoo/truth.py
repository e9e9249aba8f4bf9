"""What a swapped model has to compute, and what it may not hold: found in another way.

The oracle runs the *original* model with NumPy float64 in place of each BatchNormalization:
group sizes, epsilon and fit are derived anew from the definitions. The crawl follows Python's
own references. Neither shares code with the walk, the rules or the transfer.
"""

import contextlib
import gc
import types
import weakref

import numpy as np
import tensorflow as tf
from tf_keras import layers
from tf_keras.src.engine.keras_tensor import KerasTensor
from tf_keras.src.engine.node import Node
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import oracle


def naive_groups(channels, groups):
    if groups != "auto":
        return channels if groups == -1 else groups
    legal = [g for g in range(1, 33) if channels % g == 0 and channels // g >= 16]
    return max(legal, default=1)


def oracle_call(groups, weights):
    def call(layer, inputs, training=None, mask=None):
        x = np.asarray(inputs).astype(np.float64)
        axis = layer.axis[0]
        mean, variance = (
            np.asarray(v, np.float64) for v in (layer.moving_mean, layer.moving_variance)
        )
        gamma = np.ones_like(mean) if layer.gamma is None else np.asarray(layer.gamma, np.float64)
        beta = np.zeros_like(mean) if layer.beta is None else np.asarray(layer.beta, np.float64)
        count = naive_groups(mean.size, groups)
        epsilon = layer.epsilon
        if weights == "match":
            grouped = mean.reshape(count, -1)
            spread = (grouped - grouped.mean(1, keepdims=True)) ** 2
            epsilon = max(1e-3, 10 * (variance.reshape(count, -1) + spread).mean())
            gamma, beta = oracle.affine_match(
                gamma, beta, mean, variance, layer.epsilon, count, epsilon
            )
        if weights == "reset":
            gamma, beta = np.ones_like(mean), np.zeros_like(mean)
        out = oracle.group_norm(x, count, gamma, beta, epsilon, axis=axis)
        return tf.constant(out, inputs.dtype)

    return call


@contextlib.contextmanager
def batchnorm_as(call):
    """Within the block every BatchNormalization computes `call`, eagerly."""
    stock = BatchNormalizationBase.call
    BatchNormalizationBase.call = call
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)
        BatchNormalizationBase.call = stock


def truth(model, x, groups="auto", weights="match"):
    """What the swapped model has to answer."""
    # A layer that was saved as a SavedModel has its class's `call` as an attribute of its own.
    own = [
        (vars(layer), vars(layer).pop("call"))
        for layer in reachable(model, BatchNormalizationBase)
        if "call" in vars(layer)
    ]
    with batchnorm_as(tf.autograph.experimental.do_not_convert(oracle_call(groups, weights))):
        # TimeDistributed runs its layer in the same way whatever the batch.
        answer = tf.nest.map_structure(np.asarray, model(x, training=False))
    for attributes, call in own:
        attributes["call"] = call
    return answer


def assert_close(got, expected, tolerance=2e-5):
    got, expected = tf.nest.flatten(got), tf.nest.flatten(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        a, b = (np.asarray(each) for each in (a, b))
        assert a.shape == b.shape
        if a.dtype.kind in "biuOS":
            assert (a == b).all()
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert np.isfinite(b).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(b).max(initial=0))


def values(model):
    """Name and bits of every variable."""
    return [(v.name, np.asarray(v).tobytes()) for v in model.weights if isinstance(v, tf.Variable)]


def batchnorms(model):
    return [m for m in model.submodules if isinstance(m, BatchNormalizationBase)]


def groupnorms(model):
    return [m for m in model.submodules if isinstance(m, layers.GroupNormalization)]


# What belongs to the program rather than to a model, or leads from a part to the whole.
_OUTSIDE = (
    type,
    types.ModuleType,
    types.FrameType,
    types.BuiltinFunctionType,
    weakref.ref,
    str,
    bytes,
    int,
    float,
    np.ndarray,
    Node,
    KerasTensor,
    tf.Graph,
    tf.Tensor,
)


def reachable(model, kind):
    """Every object of a class that references lead to from a model, tracked by Keras or not."""
    found, seen, queue = [], set(), [model]
    while queue:
        item = queue.pop()
        if item is None or id(item) in seen or isinstance(item, _OUTSIDE):
            continue
        seen.add(id(item))
        if isinstance(item, kind):
            found.append(item)
        if isinstance(item, types.FunctionType):  # not its globals: they are the program's
            queue += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
        else:
            queue += gc.get_referents(item)
    return found
