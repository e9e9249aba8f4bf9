"""Models that can't be swapped, with the reason for each layer."""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block
from zoo.graphs import residual
from zoo.refused_calls import MaskingInside
from zoo.registry import bn, on, refused
from zoo.subclassed import Plain, called


@refused({"norm": "multiple-axes"})
def several_axes():
    return on((4, 16), bn(axis=[1, 2], name="norm"))


@refused({"norm": "batch-axis"})
def axis_zero():
    inputs = layers.Input(batch_shape=(16, 4))
    return tf_keras.Model(inputs, bn(axis=0, name="norm")(inputs))


@refused({"norm": "renorm"})
def renorm():
    return on((4, 16), bn(renorm=True, name="norm"))


@refused({"norm": "virtual-batch-size"})
def virtual_batch_size():
    return on((4, 16), bn(virtual_batch_size=2, fused=False, name="norm"))


@refused({"norm": "adjustment"})
def adjustment():
    from tf_keras.src.layers.normalization.batch_normalization_v1 import BatchNormalization

    norm = BatchNormalization(name="norm", fused=False)
    norm.adjustment = lambda shape: (tf.ones((1, 1, 16)), tf.zeros((1, 1, 16)))
    return on((4, 16), norm)


class Doubling(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


class Calling(layers.BatchNormalization):
    def __call__(self, inputs, **kwargs):
        return super().__call__(inputs, **kwargs) + 1.0


class Momentless(layers.BatchNormalization):
    def _calculate_mean_and_var(self, *args, **kwargs):
        return super()._calculate_mean_and_var(*args, **kwargs)


@refused(
    {
        "call": "overridden-call",
        "dunder": "overridden-call",
        "private": "overridden-call",
        "instance": "overridden-call",
    }
)
def overridden():
    instance = bn(name="instance")
    instance.call = lambda inputs, training=None: inputs * 3.0
    overriding = [Doubling(name="call"), Calling(name="dunder"), Momentless(name="private")]
    return on((4, 16), [*overriding, instance])


@refused({"norm": "unbuilt"})
def unbuilt():
    return tf_keras.Sequential([layers.Dense(4), bn(name="norm")])


@refused({"norm": "unbuilt"})
def unbuilt_subclass():
    return Plain()


class Spare(Block):
    """Has one layer that it never calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.spare = bn()


@refused({"own/norm": None, "own/spare": "unbuilt"})
def unbuilt_part():
    return on((4, 8), Spare(name="own"))


def revived(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "m"))
        return tf_keras.models.load_model(Path(folder, "m"))


@refused({"own/norm": "revived", "norm": None})
def revived_layer():
    return revived(on((4, 8), [Block(name="own"), bn(name="norm")]))


@refused({"norm": "revived"})
def revived_model():
    return revived(called(Plain()))


class Failing(Block):
    def call(self, x, training=None):
        if not tf.executing_eagerly() and training:
            raise RuntimeError("no graph for this")
        return self.norm(self.dense(x), training=training)


@refused({"own/norm": "untraceable"})
def untraceable():
    return on((4, 8), Failing(name="own"))


@refused({"b": "nonfinite-weights", "a": None})
def not_a_number():
    model = residual()
    model.get_layer("b").moving_mean.assign(np.full(32, np.nan))
    return model


@refused({"a": "indivisible-channels", "b": "indivisible-channels"}, groups=5)
def indivisible():
    return residual()


@refused({"norm": "degenerate-groups"}, groups=-1)
def one_element_per_group():
    return on((16,), bn(name="norm"))


@refused({"norm": "constraint-violated"})
def constraint_violated():
    return on((4, 16), bn(name="norm", gamma_constraint="unit_norm"))


@refused({"two": "renorm", "inner/norm": "renorm", "fine": None, "own/norm": "masked"})
def several_at_once():
    inner = tf_keras.Sequential([layers.Input((4, 16)), bn(name="norm", renorm=True)], name="inner")
    steps = [bn(name="fine"), inner, bn(name="two", renorm=True), MaskingInside(name="own")]
    return on((4, 16), steps)
