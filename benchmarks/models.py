"""The networks that the benchmarks run: random weights, statistics of a seeded pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where `applications` is
UNET_SIZE = 128


def build(name: str) -> Any:
    """A BN model of `tf_keras.applications`, or `UNet` (four levels, 128 × 128 pixels)."""
    import tf_keras

    import applications

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    if name == "UNet":
        model = _unet()
    else:
        constructor = getattr(tf_keras.applications, name)
        model = constructor(weights=None, classifier_activation=None)
    applications.set_statistics(model, sample(model, 4))
    return model


def sample(model: Any, batch: int = 1) -> Any:
    """Seeded images, standard normal."""
    shape = (batch, *model.input_shape[1:])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _unet() -> Any:
    import tf_keras
    from tf_keras import layers

    def block(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    inputs = x = tf_keras.Input((UNET_SIZE, UNET_SIZE, 3))
    skips = []
    for filters in (32, 64, 128):
        x = block(x, filters)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = block(x, 256)
    for filters, skip in zip((128, 64, 32), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2, padding="same")(x)
        x = block(layers.Concatenate()([x, skip]), filters)
    return tf_keras.Model(inputs, layers.Conv2D(1, 1)(x))
