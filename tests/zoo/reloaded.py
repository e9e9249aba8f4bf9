"""Models that come from files."""

import tempfile
from pathlib import Path

import tf_keras
from tf_keras import layers

from zoo.custom import Block
from zoo.registry import IMAGE, bn, builder, on, randomize
from zoo.subclassed import FunctionalSubclass, Plain, called


def reloaded(model, name, **classes):
    randomize(model, 7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        model.save(path)
        return tf_keras.models.load_model(path, custom_objects=classes)


def network():
    block = tf_keras.Sequential([layers.Conv2D(16, 3), bn(name="norm")], name="block")
    model = on(IMAGE, [block, layers.ReLU(), bn(name="last"), layers.Flatten(), layers.Dense(3)])
    model.compile("adam", "mse")
    return model


@builder
def from_keras_file():
    return reloaded(network(), "m.keras")


@builder
def from_h5_file():
    return reloaded(network(), "m.h5")


@builder
def from_saved_model():
    return reloaded(network(), "m")


@builder
def custom_from_keras_file():
    return reloaded(on((4, 8), [Block(16), bn(name="norm")]), "m.keras", Block=Block)


@builder
def custom_from_saved_model():
    return reloaded(on((4, 8), [Block(16), bn(name="norm")]), "m", Block=Block)


@builder
def subclass_from_keras_file():
    return reloaded(called(Plain()), "m.keras", Plain=Plain)


@builder
def functional_subclass_from_keras_file():
    model = FunctionalSubclass()
    return reloaded(model, "m.keras", FunctionalSubclass=FunctionalSubclass)


@builder
def from_configuration():
    model = on((4, 16), [layers.Dense(16), bn(name="norm")])
    return tf_keras.Model.from_config(model.get_config())


@builder
def from_clone():
    return tf_keras.models.clone_model(network())
