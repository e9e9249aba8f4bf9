"""Models that can only be swapped in place: something in them can't be copied."""

import threading

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block
from zoo.registry import bn, in_place, on, randomize_layer
from zoo.subclassed import Plain, called


@in_place
def loss_from_a_function():
    model = on((4, 16), [layers.Dense(16), bn(name="norm")])
    kernel = model.layers[1].kernel
    model.add_loss(lambda: 0.1 * tf.reduce_sum(kernel**2))
    return model


@in_place
def lambda_around_a_layer():
    norm = bn(name="norm")
    inputs = layers.Input((4, 16))
    norm(inputs)
    randomize_layer(norm)
    return tf_keras.Model(inputs, layers.Lambda(lambda x: norm(x))(inputs))


class Closing(Block):
    """Its function holds the layer itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.apply_norm = lambda x: self.norm(x)

    def call(self, x):
        return self.apply_norm(self.dense(x))


@in_place
def function_as_attribute():
    return on((4, 8), Closing(name="block"))


class Tracing(Block):
    """Its graph function holds the layer itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.apply_norm = tf.function(lambda x: self.norm(x))

    def call(self, x):
        return self.apply_norm(self.dense(x))


@in_place
def graph_function_that_captured():
    return on((4, 8), Tracing(name="block"))


@in_place
def lock_as_attribute():
    model = called(Plain())
    model.lock = threading.Lock()
    return model


class ClassWide(layers.Layer):
    """All objects of the class share one BatchNormalization."""

    shared = None

    def build(self, input_shape):
        type(self).shared = bn(name="shared")
        self.shared.build(input_shape)

    def call(self, x, training=None):
        return self.shared(x, training=training)


@in_place
def attribute_of_a_class():
    return on((4, 16), [ClassWide(name="block"), bn(name="norm")])


@in_place
def captured_by_a_class():
    norm = bn(name="captured")

    class Captured(layers.Layer):
        def build(self, input_shape):
            norm.build(input_shape)

        def call(self, x, training=None):
            return norm(x, training=training)

    return on((4, 16), [Captured(name="block"), bn(name="norm")])
