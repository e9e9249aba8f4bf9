"""Axes, ranks, dtypes and what a BatchNormalization itself can be configured to."""

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block
from zoo.registry import bn, builder, on, tolerance


@builder
def rank_2():
    return tf_keras.Sequential(
        [layers.Input((10,)), layers.Dense(32), bn(), layers.ReLU(), layers.Dense(3)]
    )


@builder
def rank_3():
    return tf_keras.Sequential([layers.Input((12, 4)), layers.Conv1D(32, 3), bn()])


@builder
def rank_5():
    return tf_keras.Sequential([layers.Input((4, 4, 4, 2)), layers.Conv3D(32, 2), bn()])


@builder
def channels_first():
    inputs = layers.Input((16, 5, 7))
    x = bn(axis=1, name="norm")(inputs)
    return tf_keras.Model(inputs, layers.Permute((2, 3, 1))(x))


@builder
def middle_axis():
    inputs = layers.Input((5, 16, 3))
    return tf_keras.Model(inputs, bn(axis=2)(inputs))


@builder
def negative_axis():
    return on((4, 16, 3), bn(axis=-2))


@builder
def listed_axis():
    return on((4, 3, 16), bn(axis=[3]))


@builder
def axis_one_of_rank_5():
    return on((16, 2, 3, 2), bn(axis=1))


@builder
def axis_three_of_rank_5():
    return on((2, 3, 16, 2), bn(axis=3))


@builder
def axis_four():
    return on((2, 3, 2, 32), bn(axis=4))


@builder
def axis_one_of_rank_3():
    return on((16, 5), bn(axis=1))


@builder
def dynamic_shape():
    inputs = layers.Input((None, None, 3))
    return tf_keras.Model(inputs, bn()(layers.Conv2D(32, 3, padding="same")(inputs)))


@builder
def dynamic_channels_first():
    return on((16, None, None), bn(axis=1))


@builder
def one_by_one_map():
    return on((1, 1, 32), bn())


@builder
def one_channel():
    return on((5, 5, 1), bn())


@builder
def prime_channels():
    return on((5, 37), bn())


@builder
def without_scale_or_center():
    return on((4, 16), [bn(scale=False), bn(center=False), bn(scale=False, center=False)])


@builder
def penalised():
    norm = bn(
        name="norm",
        gamma_regularizer=tf_keras.regularizers.L1L2(0.1, 0.2),
        beta_regularizer="l2",
        gamma_constraint=tf_keras.constraints.MaxNorm(100.0),
        beta_constraint=tf_keras.constraints.MaxNorm(100.0),
        gamma_initializer=tf_keras.initializers.RandomUniform(0.5, 1.5, seed=3),
        beta_initializer="random_normal",
    )
    return on((4, 16), [norm, layers.Dense(16, kernel_regularizer="l1")])


@builder
def activity_regularised():
    return on((4, 16), bn(name="norm", activity_regularizer=tf_keras.regularizers.L2(0.3)))


@builder
def other_hyperparameters():
    return on((4, 16), [bn(momentum=0.5, epsilon=0.3, fused=False), bn(momentum=0.0)])


@builder
@tolerance(1e-10)
def double_precision():
    norm = bn(dtype="float64", name="norm")
    dense = layers.Dense(16, dtype="float64")
    return on((4, 16), [dense, norm, layers.ReLU(dtype="float64")], dtype="float64")


@builder
def one_layer_in_double_precision():
    norm = bn(dtype="float64", name="norm")
    return on((4, 16), [norm, layers.Dense(16, dtype="float32")])


def under(policy, layer):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        return layer()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


@builder
@tolerance(1e-2)
def mixed_float16():
    return under(
        "mixed_float16", lambda: on((4, 4, 3), [layers.Conv2D(32, 1), bn(), layers.ReLU()])
    )


@builder
@tolerance(6e-2)
def mixed_bfloat16():
    return under(
        "mixed_bfloat16", lambda: on((4, 4, 3), [layers.Conv2D(32, 1), bn(), layers.ReLU()])
    )


@builder
@tolerance(1e-2)
def one_layer_in_half_precision():
    policy = tf_keras.mixed_precision.Policy("mixed_float16")
    return on((4, 16), [layers.Dense(16), bn(dtype=policy), layers.Activation("tanh")])


@builder
def without_autocast():
    norm = bn(name="norm", autocast=False)
    return on((4, 16), [norm, layers.Dense(3)])


@builder
def integers_cast_by_the_graph():
    inputs = layers.Input((4, 16), dtype="int32")
    return tf_keras.Model(inputs, bn(name="norm")(tf.cast(inputs, "float32")))


@builder
@tolerance(1e-2)
def mixed_float16_before_an_operator():
    def make():
        inputs = layers.Input((4, 16))
        x = bn(name="norm")(layers.Dense(16)(inputs))
        y = layers.Dense(16)(inputs)
        return tf_keras.Model(inputs, bn(name="last")(x + y))

    return under("mixed_float16", make)


@builder
@tolerance(1e-2)
def mixed_float16_nested():
    def make():
        inner = tf_keras.Sequential([layers.Input((4, 16)), layers.Dense(16), bn(name="norm")])
        inputs = layers.Input((4, 16))
        x = inner(inner(inputs))
        return tf_keras.Model(inputs, layers.Dense(3)(x) + layers.TimeDistributed(bn())(x)[..., :3])

    return under("mixed_float16", make)


@builder
@tolerance(1e-2)
def mixed_float16_in_custom_code():
    return under("mixed_float16", lambda: on((4, 8), [Block(16), bn(name="norm"), Block(16)]))
