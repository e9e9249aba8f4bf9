"""The models of tf_keras.applications, and what must be true of each after a swap.

Shared by `test_applications.py` and the benchmarks.
"""

import inspect

import numpy as np
import onnxruntime
import tf_keras
from tf_keras.layers import GroupNormalization
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
from zoo import randomize

WITHOUT_BATCHNORM = ("ConvNeXt", "VGG")
# In pixels: with these the last convolutions see more than one position, but hardly more.
DEFAULT_SIZE = 64
SIZES = {"InceptionV3": 107, "InceptionResNetV2": 107, "Xception": 71}


def names():
    """Every model with BatchNormalization, in alphabetical order."""
    return sorted(
        name
        for name, value in vars(tf_keras.applications).items()
        if name[0].isupper() and callable(value) and not name.startswith(WITHOUT_BATCHNORM)
    )


def build(name):
    """The model with random weights, the BN statistics of a seeded batch, logits as its output."""
    tf_keras.utils.set_random_seed(0)
    constructor = getattr(tf_keras.applications, name)
    size = SIZES.get(name, DEFAULT_SIZE)
    arguments = {"weights": None, "input_shape": (size, size, 3), "classifier_activation": None}
    accepted = inspect.signature(constructor).parameters
    model = constructor(**{key: value for key, value in arguments.items() if key in accepted})
    randomize(model)
    set_statistics(model, draw(model, 4))
    return model


def set_statistics(model, images):
    """Gives every BatchNormalization the mean and variance that it sees of these images."""
    momenta = {layer: layer.momentum for layer in batchnorms(model)}
    for layer in momenta:
        layer.momentum = 0.0
    model(images, training=True)
    for layer, momentum in momenta.items():
        layer.momentum = momentum


def batchnorms(model):
    """What tf.Module tracks, independently of layerswap's walk."""
    return [layer for layer in model.submodules if isinstance(layer, BatchNormalizationBase)]


def check_swap(source, weights, target):
    """No BN left, each at its place a GN, everything else equal bit by bit, the source untouched.

    Args:
        source: the BN model.
        weights: its weights from before the swap.
        target: the swapped model.
    """
    assert batchnorms(source)
    assert not batchnorms(target)
    assert all(map(same_bits, source.get_weights(), weights))
    assert len(source.layers) == len(target.layers)
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        assert ours is not theirs
        assert ours.name == theirs.name
        assert ours.trainable == theirs.trainable
        if isinstance(theirs, BatchNormalizationBase):
            assert type(ours) is GroupNormalization, ours.name
        else:
            assert type(ours) is type(theirs), ours.name
            pairs = zip(ours.get_weights(), theirs.get_weights(), strict=True)
            assert all(same_bits(a, b) for a, b in pairs), ours.name


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def keras_parity(converted, folder):
    """Largest difference over largest output, after `.keras` and plain tf_keras."""
    path = folder / "model.keras"
    ls.export(converted, path, overwrite=True, verify=False)
    x = draw(converted.model)
    return difference(tf_keras.models.load_model(path)(x), converted.model(x))


def onnx_parity(model, path):
    """Largest difference of an ONNX file's output over the model's largest, in ONNX Runtime."""
    x = draw(model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x})
    return difference(output, model(x))


def sensitivity(model):
    """What one unit in the last place of the input changes in the model's own output.

    As `onnx_parity`; no runtime that rounds can be held to less.
    """
    x = draw(model)
    return difference(model(np.nextafter(x, np.float32(np.inf))), model(x))


def draw(model, batch=2):
    """Seeded images in the range of pixels."""
    shape = (batch, *model.input_shape[1:])
    return np.random.default_rng(1).uniform(0, 255, shape).astype(np.float32)


def difference(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert theirs.std() > 0  # or it would prove nothing
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
