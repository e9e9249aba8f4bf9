"""The swap of every model in the zoo, against an oracle that runs the original in another way."""

import numpy as np
import pytest
import tensorflow as tf
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import zoo
from zoo.truth import assert_close, reachable, truth, values

GroupNorm = layers.GroupNormalization


def answer(model, x):
    """What the model answers at inference, from the beginning of a sequence."""
    if any(getattr(layer, "stateful", False) for layer in model.layers):
        model.reset_states()
    return tf.nest.map_structure(np.asarray, model(x, training=False))


def right(model, x, **fields):
    """What a swap of the model has to answer then."""
    if any(getattr(layer, "stateful", False) for layer in model.layers):
        model.reset_states()
    return truth(model, x, **fields)


def facts(layer):
    """What has to be the same in a layer and its counterpart."""
    return (
        layer.name,
        layer.trainable,
        layer.stateful,
        layer.built,
        layer._autocast,
        len(layer._inbound_nodes),
        len(layer._outbound_nodes),
        layer.activity_regularizer and layer.activity_regularizer.get_config(),
    )


def described(tensors):
    return tf.nest.map_structure(lambda t: (t.name, t.dtype, tuple(t.shape)), tensors)


def assert_carried(model, converted):
    """Names, order, flags, structure and all other weights are those of the original."""
    pairs = zip(model._flatten_layers(), converted._flatten_layers(), strict=True)
    for old, new in pairs:
        assert old is not new
        assert facts(old) == facts(new)
        if not (type(new) is GroupNorm and "16" in old.compute_dtype):  # may get float32
            assert old.dtype_policy.name == new.dtype_policy.name
        if type(new) is not GroupNorm or type(old) is GroupNorm:
            assert type(old) is type(new)
            own = zip(
                [*old._trainable_weights, *old._non_trainable_weights],
                [*new._trainable_weights, *new._non_trainable_weights],
                strict=True,
            )
            for a, b in own:
                if isinstance(a, tf.Variable):
                    assert a is not b
                    assert (a.name, a.dtype, a.trainable) == (b.name, b.dtype, b.trainable)
                    np.testing.assert_array_equal(a, b)
    for name in ("input_names", "output_names"):
        assert getattr(model, name, None) == getattr(converted, name, None)
    if getattr(model, "_is_graph_network", False):
        for name in ("input", "output"):
            assert described(getattr(model, name)) == described(getattr(converted, name))
        for layer in model.layers:
            assert type(converted.get_layer(layer.name)).__name__ in (
                type(layer).__name__,
                "GroupNormalization",
            )


def state(model):
    optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else optimizer.variables
    slots = slots() if callable(slots) else slots
    flags = [(layer.name, layer.trainable, type(layer)) for layer in model._flatten_layers()]
    return values(model), [np.asarray(v).tobytes() for v in slots], flags


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_a_copy_equals_the_oracle_and_carries_the_rest(name):
    model = zoo.build(name)
    x = zoo.sample(model)
    original = answer(model, x)
    before = state(model)
    norms = reachable(model, BatchNormalizationBase)
    used = [norm for norm in norms if norm.built]  # all but those that Bidirectional copies
    tracked = [norm for norm in used if any(norm is m for m in model.submodules)]
    stock = len(reachable(model, GroupNorm))
    expected, tolerance = right(model, x), zoo.TOLERANCES.get(name, 2e-5)

    made = ls.swap(model)

    converted = made.model
    assert made.source is model
    assert len(made.plan.swaps) == len(used)
    assert_close(answer(converted, x), expected, tolerance)
    assert batchnorm_free(converted)
    new = reachable(converted, GroupNorm)
    assert len(new) == len(norms) + stock
    assert {type(layer) for layer in new} == {GroupNorm}
    assert_carried(model, converted)
    log = made.transfer
    paths = [*log.copied, *log.fitted, *log.fresh]
    assert len(paths) == len(set(paths)) == len(values(converted))
    assert len(log.fitted) == 2 * len(tracked)
    assert log.fresh == ()
    # A step of training changes the copy alone.
    descend(converted, x)
    assert state(model) == before, "the original was changed"
    assert_close(answer(model, x), original, 0.0)
    # There is nothing left to swap.
    again = ls.swap(converted)
    assert again.plan.decisions == ()
    assert values(again.model) == values(converted)


def batchnorm_free(model):
    tracked = [m for m in model.submodules if isinstance(m, BatchNormalizationBase)]
    return not tracked and not reachable(model, BatchNormalizationBase)


def descend(model, x):
    """One step of gradient descent on the sum of all outputs squared."""
    before = [np.asarray(v) for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        outputs = [t for t in tf.nest.flatten(model(x, training=True)) if t.dtype.is_floating]
        loss = tf.add_n([tf.reduce_mean(tf.cast(t, tf.float32) ** 2) for t in outputs])
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        if gradient is not None:
            variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))
    moved = {
        id(v)
        for v, old in zip(model.trainable_variables, before, strict=True)
        if (np.asarray(v) != old).any()
    }
    for layer in reachable(model, GroupNorm):
        trained = layer.trainable_weights
        if trained and {id(v) for v in trained} <= {id(v) for v in model.trainable_variables}:
            assert moved & {id(v) for v in trained}, f"{layer.name} doesn't train"


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_other_weights_and_in_place(name):
    model = zoo.build(name)
    x = zoo.sample(model)
    tolerance = zoo.TOLERANCES.get(name, 2e-5)
    if name == "penalised":
        expected = None  # its initializers are random
    else:
        expected = right(model, x, weights="reset")
        assert_close(answer(ls.swap(model, weights="reset").model, x), expected, tolerance)
    expected = right(model, x, weights="copy", groups=1)
    norms = reachable(model, BatchNormalizationBase)

    made = ls.swap(model, weights="copy", groups=1, inplace=True)

    assert made.model is model
    assert made.source is None
    assert_close(answer(model, x), expected, tolerance)
    assert batchnorm_free(model)
    assert {type(layer) for layer in norms} <= {GroupNorm}
