"""Small models of every shape that the swap handles, each with non-trivial BN statistics.

A builder takes nothing and returns a model; `build(name)` also fills in seeded statistics and
`sample(model)` gives matching inputs.
"""

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

BUILDERS = {}
IMAGE = (8, 8, 3)


def builder(function):
    BUILDERS[function.__name__] = function
    return function


def build(name, seed=0):
    tf_keras.utils.set_random_seed(seed)
    model = BUILDERS[name]()
    randomize(model, seed)
    return model


def randomize(model, seed=0):
    """Gives every BatchNormalization seeded γ, β, mean and variance."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalizationBase) and layer.built:
            randomize_layer(layer, rng)


def randomize_layer(layer, rng=None):
    rng = rng or np.random.default_rng(0)
    size = layer.moving_mean.shape[0]
    if layer.gamma is not None:
        layer.gamma.assign(rng.normal(1.0, 0.4, size))
    if layer.beta is not None:
        layer.beta.assign(rng.normal(0.0, 0.5, size))
    layer.moving_mean.assign(rng.normal(0.0, 0.7, size))
    layer.moving_variance.assign(rng.uniform(0.3, 3.0, size))


def sample(model, batch=3, seed=1):
    """Random inputs in the structure that the model takes."""
    rng = np.random.default_rng(seed)

    def draw(tensor):
        shape = [batch, *(6 if size is None else size for size in tensor.shape[1:])]
        return tf.constant(rng.normal(size=shape).astype(np.float32))

    nested = getattr(model, "_nested_inputs", None)
    return tf.nest.map_structure(draw, model.inputs[0] if nested is None else nested)


def bn(**kwargs):
    return layers.BatchNormalization(**{"epsilon": 0.02, **kwargs})


@builder
def sequential():
    return tf_keras.Sequential(
        [layers.Input(IMAGE), layers.Conv2D(32, 3), bn(), layers.ReLU(), layers.Conv2D(4, 3)]
    )


@builder
def sequential_without_input():
    model = tf_keras.Sequential([layers.Conv2D(32, 3), bn(), layers.Flatten(), layers.Dense(2)])
    model.build((None, *IMAGE))
    return model


@builder
def batchnorm_first_and_last():
    return tf_keras.Sequential([layers.Input((8, 8, 4)), bn(name="in"), bn(name="out")])


@builder
def residual():
    inputs = x = layers.Input(IMAGE)
    x = bn(name="a")(layers.Conv2D(32, 3, padding="same", use_bias=False)(x))
    y = bn(name="b", scale=False)(layers.Conv2D(32, 3, padding="same")(tf.nn.relu(x)))
    x = layers.Add()([x, y])
    return tf_keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


@builder
def shared_layer():
    inputs = layers.Input(IMAGE)
    norm = bn(name="shared")
    x = norm(layers.Conv2D(16, 3, padding="same")(inputs))
    x = norm(tf.nn.relu(x)) + x
    return tf_keras.Model(inputs, x)


@builder
def nested():
    inner = tf_keras.Sequential(
        [layers.Input((8, 8, 16)), bn(name="norm"), layers.Conv2D(16, 1)], name="inner"
    )
    middle_in = layers.Input((8, 8, 16))
    middle = tf_keras.Model(middle_in, bn(name="norm")(inner(middle_in)), name="middle")
    inputs = layers.Input(IMAGE)
    x = middle(layers.Conv2D(16, 3, padding="same")(inputs))
    return tf_keras.Model(inputs, bn(name="norm")(x))


@builder
def nested_used_twice():
    inner = tf_keras.Sequential(
        [layers.Input((8, 8, 16)), layers.Conv2D(16, 1), bn(name="norm")], name="inner"
    )
    inputs = layers.Input((8, 8, 16))
    return tf_keras.Model(inputs, inner(tf.nn.relu(inner(inputs))))


@builder
def several_inputs_and_outputs():
    a, b = layers.Input((8, 8, 3), name="a"), layers.Input((8, 8, 5), name="b")
    x = bn(name="bn_a")(layers.Conv2D(16, 1)(a))
    y = bn(name="bn_b")(layers.Conv2D(16, 1)(b))
    joined = layers.Concatenate()([x, y])
    return tf_keras.Model([a, b], [bn(name="bn_c")(joined), layers.Flatten()(y)])


@builder
def dictionaries():
    inputs = {
        "left": layers.Input((6, 8), name="left"),
        "right": layers.Input((6, 8), name="right"),
    }
    x = bn(name="norm")(layers.Concatenate()([inputs["left"], inputs["right"]]))
    return tf_keras.Model(inputs, {"sum": layers.Dense(3)(x), "norm": x})


@builder
def training_fixed_at_the_call():
    inputs = layers.Input(IMAGE)
    x = bn(name="keyword")(layers.Conv2D(16, 3)(inputs), training=False)
    x = bn(name="positional")(layers.Conv2D(16, 3)(x), False)
    return tf_keras.Model(inputs, x)


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
def dynamic_shape():
    inputs = layers.Input((None, None, 3))
    return tf_keras.Model(inputs, bn()(layers.Conv2D(32, 3, padding="same")(inputs)))


@builder
def time_distributed():
    inputs = layers.Input((3, 8, 8, 4))
    return tf_keras.Model(inputs, layers.TimeDistributed(bn())(inputs))


@builder
def time_distributed_model():
    inner = tf_keras.Sequential([layers.Input(IMAGE), layers.Conv2D(16, 3), bn(name="norm")])
    inputs = layers.Input((3, *IMAGE))
    return tf_keras.Model(inputs, layers.TimeDistributed(inner)(inputs))


@builder
def synchronized():
    inputs = layers.Input((8, 8, 16))
    x = bn(synchronized=True)(inputs)
    return tf_keras.Model(inputs, tf_keras.layers.experimental.SyncBatchNormalization()(x))


class Renamed(layers.BatchNormalization):
    """A subclass that changes nothing of the computation."""


@builder
def harmless_subclass():
    inputs = layers.Input((8, 8, 16))
    return tf_keras.Model(inputs, Renamed(name="norm")(inputs))


@builder
def lambda_and_operators():
    inputs = layers.Input((8, 8, 16))
    x = layers.Lambda(lambda t: t * 2.0)(bn(name="norm")(inputs))
    return tf_keras.Model(inputs, tf.nn.relu(x + 1.0) / 3.0)


@builder
def depthwise():
    inputs = layers.Input((8, 8, 16))
    x = layers.ReLU(6.0)(bn(name="dw_bn")(layers.DepthwiseConv2D(3)(inputs)))
    return tf_keras.Model(inputs, bn(name="pw_bn")(layers.SeparableConv2D(24, 3)(x)))


@builder
def partly_frozen():
    model = nested()
    model.get_layer("middle").trainable = False
    return model


@builder
def adapted_normalization():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).uniform(0, 5, (10, *IMAGE)))
    return tf_keras.Sequential([layers.Input(IMAGE), normalization, layers.Conv2D(16, 3), bn()])


@builder
def recurrent():
    inputs = layers.Input((7, 4))
    x = bn(name="norm")(layers.LSTM(16, return_sequences=True)(inputs))
    return tf_keras.Model(inputs, bn()(layers.Bidirectional(layers.GRU(8))(x)))


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
def part_of_a_larger_model():
    larger = tf_keras.Sequential(
        [
            layers.Input(IMAGE),
            layers.Conv2D(16, 3),
            bn(name="in"),
            layers.Conv2D(8, 3),
            bn(name="no"),
        ]
    )
    return tf_keras.Model(larger.input, larger.get_layer("in").output)


class OwnStep(tf_keras.Model):
    def train_step(self, data):
        return {**super().train_step(data), "own": 1.0}


@builder
def own_train_step():
    inputs = layers.Input(IMAGE)
    return OwnStep(inputs, bn(name="norm")(layers.Conv2D(16, 3)(inputs)))


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


@builder
def attention():
    inputs = layers.Input((7, 16))
    x = layers.MultiHeadAttention(2, 8)(inputs, inputs)
    return tf_keras.Model(inputs, layers.LayerNormalization()(bn(name="norm")(x + inputs)))
