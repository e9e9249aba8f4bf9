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
