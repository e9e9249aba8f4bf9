"""Wrappers: Keras's own and users'."""

import tf_keras
from tf_keras import layers

from zoo.registry import IMAGE, bn, builder, on


@builder
def time_distributed():
    inputs = layers.Input((3, 8, 8, 4))
    return tf_keras.Model(inputs, layers.TimeDistributed(bn())(inputs))


@builder
def time_distributed_twice():
    return on((2, 3, 4, 16), layers.TimeDistributed(layers.TimeDistributed(bn())))


@builder
def time_distributed_model():
    inner = tf_keras.Sequential([layers.Input(IMAGE), layers.Conv2D(16, 3), bn(name="norm")])
    inputs = layers.Input((3, *IMAGE))
    return tf_keras.Model(inputs, layers.TimeDistributed(inner)(inputs))


@builder
def time_distributed_unbuilt_model():
    inner = tf_keras.Sequential([layers.Dense(16), bn(name="norm"), layers.ReLU()])
    return on((3, 5), layers.TimeDistributed(inner))


@builder
def time_distributed_and_plain():
    """The same layer, once wrapped and once not."""
    norm = bn(name="norm")
    steps, inputs = layers.Input((3, 4, 16)), layers.Input((5, 16))
    return tf_keras.Model([steps, inputs], [layers.TimeDistributed(norm)(steps), norm(inputs)])


@builder
def time_distributed_without_shape():
    return on((None, 4, 16), layers.TimeDistributed(bn()))


class Twice(layers.Wrapper):
    """Calls what it wraps twice."""

    def call(self, inputs, training=None):
        return self.layer(self.layer(inputs, training=training), training=training)


class Again(Twice):
    """Keras names both by what they wrap, or by their class."""


@builder
def own_wrapper():
    return on((4, 16), [Twice(bn(name="norm"), name="one"), Again(layers.Dense(16))])


@builder
def own_wrapper_of_a_model():
    inner = tf_keras.Sequential([layers.Input((4, 16)), layers.Dense(16), bn(name="norm")])
    return on((4, 16), Twice(Twice(inner)))


class Passing(layers.Layer):
    """Hands on whatever arguments come."""

    def __init__(self, wrapped, **kwargs):
        super().__init__(**kwargs)
        self.wrapped = wrapped

    def call(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


@builder
def wrapper_that_hands_on_arguments():
    return on((4, 16), Passing(tf_keras.Sequential([layers.Input((4, 16)), bn(name="norm")])))
