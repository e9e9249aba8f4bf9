"""Subclassed models, and Functional models that are subclasses."""

import tensorflow as tf
import tf_keras
from tf_keras import layers

from zoo.custom import Block, Owner
from zoo.registry import IMAGE, bn, builder, on

ONES = tf.ones((2, 4, 16))


def called(model, *inputs):
    """The model after a first call, which builds it."""
    model(*(inputs or (ONES,)))
    return model


class Plain(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(16), bn(name="norm")

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


@builder
def subclass():
    return called(Plain())


@builder
def subclass_built_by_shape():
    model = Plain()
    model.build((None, 4, 16))
    return model


class OwnBuild(tf_keras.Model):
    def build(self, input_shape):
        self.blocks = [bn(name="first"), Block(16)]
        self.scale = self.add_weight("scale", (input_shape[-1],))
        super().build(input_shape)

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x * self.scale, training=training)
        return x


@builder
def subclass_with_own_build():
    return called(OwnBuild())


class Nesting(tf_keras.Model):
    """Holds subclassed, Functional and Sequential models."""

    def __init__(self):
        super().__init__()
        self.plain = Plain()
        self.graph = on((4, 16), [layers.Dense(16), bn(name="norm"), Block(16)])
        self.stages = [Plain(), tf_keras.Sequential([layers.Dense(16), bn()])]

    def call(self, x, training=None):
        x = self.graph(self.plain(x, training=training), training=training)
        for stage in self.stages:
            x = stage(x, training=training)
        return x


@builder
def subclass_of_everything():
    return called(Nesting())


@builder
def functional_with_subclass():
    inner = Plain(name="inner")
    inputs = layers.Input((4, 16))
    return tf_keras.Model(inputs, bn(name="norm")(inner(inner(inputs))))


@builder
def sequential_with_subclass():
    return tf_keras.Sequential([layers.Input((4, 16)), Plain(), Block(16), bn(name="norm")])


class Listed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.norms = {"a": bn(), "b": bn()}

    def call(self, inputs, training=None):
        a, b = inputs
        return [self.norms["a"](a, training=training), self.norms["b"](b, training=training)]


@builder
def subclass_with_list_inputs():
    return called(Listed(), [ONES, tf.ones((2, 5, 5, 8))])


class Named(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.other = bn(), bn()

    def call(self, inputs, training=None):
        x = self.norm(inputs["x"], training=training)
        return {"x": x, "y": self.other(inputs["y"], training=training)}


@builder
def subclass_with_dict_inputs():
    return called(Named(), {"x": ONES, "y": tf.ones((2, 32))})


class OwnStep(tf_keras.Model):
    def train_step(self, data):
        return {**super().train_step(data), "own": 1.0}


@builder
def own_train_step():
    inputs = layers.Input(IMAGE)
    return OwnStep(inputs, bn(name="norm")(layers.Conv2D(16, 3)(inputs)))


class OwnLoop(Plain):
    """Trains itself, and keeps a metric of its own."""

    def __init__(self):
        super().__init__()
        self.tracker = tf_keras.metrics.Mean(name="own_loss")

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2) + sum(self.losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.tracker.update_state(loss)
        return {"own_loss": self.tracker.result()}


@builder
def own_training_loop():
    model = called(OwnLoop())
    model.compile("adam")
    model.fit(ONES, ONES, verbose=0)
    return model


class FunctionalSubclass(tf_keras.Model):
    """Builds its graph in its constructor."""

    def __init__(self, units=16, **kwargs):
        inputs = layers.Input((4, 16))
        x = bn(name="norm")(layers.Dense(units)(inputs))
        super().__init__(inputs, x, **kwargs)


@builder
def functional_subclass():
    return FunctionalSubclass()


class FunctionalWithCall(FunctionalSubclass):
    """Adds a head to its graph in code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = bn(name="head")

    def call(self, inputs, training=None, mask=None):
        return self.head(super().call(inputs, training=training), training=training)


@builder
def functional_subclass_with_call():
    return called(FunctionalWithCall())


@builder
def functional_subclasses_nested():
    inputs = layers.Input((4, 16))
    x = FunctionalWithCall(name="with_call")(FunctionalSubclass(name="plain")(inputs))
    return tf_keras.Model(inputs, x)


class SequentialWithCall(tf_keras.Sequential):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training) + inputs


@builder
def sequential_subclass():
    return called(SequentialWithCall([layers.Dense(16), bn(name="norm")]))


class Compiled(Plain):
    """Its call is a graph function."""

    @tf.function(reduce_retracing=True)
    def call(self, x, training=None):
        return super().call(x, training=training)


@builder
def subclass_with_graph_function():
    return called(Compiled())


class Child(layers.Layer):
    def __init__(self, parent):
        super().__init__()
        self.parent, self.norm = Owner(parent), bn()

    def call(self, x, training=None):
        return self.norm(x * self.parent.owned[0].factor, training=training)


class Parent(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.factor = tf.Variable(2.0)
        self.child = Child(self)

    def call(self, x, training=None):
        return self.child(x, training=training)


@builder
def subclass_with_cycle():
    return called(Parent())


class Functions(tf_keras.Model):
    """Methods beside `call`, losses in it, an unused part."""

    def __init__(self):
        super().__init__()
        self.encoder = tf_keras.Sequential([layers.Dense(32), bn(name="norm")])
        self.decoder = Block(16)
        self.unused = layers.Dense(3)

    def encode(self, x, training=None):
        return self.encoder(x, training=training)

    def call(self, x, training=None):
        code = self.encode(x, training)
        self.add_loss(tf.reduce_mean(code**2))
        self.add_metric(tf.reduce_mean(code), name="code")
        return self.decoder(code, training=training)


@builder
def subclass_with_losses():
    return called(Functions())


class Adversaries(tf_keras.Model):
    """Two models, two optimizers, a `compile` of its own."""

    def __init__(self):
        super().__init__()
        self.generator = on((4, 16), [layers.Dense(16), bn(name="norm")])
        self.discriminator = on((4, 16), [bn(name="norm"), layers.Dense(1)])

    def compile(self, first, second):
        super().compile()
        self.first, self.second = first, second

    def call(self, x, training=None):
        return self.discriminator(self.generator(x, training=training), training=training)

    def train_step(self, data):
        x, _ = data
        parts = ((self.discriminator, self.second), (self.generator, self.first))
        for part, optimizer in parts:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(x, training=True) ** 2)
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply_gradients(zip(gradients, part.trainable_variables, strict=True))
        return {"loss": loss}


def two_optimizers():
    model = called(Adversaries())
    model.compile(tf_keras.optimizers.Adam(), tf_keras.optimizers.SGD(0.1, momentum=0.9))
    return model
