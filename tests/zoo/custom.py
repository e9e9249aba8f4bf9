"""Layers of a user's own, which hold BatchNormalization in every way there is."""

import functools

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.registry import bn, builder, on, randomize_layer


class Block(layers.Layer):
    """One attribute."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense, self.norm = layers.Dense(units), bn()

    def call(self, x, training=None):
        return tf.nn.relu(self.norm(self.dense(x), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@builder
def attribute():
    return on((4, 8), [Block(name="one"), Block(name="two")])


@builder
def custom_layer_used_twice():
    block = Block(name="block")
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, block(block(inputs)))


@builder
def custom_layer_on_other_shapes():
    norm = Passing(name="block")
    short, long = layers.Input((2, 16)), layers.Input((7, 16))
    return tf_keras.Model([short, long], [norm(short), norm(long)])


class Passing(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()

    def call(self, x):
        return self.norm(x)  # training comes from the surroundings


class Containers(layers.Layer):
    """Lists, dicts and tuples, one within another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.listed = [bn(), (bn(), [bn()])]
        self.named = {"a": bn(), "b": {"c": [bn()]}}
        self.numbered = {3: bn()}
        self.paired = (bn(), {"d": bn()})
        self.empty = []
        self.empty.append(bn())

    def call(self, x, training=None):
        for norm in (
            self.listed[0],
            self.listed[1][0],
            self.listed[1][1][0],
            self.named["a"],
            self.named["b"]["c"][0],
            self.numbered[3],
            *self.paired[:1],
            self.paired[1]["d"],
            self.empty[0],
        ):
            x = norm(x, training=training)
        return x


@builder
def containers():
    return on((4, 16), Containers(name="block"))


class Helper:
    """No layer, no module: Keras doesn't look inside."""

    __slots__ = ("__dict__", "slotted")

    def __init__(self):
        self.inner = {"norm": bn(name="hidden")}
        self.slotted = bn(name="slotted")


class Hiding(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.helper = Helper()
        self.module = tf.Module()
        self.module.norm = bn(name="in_module")
        self.bound = functools.partial(self.apply_norm, self.helper.inner["norm"])

    @staticmethod
    def apply_norm(norm, x, training):
        return norm(x, training=training)

    def call(self, x, training=None):
        x = self.bound(x, training)
        return self.module.norm(self.helper.slotted(x), training=training)


@builder
def plain_objects():
    model = on((4, 16), Hiding(name="block"))
    helper = model.get_layer("block").helper
    randomize_layer(helper.slotted)
    randomize_layer(helper.inner["norm"])
    return model


class Late(layers.Layer):
    """Makes its layers when it is built."""

    def build(self, input_shape):
        self.norms = [bn(name=f"late_{i}") for i in range(2)]
        super().build(input_shape)

    def call(self, x, training=None):
        return self.norms[1](self.norms[0](x, training=training) * 2.0, training=training)


@builder
def made_when_built():
    return on((4, 16), Late(name="block"))


class Owner:
    """Refers to layers without Keras knowing."""

    def __init__(self, *owned):
        self.owned = owned


class Remembering(layers.Layer):
    """Refers back to the model that holds it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bn()
        self.owners = None

    def call(self, x, training=None):
        return self.norm(x, training=training)


@builder
def cycle():
    model = on((4, 16), Remembering(name="block"))
    block = model.get_layer("block")
    block.owners = Owner(block, model)
    return model


class Holding(layers.Layer):
    """Holds a whole model, and custom layers within."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = tf_keras.Sequential([Block(16), layers.Dense(16), bn(name="norm")])
        self.blocks = [Block(16) for _ in range(2)]

    def call(self, x, training=None):
        x = self.net(x, training=training)
        for block in self.blocks:
            x = x + block(x, training=training)
        return x


@builder
def model_in_a_custom_layer():
    return on((4, 8), Holding(name="block"))


class Aliased(layers.Layer):
    """One object under several names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = self.same = bn()
        self.all = [self.norm, self.norm]

    def call(self, x, training=None):
        return self.all[1](self.same(x, training=training), training=training)


@builder
def aliases():
    return on((4, 16), Aliased(name="block"))


@builder
def in_a_graph_and_in_code():
    norm = bn(name="norm")
    inputs = layers.Input((4, 16))
    x = Sharing(norm, name="one")(norm(inputs))
    return tf_keras.Model(inputs, Sharing(norm, name="two")(x))


class Sharing(layers.Layer):
    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm

    def call(self, x, training=None):
        return self.norm(x, training=training) + 1.0
