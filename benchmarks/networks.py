"""The networks of the accuracy benchmark: data, architectures and recipes of training.

All data comes with scikit-learn or is made here. A seed decides the split or the draw of the data,
the initial weights and the order of training. Nothing here was changed after the first conversion
was measured.

`REPORTED_SEEDS` make the published tables. Whatever the library chooses by default (epsilon, steps,
learning rates) was chosen on `DEVELOPMENT_SEEDS`, which are reported nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPORTED_SEEDS = (1, 2, 3)
DEVELOPMENT_SEEDS = (11, 12)

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs and targets, to train with and held out."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


@dataclass(frozen=True, slots=True)
class Network:
    """One entry of the benchmark.

    Attributes:
        build: gives the untrained BN model.
        data: the data for a seed.
        epochs, rate, batch: of training with Adam, the rate falling to 0 along a cosine.
        hard: a case that GroupNormalization is known to be bad at, reported apart.
        regression: scored by R² instead of accuracy.
    """

    build: Callable[[], Any]
    data: Callable[[int], Data]
    epochs: int = 20
    rate: float = 2e-3
    batch: int = 64
    hard: bool = False
    regression: bool = False

    @property
    def loss(self) -> str:
        """Keras's name of the loss."""
        return "mse" if self.regression else "sparse_categorical_crossentropy"


# Data


def digits(seed: int, scale: int = 1) -> Data:
    """scikit-learn's 1797 handwritten digits, 500 of them held out; (8·scale, 8·scale, 1)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x = x.repeat(scale, axis=1).repeat(scale, axis=2)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:-500], order[-500:]
    return Data(x[train], y[train], x[test], y[test])


def flat_digits(seed: int) -> Data:
    """The same, 64 values each."""
    data = digits(seed)
    flat = [x.reshape(len(x), -1) for x in (data.x_train, data.x_test)]
    return Data(flat[0], data.y_train, flat[1], data.y_test)


def patches(seed: int, size: int = 32) -> Data:
    """Patches of scikit-learn's two sample images; the input has noise, the target none."""
    import sklearn.datasets
    import tensorflow as tf

    folder = Path(sklearn.datasets.__file__).parent / "images"
    images = [
        np.asarray(tf.io.decode_jpeg((folder / name).read_bytes()), np.float32) / 255
        for name in ("china.jpg", "flower.jpg")
    ]
    rng = np.random.default_rng(seed)

    def draw(count: int, lower: bool) -> tuple[Array, Array]:
        clean = np.empty((count, size, size, 3), np.float32)
        for index in range(count):
            image = images[index % 2]
            height, width, _ = image.shape
            # Held-out patches come from the right third of each image, the others from the rest.
            border = width * 2 // 3
            low, high = (0, border - size) if lower else (border, width - size)
            top, left = rng.integers(0, height - size), rng.integers(low, high)
            clean[index] = image[top : top + size, left : left + size]
        noisy = clean + rng.normal(0, 0.15, clean.shape).astype(np.float32)
        return noisy, clean

    return Data(*draw(1200, True), *draw(400, False))


def waves(seed: int, gain: bool = False) -> Data:
    """Six shapes of wave, 128 steps, two channels with a phase between them, and noise.

    Args:
        seed: of the draw.
        gain: every sample is multiplied by its own factor, 0.1 to 10, the noise before it.
    """
    rng = np.random.default_rng(seed)
    count, steps = 2000, 128
    y = rng.integers(0, 6, count)
    time = np.arange(steps) / steps
    phase = 2 * np.pi * (rng.uniform(2, 9, (count, 1)) * time + rng.uniform(0, 1, (count, 1)))
    shift = rng.uniform(0, np.pi, (count, 1))
    x = np.stack([_wave(y, phase), _wave(y, phase + shift)], axis=2)
    x += rng.normal(0, 0.6, x.shape)
    if gain:
        x *= 10 ** rng.uniform(-1, 1, (count, 1, 1))
    x = x.astype(np.float32)
    return Data(x[:1300], y[:1300], x[1300:], y[1300:])


def _wave(kind: Array, phase: Array) -> Array:
    saw = (phase / np.pi) % 2 - 1
    shapes = np.stack(
        [
            np.sin(phase),
            np.sign(np.sin(phase)),
            saw,
            -saw,
            2 * np.abs(saw) - 1,
            np.sin(phase) ** 3 * 1.5,
        ]
    )
    result: Array = shapes[kind, np.arange(len(kind))]
    return result


