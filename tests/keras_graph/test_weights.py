"""The proof that copied variables are equal bit by bit."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import layerswap as ls
from layerswap.errors import TransferError
from layerswap.keras_graph import weights
from layerswap.keras_graph.copying import Twins
from layerswap.records import SwapPlan


def model():
    stack = [layers.Input((4,)), layers.Dense(2), layers.Dense(3, dtype="float16")]
    return tf_keras.Sequential(stack)


EMPTY = SwapPlan("", {}, ())


def test_nan_equals_itself():
    m = model()
    m.layers[0].bias.assign([np.nan, -0.0])
    log = weights.account(weights.snapshot(m), m, Twins(), EMPTY)
    assert len(log.copied) == 4


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, -0.0), (1.0, np.nextafter(np.float32(1), np.float32(2)))]
)
def test_one_bit_is_a_difference(before, after):
    m = model()
    m.layers[0].bias.assign([before, 0.0])
    taken = weights.snapshot(m)
    m.layers[0].bias.assign([after, 0.0])
    with pytest.raises(TransferError, match="differs"):
        weights.account(taken, m, Twins(), EMPTY)


class Labelled(layers.Layer):
    def build(self, shape):
        self.labels = self.add_weight(
            "labels",
            (2,),
            tf.string,
            initializer=lambda shape, dtype: tf.constant(["cat", "dog"]),
            trainable=False,
        )

    def call(self, x):
        return x


def test_strings_are_compared_by_value():
    inputs = layers.Input((4, 4, 32))
    m = tf_keras.Model(inputs, Labelled()(layers.BatchNormalization()(inputs)))
    swapped = ls.swap(m).model
    assert swapped.get_weights()[-1].tolist() == [b"cat", b"dog"]
