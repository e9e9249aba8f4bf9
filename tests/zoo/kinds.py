"""The classes that are BatchNormalization, and one that only bears the name."""

import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization_v1 import (
    BatchNormalization as FirstBatchNormalization,
)

from zoo.registry import bn, builder, on


@builder
def synchronized():
    inputs = layers.Input((8, 8, 16))
    x = bn(synchronized=True)(inputs)
    return tf_keras.Model(inputs, layers.experimental.SyncBatchNormalization()(x))


class Renamed(layers.BatchNormalization):
    """A subclass that changes nothing of the computation."""


@builder
def harmless_subclass():
    inputs = layers.Input((8, 8, 16))
    return tf_keras.Model(inputs, Renamed(name="norm")(inputs))


class Configured(Renamed):
    def __init__(self, note="x", **kwargs):
        super().__init__(**{"momentum": 0.8, **kwargs})
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


@builder
def subclass_with_its_own_config():
    return on((4, 16), [Configured("mine", name="norm", epsilon=0.1), bn(name="next")])


@builder
def first_version():
    return on((4, 4, 16), [FirstBatchNormalization(name="norm", epsilon=0.05), layers.Conv2D(3, 1)])


class BatchNormalization(layers.Layer):
    """Somebody else's: to be left alone."""

    def build(self, input_shape):
        self.gamma = self.add_weight("gamma", (input_shape[-1],))
        self.moving_mean = self.add_weight("moving_mean", (input_shape[-1],), trainable=False)

    def call(self, x, training=None):
        return (x - self.moving_mean) * self.gamma


@builder
def foreign_class_of_that_name():
    return on((4, 16), [BatchNormalization(name="foreign"), bn(name="norm")])


@builder
def beside_other_norms():
    others = [layers.LayerNormalization(), layers.GroupNormalization(4), layers.UnitNormalization()]
    return on((4, 16), [*others, bn(name="norm"), layers.GroupNormalization(2)])


class Statistics(layers.Layer):
    """Passes on what it is given, and counts."""

    def build(self, input_shape):
        self.count = self.add_weight("count", (), "int32", "zeros", trainable=False)

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1)
        return x + tf.cast(self.count, x.dtype)


@builder
def beside_a_counter():
    return on((4, 16), [Statistics(), bn(name="norm")])
