"""Models that call BatchNormalization as GroupNormalization can't be called."""

import tempfile
from pathlib import Path

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block, Sharing
from zoo.registry import bn, on, refused
from zoo.subclassed import Plain, called


@refused({"norm": "masked", "last": "masked"})
def masked():
    steps = [layers.Masking(), bn(name="norm"), layers.Dense(16), bn(name="last")]
    return on((4, 16), steps)


@refused({"time_distributed/layer": "masked"})
def masked_time_distributed():
    steps = [layers.Masking(), layers.TimeDistributed(bn(), name="time_distributed")]
    return on((4, 16), steps)


@refused({"inner/norm": "masked"})
def masked_in_a_nested_model():
    inner = tf_keras.Sequential(
        [layers.Input((4, 16)), layers.Dense(16), bn(name="norm")], name="inner"
    )
    return on((4,), [layers.Embedding(7, 16, mask_zero=True), inner], dtype="int32")


class MaskingInside(layers.Layer):
    """Makes a mask where no graph records it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masking, self.norm = layers.Masking(), bn()

    def call(self, x, training=None):
        return self.norm(self.masking(x), training=training)


@refused({"own/norm": "masked"})
def masked_in_a_custom_layer():
    return on((4, 8), MaskingInside(name="own"))


class Explicit(Block):
    def call(self, x, training=None):
        return self.norm(x, training=training, mask=tf.ones(tf.shape(x)[:2], tf.bool))


@refused({"own/norm": "masked"})
def mask_given_by_name():
    return on((4, 8), Explicit(name="own"))


class Positional(Block):
    def call(self, x, training=None):
        return self.norm(self.dense(x), training)


@refused({"own/norm": "positional-argument", "fine/norm": None})
def positional_training():
    return on((4, 8), [Positional(name="own"), Block(name="fine")])


class PlainPositional(Plain):
    def call(self, x, training=None):
        return self.norm(x, training)


@refused({"norm": "positional-argument"})
def positional_training_in_a_subclass():
    return called(PlainPositional())


class AlwaysTraining(Block):
    def call(self, x):
        return self.norm(self.dense(x), training=True)


class Direct(Block):
    """Goes around `__call__`."""

    def call(self, x, training=None):
        return self.norm.call(self.dense(x), training=training)

    def build(self, input_shape):
        self.norm.build((None, None, 16))


@refused({"own/norm": "called-directly"})
def called_directly():
    return on((4, 8), Direct(name="own"))


class Reading(Block):
    """Needs what only BatchNormalization has."""

    def call(self, x, training=None):
        x = self.norm(self.dense(x), training=training)
        return x - self.norm.moving_mean


@refused({"own/norm": "attribute-read"})
def reading_the_statistics():
    return on((4, 8), Reading(name="own"))


@refused({"training": "tensor-argument"})
def training_is_a_tensor():
    inputs, flag = layers.Input((4, 16)), layers.Input((), batch_size=1, dtype="bool")
    x = bn(name="training")(inputs, training=tf.reshape(flag, ()))
    return tf_keras.Model([inputs, flag], x)


@refused({"always": "training-fixed", "block/norm": "training-fixed"})
def training_fixed():
    inputs = layers.Input((4, 16))
    x = bn(name="always")(inputs, training=True)
    return tf_keras.Model(inputs, AlwaysTraining(name="block")(x))


@refused({"inner/norm": "training-fixed", "norm": None})
def training_fixed_for_a_nested_model():
    inner = tf_keras.Sequential([layers.Input((4, 16)), bn(name="norm")], name="inner")
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, bn(name="norm")(inner(inputs, training=True)))


@refused({"wrapped/layer": "training-fixed", "block/norm": "training-fixed"})
def training_fixed_for_a_wrapper():
    inputs = layers.Input((4, 8))
    x = layers.TimeDistributed(bn(), name="wrapped")(inputs, training=True)
    return tf_keras.Model(inputs, Block(name="block")(x, training=True))


class PositionalSharing(layers.Layer):
    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm

    def call(self, x, training=None):
        return self.norm(x, training)


@refused({"one/norm": "positional-argument"})
def shared_with_positional_code():
    norm = bn()
    inputs = layers.Input((4, 16))
    x = Sharing(norm, name="one")(inputs)
    return tf_keras.Model(inputs, PositionalSharing(norm, name="two")(x))


class CompiledPositional(PlainPositional):
    @tf.function
    def call(self, x, training=None):
        return super().call(x, training)


@refused({"norm": "positional-argument"})
def positional_training_behind_a_trace():
    model = called(CompiledPositional())
    model(tf.ones((2, 4, 16)), training=False)
    return model


@refused({"wrapped/layer/norm": "masked"})
def masked_model_in_a_wrapper():
    inner = tf_keras.Sequential([layers.Input((4, 16)), layers.Masking(), bn(name="norm")])
    inputs = layers.Input((3, 4, 16))
    return tf_keras.Model(inputs, layers.TimeDistributed(inner, name="wrapped")(inputs))


@refused({"norm": "positional-argument"})
def positional_training_after_saving():
    model = called(PlainPositional())
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "m"))
    return model
