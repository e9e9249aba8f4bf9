"""Sequential and Functional models without nesting."""

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.registry import IMAGE, bn, builder, on


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
def sequential_called():
    model = tf_keras.Sequential([layers.Dense(32), bn(), layers.Dense(2)])
    model(tf.ones((2, 5)))
    return model


@builder
def sequential_grown():
    model = tf_keras.Sequential([layers.Input((6,)), layers.Dense(32)])
    model.add(bn())
    model.add(layers.Dense(16))
    model.add(layers.ReLU())
    model.pop()
    model.add(bn(name="added"))
    return model


@builder
def only_layer():
    return on((8, 16), bn(name="norm"))


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
def shared_layer_on_other_shapes():
    norm = bn(name="shared")
    inputs = layers.Input((8, 8, 16))
    x = norm(inputs)
    y = norm(layers.MaxPool2D()(x))
    return tf_keras.Model(inputs, [x, y, norm(layers.AveragePooling2D(4)(y))])


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
def nested_structures():
    inputs = {
        "pair": [layers.Input((4, 8), name="p0"), layers.Input((4, 8), name="p1")],
        "deep": {"one": (layers.Input((4, 16), name="one"),)},
    }
    x = bn(name="norm")(layers.Concatenate()(inputs["pair"]))
    y = bn(name="other")(inputs["deep"]["one"][0])
    return tf_keras.Model(inputs, {"a": [x, (y, layers.Add()([x, y]))], "b": {"c": x}})


@builder
def outputs_that_repeat():
    inputs = layers.Input((4, 16))
    x = bn(name="norm")(inputs)
    return tf_keras.Model(inputs, [x, x, inputs, bn(name="later")(x)])


@builder
def intermediate_output():
    inputs = layers.Input(IMAGE)
    x = bn(name="features")(layers.Conv2D(16, 3)(inputs))
    y = bn(name="head")(layers.Conv2D(16, 3)(tf.nn.relu(x)))
    return tf_keras.Model(inputs, [x, layers.GlobalMaxPool2D()(y)])


@builder
def constants_as_inputs():
    inputs = layers.Input((4, 16))
    constant = tf.constant(np.random.default_rng(3).normal(size=(1, 4, 16)), tf.float32)
    x = layers.Add()([inputs, constant])
    return tf_keras.Model(inputs, bn(name="norm")(layers.Multiply()([constant, x])))


class Scale(layers.Layer):
    def call(self, x, factor, *, offset=0.0, extras=None):
        return x * factor + offset + (extras["one"] if extras else 0.0)


@builder
def call_arguments():
    inputs, factor = layers.Input((4, 16)), layers.Input((4, 1))
    x = bn(name="before")(inputs)
    x = Scale()(x, factor, offset=0.5, extras={"one": bn(name="side")(inputs)})
    x = Scale()(x, factor=factor)
    return tf_keras.Model([inputs, factor], bn(name="after")(x))


@builder
def initial_state():
    inputs, state = layers.Input((5, 4)), layers.Input((16,))
    x = layers.GRU(16, return_sequences=True)(inputs, initial_state=bn(name="state")(state))
    return tf_keras.Model([inputs, state], bn(name="norm")(x))


@builder
def training_fixed_at_the_call():
    inputs = layers.Input(IMAGE)
    x = bn(name="keyword")(layers.Conv2D(16, 3)(inputs), training=False)
    x = bn(name="positional")(layers.Conv2D(16, 3)(x), False)
    return tf_keras.Model(inputs, x)


@builder
def named_argument():
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, bn(name="norm")(inputs=inputs) * 2.0)


@builder
def lambda_and_operators():
    inputs = layers.Input((8, 8, 16))
    x = layers.Lambda(lambda t: t * 2.0)(bn(name="norm")(inputs))
    return tf_keras.Model(inputs, tf.nn.relu(x + 1.0) / 3.0)


@builder
def lambda_with_closure():
    shift, table = tf.constant(0.5), {"k": [2.0, 3.0]}
    inputs = layers.Input((8, 16))
    x = layers.Lambda(lambda t, by=3.0: t * table["k"][1] + shift * by)(inputs)
    x = layers.Lambda(lambda t, power: t**power, arguments={"power": 2})(bn(name="norm")(x))
    return tf_keras.Model(inputs, x)


@builder
def slices():
    inputs = layers.Input((6, 7, 16))
    x = bn(name="norm")(inputs)
    y = x[:, 1:, ..., :8] - x[:, :-1, ..., 8:]
    size = tf.shape(y)[1]
    return tf_keras.Model(inputs, bn(name="other")(y[:, : size - 1, tf.newaxis]))


@builder
def tensor_functions():
    inputs = layers.Input((6, 16))
    one, two = tf.split(bn(name="norm")(inputs), 2, axis=-1)
    x = tf.concat([tf.where(one > 0.0, one, tf.zeros_like(one)), two], axis=-1)
    x = tf.reshape(x, [tf.shape(x)[0], 3, 2, 16])
    x = tf.linalg.matmul(bn(name="other")(x), x, transpose_b=True)
    return tf_keras.Model(inputs, [tf.reduce_mean(x, axis=[1, 2]), 1.0 - abs(x)])


@builder
def fixed_batch():
    inputs = layers.Input(batch_shape=(2, 4, 16))
    return tf_keras.Model(inputs, bn(name="norm")(inputs))


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


@builder
def middle_of_a_larger_model():
    inputs = layers.Input((4, 16))
    x = layers.Dense(16)(bn(name="before")(inputs))
    y = bn(name="inside")(x)
    bn(name="after")(y)
    return tf_keras.Model(x, y)


@builder
def held_by_two_models():
    inputs = layers.Input((4, 16))
    norm = bn(name="norm")
    other_inputs = layers.Input((5, 16))
    tf_keras.Model(other_inputs, norm(other_inputs), name="the_other")
    return tf_keras.Model(inputs, norm(layers.Dense(16)(inputs)))


@builder
def many_in_a_row():
    return on((4, 16), [bn(name=f"norm_{i}") for i in range(12)])


@builder
def odd_names():
    return on((4, 16), [bn(name="norm.1"), bn(name="norm-2"), bn(name="Norm")])


@builder
def sparse_input():
    inputs = layers.Input((16,), sparse=True)
    return tf_keras.Model(inputs, bn(name="norm")(layers.Dense(16)(inputs)))