def clips(seed: int) -> Data:
    """A blob that moves over 8 frames of 12×12, in one of six directions of space or size."""
    rng = np.random.default_rng(seed)
    count, frames, size = 1600, 8, 12
    y = rng.integers(0, 6, count)
    moves = np.array([[0, 1], [0, -1], [1, 0], [-1, 0], [0, 0], [0, 0]])
    grows = np.array([0, 0, 0, 0, 1, -1])
    time = (np.arange(frames) - (frames - 1) / 2)[None]
    speed = rng.uniform(0.15, 0.6, (count, 1))
    centre = rng.uniform(4, 8, (count, 2))
    where = [centre[:, i : i + 1] + moves[y, i][:, None] * speed * time for i in (0, 1)]
    width = 1.8 * np.exp(0.12 * grows[y][:, None] * speed / 0.4 * time)
    grid = np.arange(size)
    squares = [(grid - w[:, :, None]) ** 2 / (2 * width[:, :, None] ** 2) for w in where]
    x = np.exp(-(squares[0][:, :, :, None] + squares[1][:, :, None, :]))
    x = (x + rng.normal(0, 0.55, x.shape))[..., None].astype(np.float32)
    return Data(x[:1100], y[:1100], x[1100:], y[1100:])


# Architectures


def batch_norm(x: Any) -> Any:
    """BN whose moving statistics converge within the few hundred steps that training takes."""
    from tf_keras import layers

    return layers.BatchNormalization(momentum=0.9)(x)


def residual(size: int = 16, widths: tuple[int, ...] = (32, 64, 128)) -> Any:
    """Basic blocks as in ResNet-18: BN after each convolution, a projection where it shrinks."""
    from tf_keras import Model, layers

    def conv(x: Any, width: int, kernel: int, stride: int) -> Any:
        return layers.Conv2D(width, kernel, stride, "same", use_bias=False)(x)

    inputs = layers.Input((size, size, 1))
    x = layers.ReLU()(batch_norm(conv(inputs, widths[0], 3, 1)))
    for index, width in enumerate(widths):
        for block in range(2):
            stride = 2 if index and not block else 1
            y = layers.ReLU()(batch_norm(conv(x, width, 3, stride)))
            y = batch_norm(conv(y, width, 3, 1))
            if stride > 1:
                x = batch_norm(conv(x, width, 1, stride))
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(10, "softmax")(x), name="residual")


def depthwise() -> Any:
    """Inverted residuals as in MobileNetV2: depthwise convolutions, ReLU6, linear bottlenecks."""
    from tf_keras import Model, layers

    def normal(x: Any) -> Any:
        return layers.ReLU(6.0)(batch_norm(x))

    inputs = layers.Input((16, 16, 1))
    x = normal(layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs))
    for width, stride in ((16, 1), (24, 2), (24, 1), (48, 2), (48, 1), (64, 1)):
        y = normal(layers.Conv2D(4 * x.shape[-1], 1, use_bias=False)(x))
        y = normal(layers.DepthwiseConv2D(3, stride, "same", use_bias=False)(y))
        y = batch_norm(layers.Conv2D(width, 1, use_bias=False)(y))
        x = layers.Add()([x, y]) if stride == 1 and x.shape[-1] == width else y
    x = normal(layers.Conv2D(160, 1, use_bias=False)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(10, "softmax")(x), name="depthwise")


