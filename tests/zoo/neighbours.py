"""What stands beside a BatchNormalization and has to stay as it is."""

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.registry import IMAGE, WORDS, bn, builder, on


@builder
def depthwise():
    inputs = layers.Input((8, 8, 16))
    x = layers.ReLU(6.0)(bn(name="dw_bn")(layers.DepthwiseConv2D(3)(inputs)))
    return tf_keras.Model(inputs, bn(name="pw_bn")(layers.SeparableConv2D(24, 3)(x)))


@builder
def adapted_normalization():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).uniform(0, 5, (10, *IMAGE)))
    return tf_keras.Sequential([layers.Input(IMAGE), normalization, layers.Conv2D(16, 3), bn()])


@builder
def given_normalization():
    steps = [layers.Rescaling(0.5, -1.0), layers.Normalization(mean=2.0, variance=3.0, axis=None)]
    return on((4, 16), [*steps, bn(name="norm")])


def embedded(lookup, shape=(4,), dtype="string"):
    return on(shape, [lookup, layers.Embedding(9, 16), bn(name="norm")], dtype=dtype)


@builder
def string_lookup():
    return embedded(layers.StringLookup(vocabulary=WORDS[:4]))


@builder
def string_lookup_adapted():
    lookup = layers.StringLookup()
    lookup.adapt(np.array([["0", "cat"], ["cat", "1"]]))
    return embedded(lookup)


@builder
def integer_lookup():
    lookup = layers.IntegerLookup()
    lookup.adapt(np.array([[1, 3], [3, 4]]))
    return embedded(lookup, dtype="int64")


@builder
def text_vectorization():
    vectorization = layers.TextVectorization(output_sequence_length=5)
    vectorization.adapt(np.array(["a dog", "cat", "a"]))
    return embedded(vectorization, shape=())


@builder
def tf_idf():
    vectorization = layers.TextVectorization(output_mode="tf_idf", max_tokens=16)
    vectorization.adapt(np.array(["a dog", "cat", "a"]))
    return on((), [vectorization, layers.Dense(16), bn(name="norm")], dtype="string")


@builder
def discretization():
    bins = layers.Discretization(num_bins=8)
    bins.adapt(np.random.default_rng(0).normal(size=(50, 1)))
    return embedded(bins, dtype="float32")


@builder
def hashing():
    return embedded(layers.Hashing(9, salt=3))


@builder
def category_encoding():
    encoding = layers.CategoryEncoding(16, output_mode="multi_hot")
    return on((3,), [encoding, layers.Dense(16), bn(name="norm")], dtype="int32")


@builder
def embedding():
    inputs = layers.Input((4,), dtype="int32")
    return tf_keras.Model(inputs, bn(name="norm")(layers.Embedding(7, 16)(inputs)))


@builder
def mask_that_ends_before():
    inner = tf_keras.Sequential([layers.Input((4, 16)), layers.Conv1D(16, 1), bn(name="norm")])
    inputs = layers.Input((4,), dtype="int32")
    return tf_keras.Model(inputs, inner(layers.Embedding(7, 16, mask_zero=True)(inputs)))


@builder
def attention():
    inputs = layers.Input((7, 16))
    x = layers.MultiHeadAttention(2, 8)(inputs, inputs)
    return tf_keras.Model(inputs, layers.LayerNormalization()(bn(name="norm")(x + inputs)))


@builder
def attention_with_arguments():
    inputs, context = layers.Input((5, 16)), layers.Input((6, 16))
    mask = tf.cast(context[:, :5, :1] > 0.0, "bool")
    mha = layers.MultiHeadAttention(2, 8)
    x, scores = mha(
        bn(name="query")(inputs),
        value=bn(name="value")(context),
        attention_mask=tf.tile(mask, [1, 1, 6]),
        return_attention_scores=True,
    )
    return tf_keras.Model([inputs, context], [bn(name="norm")(x), scores])


@builder
def tied_weights():
    inputs = layers.Input((16,))
    dense = layers.Dense(16, use_bias=False)
    x = bn(name="norm")(dense(inputs))
    other = layers.Dense(16, use_bias=False)
    other.build((None, 16))
    other._trainable_weights = []
    other.kernel = dense.kernel
    return tf_keras.Model(inputs, other(x))


class Transposed(layers.Layer):
    """Uses another layer's kernel."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def call(self, x):
        return tf.matmul(x, self.source.kernel, transpose_b=True)


@builder
def tied_through_a_layer():
    dense = layers.Dense(32)
    return on((4, 16), [dense, bn(name="norm"), Transposed(dense), bn(name="last")])


@builder
def losses_in_the_graph():
    inputs = layers.Input(IMAGE)
    x = layers.Conv2D(16, 3, activity_regularizer="l2", kernel_regularizer="l2")(inputs)
    x = bn(gamma_regularizer="l2", name="norm")(x)
    model = tf_keras.Model(inputs, x)
    model.add_loss(tf.reduce_mean(x))
    model.add_metric(tf.reduce_mean(x), name="average")
    return model


@builder
def noise():
    steps = [layers.Dropout(0.4, seed=3), layers.GaussianNoise(0.2), layers.SpatialDropout1D(0.1)]
    return on(
        (4, 16), [*steps, bn(name="norm"), layers.GaussianDropout(0.1), layers.AlphaDropout(0.1)]
    )


@builder
def augmentation():
    steps = [layers.RandomFlip(seed=1), layers.RandomRotation(0.1), layers.RandomContrast(0.2)]
    return on((6, 6, 3), [*steps, layers.Conv2D(16, 3), bn(name="norm")])


@builder
def constrained_neighbours():
    conv = layers.Conv1D(16, 2, kernel_constraint="unit_norm", bias_regularizer="l1")
    return on((4, 8), [conv, bn(name="norm"), layers.PReLU(alpha_regularizer="l2"), bn()])


@builder
def activations():
    steps = [layers.Activation("swish"), layers.LeakyReLU(0.2), layers.Softmax(), layers.ELU()]
    return on((4, 16), [layers.Dense(16, activation=tf.nn.gelu), bn(name="norm"), *steps, bn()])
