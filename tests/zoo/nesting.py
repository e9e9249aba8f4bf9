"""Graphs within graphs, and layers that several of them use."""

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.registry import IMAGE, bn, builder


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
def four_deep():
    model = None
    for depth in range(4):
        inputs = layers.Input((4, 16))
        x = layers.Dense(16)(inputs) if model is None else model(inputs)
        x = bn(name=f"norm_{depth}")(x)
        if depth % 2:
            model = tf_keras.Model(inputs, tf.nn.relu(x) + inputs, name=f"level_{depth}")
        else:
            model = tf_keras.Sequential(
                [tf_keras.Model(inputs, x), layers.Dense(16)], name=f"level_{depth}"
            )
            model.build((None, 4, 16))
    return model


@builder
def nested_used_twice():
    inner = tf_keras.Sequential(
        [layers.Input((8, 8, 16)), layers.Conv2D(16, 1), bn(name="norm")], name="inner"
    )
    inputs = layers.Input((8, 8, 16))
    return tf_keras.Model(inputs, inner(tf.nn.relu(inner(inputs))))


@builder
def siamese():
    inner = tf_keras.Sequential([layers.Dense(16), bn(name="norm")], name="twin")
    a, b = layers.Input((5,)), layers.Input((5,))
    return tf_keras.Model([a, b], layers.Dot(1)([inner(a), inner(b)]))


@builder
def shared_by_two_parents():
    norm, dense = bn(name="norm"), layers.Dense(16)
    one_in, two_in = layers.Input((4, 16)), layers.Input((4, 16))
    one = tf_keras.Model(one_in, norm(dense(one_in)), name="one")
    two = tf_keras.Model(two_in, dense(norm(two_in)), name="two")
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, [two(one(inputs)), norm(inputs), one(inputs)])


@builder
def model_shared_by_two_parents():
    inner = tf_keras.Sequential([layers.Input((4, 16)), bn(name="norm")], name="core")
    one = tf_keras.Sequential([layers.Input((4, 16)), layers.Dense(16), inner], name="one")
    two = tf_keras.Sequential([layers.Input((4, 16)), inner, bn(name="norm")], name="two")
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, two(one(inputs)) + inner(inputs))


@builder
def nested_with_structures():
    a, b = layers.Input((4, 16), name="a"), layers.Input((4, 16), name="b")
    inner = tf_keras.Model(
        {"a": a, "b": b}, {"sum": bn(name="norm")(a + b), "rest": [b, bn(name="n2")(a)]}
    )
    one, two = layers.Input((4, 16)), layers.Input((4, 16))
    first = inner({"a": one, "b": two})
    second = inner({"a": first["rest"][1], "b": first["sum"]})
    return tf_keras.Model([one, two], [first["sum"], second])


@builder
def nested_training_fixed():
    inner = tf_keras.Sequential(
        [layers.Input((4, 16)), layers.Dense(16), bn(name="norm"), layers.Dropout(0.5)]
    )
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, inner(inputs, training=False))


@builder
def nested_part():
    """An inner model whose inputs lie in the middle of a graph."""
    inputs = layers.Input((4, 16))
    x = layers.Dense(16)(inputs)
    y = bn(name="norm")(x)
    inner = tf_keras.Model(x, y, name="part")
    return tf_keras.Model(inputs, inner(y) + bn(name="last")(y))


@builder
def nested_on_other_shapes():
    inner = tf_keras.Sequential(
        [layers.Input((None, None, 3)), layers.Conv2D(16, 1), bn(name="norm")], name="inner"
    )
    large, small = layers.Input((8, 8, 3)), layers.Input((4, 6, 3))
    return tf_keras.Model([large, small], [inner(large), inner(small)])


@builder
def sequential_of_sequentials():
    return tf_keras.Sequential(
        [
            layers.Input((6,)),
            tf_keras.Sequential([layers.Dense(32), bn(name="norm")], name="one"),
            tf_keras.Sequential([tf_keras.Sequential([bn(name="norm")], name="x")], name="two"),
        ]
    )


@builder
def partly_frozen():
    model = nested()
    model.get_layer("middle").trainable = False
    return model


@builder
def frozen_here_and_there():
    model = four_deep()
    model.trainable = False
    model.trainable = True
    for index, layer in enumerate(model._flatten_layers(recursive=True, include_self=False)):
        if index % 3 == 1 and not isinstance(layer, tf_keras.Model):
            layer.trainable = False
    return model


@builder
def wholly_frozen():
    model = siamese()
    model.trainable = False
    return model


@builder
def encoder_and_decoder():
    inputs = layers.Input((6,))
    encoder = tf_keras.Model(inputs, bn(name="norm")(layers.Dense(32)(inputs)), name="encoder")
    code = layers.Input((32,))
    decoder = tf_keras.Model(code, layers.Dense(6)(bn(name="norm")(code)), name="decoder")
    return tf_keras.Model(encoder.input, decoder(encoder.output), name="autoencoder")
