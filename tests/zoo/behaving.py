"""Layers of a user's own, which call BatchNormalization in every way there is."""

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block
from zoo.registry import bn, builder, on


class Branching(layers.Layer):
    """Asks of what kind its layers are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = [layers.Dense(16), bn(), layers.ReLU(), bn(), layers.Dropout(0.3)]

    def call(self, x, training=None):
        for step in self.steps:
            if isinstance(step, layers.BatchNormalization | layers.Dropout):
                x = step(x, training=training)
            else:
                x = step(x)
        return x


@builder
def branching_on_the_class():
    return on((4, 8), Branching(name="block"))


class Traced(layers.Layer):
    """A graph function of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()

    @tf.function
    def call(self, x, training=None):
        return self.norm(x, training=training)


@builder
def graph_function():
    return on((4, 16), Traced(name="block"))


class Looping(layers.Layer):
    """Control flow of the graph around a BatchNormalization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.other = bn(), bn()

    def call(self, x, training=None):
        for _ in tf.range(2):
            x = self.norm(x, training=training)
        if tf.reduce_sum(x) > 1e9:
            x = x * 2.0
        return tf.map_fn(lambda part: self.other(part, training=training), x)


@builder
def control_flow():
    return on((3, 4, 16), Looping(name="block"))


class Several(layers.Layer):
    """Several inputs, several outputs, arguments beside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = bn(), bn()

    def call(self, inputs, weight=None, training=None):
        x = self.a(inputs["x"], training=training)
        y = self.b(inputs["rest"][0] * (1.0 if weight is None else weight), training=training)
        return {"x": x, "y": [y, x + y]}


@builder
def several_arguments():
    x, y, weight = layers.Input((4, 16)), layers.Input((4, 16)), layers.Input((4, 1))
    out = Several(name="block")({"x": x, "rest": [y]}, weight=weight)
    return tf_keras.Model([x, y, weight], [out["x"], out["y"]])


class Keyword(layers.Layer):
    """Calls by name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()

    def call(self, x, training=None):
        return self.norm(inputs=x, training=training)


@builder
def called_by_name():
    return on((4, 16), Keyword(name="block"))


class Deciding(layers.Layer):
    """Fixes training itself; a layer that is only used in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.rare = bn(), bn()

    def build(self, input_shape):
        self.rare.build(input_shape)

    def call(self, x, training=None):
        x = self.norm(x, training=False)
        return self.rare(x, training=True) if training else x


@builder
def training_decided_by_the_layer():
    return on((4, 16), Deciding(name="block"))


class Penalising(layers.Layer):
    """Adds losses and metrics in its call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn(gamma_regularizer="l2")
        self.seen = tf_keras.metrics.Mean(name="seen")

    def call(self, x, training=None):
        x = self.norm(x, training=training)
        self.add_loss(tf.reduce_mean(tf.square(x)))
        self.add_metric(self.seen(x))
        return x


@builder
def losses_in_a_custom_layer():
    return on((4, 16), Penalising(name="block", activity_regularizer="l1"))


class Recomputing(layers.Layer):
    """Saves memory with a custom gradient."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()

    def call(self, x, training=None):
        @tf.custom_gradient
        def double(t):
            return t * 2.0, lambda up: up * 2.0

        return double(self.norm(x, training=training))


@builder
def custom_gradient():
    return on((4, 16), Recomputing(name="block"))


class Own(layers.Layer):
    """A graph function among its attributes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()
        self.compiled = tf.function(self.apply_norm)

    def apply_norm(self, x):
        return self.norm(x)

    def call(self, x):
        return self.compiled(x)


@builder
def graph_function_as_attribute():
    return on((4, 16), Own(name="block"))


class Straight(Block):
    """Goes around `__call__`, but passes nothing that GroupNormalization lacks."""

    def build(self, input_shape):
        self.norm.build((None, None, 16))

    def call(self, x):
        return self.norm.call(self.dense(x))


@builder
def called_straight():
    return on((4, 8), Straight(name="block"))


class Watching(layers.Layer):
    """Reads what GroupNormalization has, too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()

    def call(self, x, training=None):
        x = self.norm(x, training=training)
        return x * 1.0 if self.norm.trainable and self.norm.built else x


@builder
def common_attributes_read():
    return on((4, 16), Watching(name="block"))
