"""A class's `call` is replaced for those who ask, and for nobody else."""

import inspect
import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from layerswap.keras_graph.interception import Interception, batchnorm_calls, groupnorm_calls


class Plain(layers.Layer):
    """What is intercepted here."""

    def call(self, x, training=None):
        return x + 1.0


class Inheriting(Plain):
    """Has the `call` of its base."""


class Overriding(Plain):
    """Has its own."""

    def call(self, x, training=None):
        return x + 100.0


STOCK = vars(Plain)["call"]
X = np.zeros((2, 3), "float32")


def minus(layer, x, training=None):
    return x - 1.0


@pytest.fixture
def calls():
    yield Interception(Plain)
    assert vars(Plain)["call"] is STOCK
    assert not {"call"} & vars(Inheriting).keys()


def value(layer):
    return float(np.asarray(layer(X))[0, 0])


def test_within_the_block_the_replacement_is_called_and_afterwards_the_stock_call(calls):
    layer = Plain()
    seen = []

    def replacement(layer, x, training=None):
        seen.append((layer, training))
        return calls.stock(layer, x, training) * 2.0

    assert calls.stock is STOCK
    assert value(layer) == 1.0
    with calls.by(replacement):
        assert calls.replacement is replacement
        assert value(layer) == 2.0
        layer(X, training=True)
        assert float(layer.call(X)[0, 0]) == 2.0
    assert seen == [(layer, None), (layer, True), (layer, None)]
    assert calls.replacement is None
    assert vars(Plain)["call"] is STOCK
    assert value(layer) == 1.0


def test_subclasses_are_concerned_unless_they_have_their_own_call(calls):
    with calls.by(minus):
        assert value(Inheriting()) == -1.0
        assert value(Overriding()) == 100.0


def in_thread(function):
    """What a function returns in another thread."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_another_thread_gets_the_stock_call(calls):
    layer = Plain()
    with calls.by(minus):
        assert in_thread(lambda: value(layer)) == 1.0
        assert in_thread(lambda: calls.replacement) is None
        assert value(layer) == -1.0


def test_a_block_in_another_thread_changes_nothing_here(calls):
    layer = Plain()
    inside, leave = threading.Event(), threading.Event()

    def work():
        with calls.by(minus):
            inside.set()
            leave.wait()
            return value(layer)

    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    inside.wait()
    assert vars(Plain)["call"] is not STOCK
    assert value(layer) == 1.0
    leave.set()
    thread.join()
    assert result == [-1.0]
    assert vars(Plain)["call"] is STOCK


def test_two_threads_replace_it_differently_and_the_last_one_puts_it_back(calls):
    layer = Plain()
    # One leaves while the other stays: the class is put back by the last.
    both_in, first_out = threading.Barrier(2), threading.Event()
    found = {}

    def first():
        with calls.by(lambda layer, x, training=None: x + 10.0):
            both_in.wait()
            found["first"] = value(layer)
        first_out.set()

    def second():
        with calls.by(lambda layer, x, training=None: x + 20.0):
            both_in.wait()
            first_out.wait()
            found["second"] = value(layer)
            found["replaced"] = vars(Plain)["call"] is not STOCK

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": 10.0, "second": 20.0, "replaced": True}
    assert vars(Plain)["call"] is STOCK


def test_of_nested_blocks_the_inner_one_counts(calls):
    layer = Plain()
    with calls.by(minus):
        with calls.by(lambda layer, x, training=None: x + 5.0):
            assert value(layer) == 5.0
        assert calls.replacement is minus
        assert value(layer) == -1.0
    assert value(layer) == 1.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_ends_the_block_the_class_is_put_back(calls, error):
    layer = Plain()
    with pytest.raises(error), calls.by(minus), calls.by(minus):
        raise error
    assert vars(Plain)["call"] is STOCK
    assert calls.replacement is None
    assert value(layer) == 1.0


def test_what_the_replacement_raises_reaches_the_caller_of_the_layer(calls):
    def failing(layer, x, training=None):
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"), calls.by(failing):
        Plain()(X)
    assert vars(Plain)["call"] is STOCK


@pytest.mark.parametrize(
    ("interception", "kind"),
    [(batchnorm_calls, BatchNormalizationBase), (groupnorm_calls, layers.GroupNormalization)],
)
def test_the_signature_is_kept(interception, kind):
    stock = vars(kind)["call"]
    assert interception.stock is stock
    before = inspect.signature(kind.call), layers_see(kind)
    with interception.by(lambda layer, *args, **kwargs: args[0]):
        assert vars(kind)["call"] is not stock
        assert (inspect.signature(kind.call), layers_see(kind)) == before
        assert kind.call.__name__ == "call"
    assert vars(kind)["call"] is stock


def layers_see(kind):
    """What Keras reads off the class when a layer is made."""
    spec = kind()._call_spec
    full = spec.full_argspec
    return spec.arg_names, spec.expects_training_arg, spec.expects_mask_arg, full.args, full.varkw


def test_training_reaches_the_replacement_of_a_layer_that_was_made_within_the_block():
    seen = []

    def replacement(layer, inputs, training=None, mask=None):
        seen.append(training)
        return inputs

    with batchnorm_calls.by(replacement):
        model = tf_keras.Sequential([layers.BatchNormalization()])
        model(X, training=True)
        layers.TimeDistributed(layers.BatchNormalization())(np.zeros((2, 3, 4)), training=True)
    assert True in seen
    assert [each for each in seen if each is not None]


def test_an_own_call_of_a_layer_steps_aside_and_is_put_back(calls):
    """As Keras leaves one on a layer that was saved as a SavedModel."""
    layer, other = Plain(), Plain()

    def own(x, training=None):
        return x + 50.0

    layer.call = own
    assert value(layer) == 50.0
    with calls.by(minus, [layer, other]):
        assert value(layer) == -1.0
    assert vars(layer)["call"] is own
    assert "call" not in vars(other)
    with pytest.raises(KeyError), calls.by(minus, [layer]):
        raise KeyError
    assert vars(layer)["call"] is own
    with calls.by(minus):
        assert value(layer) == 50.0  # not named, not touched


def test_a_graph_traced_within_the_block_holds_the_replacement_and_later_ones_do_not(calls):
    layer = Plain()
    with calls.by(minus):
        traced = tf.function(lambda x: layer(x)).get_concrete_function(tf.TensorSpec((2, 3)))
    assert float(traced(tf.constant(X))[0, 0]) == -1.0
    assert float(tf.function(lambda x: layer(x))(tf.constant(X))[0, 0]) == 1.0


def test_both_norms_are_intercepted_at_once():
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    model = tf_keras.Sequential([layers.BatchNormalization(), layers.GroupNormalization(2)])
    plain = np.asarray(model(x))
    with (
        batchnorm_calls.by(lambda layer, inputs, **_: inputs * 0.0 + 3.0),
        groupnorm_calls.by(lambda layer, inputs, mask=None: inputs * 2.0),
    ):
        np.testing.assert_array_equal(model(x), np.full((2, 4), 6.0))
    np.testing.assert_array_equal(model(x), plain)