def dense() -> Any:
    """Dense blocks as in DenseNet: BN and ReLU before each convolution, inputs concatenated."""
    from tf_keras import Model, layers

    def step(x: Any, width: int, kernel: int) -> Any:
        x = layers.ReLU()(batch_norm(x))
        return layers.Conv2D(width, kernel, padding="same", use_bias=False)(x)

    inputs = layers.Input((16, 16, 1))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    for block in range(3):
        if block:
            x = layers.AveragePooling2D()(step(x, x.shape[-1] // 2, 1))
        for _ in range(4):
            x = layers.Concatenate()([x, step(step(x, 64, 1), 16, 3)])
    x = layers.ReLU()(batch_norm(x))
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(10, "softmax")(x), name="dense")


def squeeze() -> Any:
    """Blocks as in EfficientNet: depthwise convolution, swish, squeeze-and-excite."""
    from tf_keras import Model, layers

    def normal(x: Any) -> Any:
        return layers.Activation("swish")(batch_norm(x))

    inputs = layers.Input((16, 16, 1))
    x = normal(layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs))
    for width, stride in ((32, 1), (48, 2), (48, 1), (64, 2), (64, 1)):
        inner = 4 * x.shape[-1]
        y = normal(layers.Conv2D(inner, 1, use_bias=False)(x))
        y = normal(layers.DepthwiseConv2D(3, stride, "same", use_bias=False)(y))
        gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
        gate = layers.Conv2D(x.shape[-1] // 4, 1, activation="swish")(gate)
        y = layers.Multiply()([y, layers.Conv2D(inner, 1, activation="sigmoid")(gate)])
        y = batch_norm(layers.Conv2D(width, 1, use_bias=False)(y))
        x = layers.Add()([x, y]) if stride == 1 and x.shape[-1] == width else y
    x = normal(layers.Conv2D(192, 1, use_bias=False)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(10, "softmax")(x), name="squeeze")


def mlp() -> Any:
    """Dense layers with BN on rank 2: a group's statistics come from its channels alone."""
    from tf_keras import Model, layers

    inputs = x = layers.Input((64,))
    for width in (256, 256, 128):
        x = layers.ReLU()(batch_norm(layers.Dense(width, use_bias=False)(x)))
    return Model(inputs, layers.Dense(10, "softmax")(x), name="mlp")


def conv1d(name: str = "conv1d") -> Any:
    """A stack of one-dimensional convolutions over time."""
    from tf_keras import Model, layers

    inputs = x = layers.Input((128, 2))
    for width, stride in ((64, 1), (64, 2), (128, 2), (128, 2)):
        x = layers.Conv1D(width, 5, stride, "same", use_bias=False)(x)
        x = layers.ReLU()(batch_norm(x))
    x = layers.GlobalAveragePooling1D()(x)
    return Model(inputs, layers.Dense(6, "softmax")(x), name=name)


def unet() -> Any:
    """An encoder and a decoder with skips between them; the output is an image."""
    from tf_keras import Model, layers

    def block(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(batch_norm(x))
        return x

    inputs = x = layers.Input((32, 32, 3))
    skips = []
    for width in (32, 64):
        skips.append(block(x, width))
        x = layers.MaxPooling2D()(skips[-1])
    x = block(x, 128)
    for width in (64, 32):
        x = layers.Concatenate()([layers.UpSampling2D()(x), skips.pop()])
        x = block(x, width)
    return Model(inputs, layers.Conv2D(3, 1)(x), name="unet")


def conv3d() -> Any:
    """Convolutions over time and space."""
    from tf_keras import Model, layers

    inputs = x = layers.Input((8, 12, 12, 1))
    for width, stride in ((32, 1), (64, 2), (64, 1), (96, 2)):
        x = layers.Conv3D(width, 3, stride, "same", use_bias=False)(x)
        x = layers.ReLU()(batch_norm(x))
    x = layers.GlobalAveragePooling3D()(x)
    return Model(inputs, layers.Dense(6, "softmax")(x), name="conv3d")


def lowres() -> Any:
    """The residual network on 8×8 pixels: its last stage normalises maps of 1×1."""
    return residual(8, (32, 64, 128, 128))


large_digits = functools.partial(digits, scale=2)

NETWORKS = {
    "residual": Network(residual, large_digits, epochs=10),
    "depthwise": Network(depthwise, large_digits),
    "dense": Network(dense, large_digits),
    "squeeze": Network(squeeze, large_digits),
    "mlp": Network(mlp, flat_digits),
    "conv1d": Network(conv1d, waves),
    "conv3d": Network(conv3d, clips, epochs=10),
    "unet": Network(unet, patches, epochs=10, regression=True),
    "conv1d, random gain": Network(
        functools.partial(conv1d, "gain"), functools.partial(waves, gain=True), hard=True
    ),
    "residual, low resolution": Network(lowres, digits, hard=True),
}


def train(name: str, seed: int) -> tuple[Any, Data]:
    """A trained BN model and its data."""
    import tf_keras

    network = NETWORKS[name]
    data = network.data(seed)
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(seed)
    model = network.build()
    steps = network.epochs * -(-len(data.x_train) // network.batch)
    rate = tf_keras.optimizers.schedules.CosineDecay(network.rate, steps)
    model.compile(tf_keras.optimizers.Adam(rate), network.loss)
    model.fit(data.x_train, data.y_train, network.batch, network.epochs, verbose=0)
    return model, data


def trained(name: str, seed: int, folder: Path) -> tuple[Any, Data]:
    """As `train`, from a file in `folder` where an earlier run left it."""
    import tf_keras

    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.keras"
    if path.exists():
        return tf_keras.models.load_model(path, compile=False), NETWORKS[name].data(seed)
    model, data = train(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return model, data


def score(name: str, model: Any, data: Data) -> float:
    """Accuracy on the held-out data, of a regression R²."""
    answer = model.predict(data.x_test, batch_size=100, verbose=0)
    if NETWORKS[name].regression:
        return float(1 - np.mean((answer - data.y_test) ** 2) / np.var(data.y_test))
    return float(np.mean(answer.argmax(axis=1) == data.y_test))
