"""What several test files share: the bundled models, and one converted file per process."""

import os
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

# As the command line does; later, TensorFlow no longer looks.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def digits():
    """The bundled BN model as a `.keras` file; not to be written to."""
    return FIXTURES / "digits_bn.keras"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A `.keras` file with one BatchNormalization of 32 channels, `norm`; not to be written to."""
    import tf_keras
    from tf_keras import layers

    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            layers.Input((4, 4, 3)),
            layers.Conv2D(32, 3),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )
    generator = np.random.default_rng(0)
    model.get_layer("norm").moving_mean.assign(generator.normal(0.0, 0.5, 32))
    model.get_layer("norm").moving_variance.assign(generator.uniform(0.3, 3.0, 32))
    path = tmp_path_factory.mktemp("tiny") / "tiny.keras"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def _converted_digits(tmp_path_factory, digits):
    import layerswap as ls

    target = tmp_path_factory.mktemp("converted") / "digits.onnx"
    assert ls.convert(digits, target).ok
    return target


@pytest.fixture
def digits_onnx(_converted_digits, tmp_path):
    """A copy of the bundled model's ONNX export, its reference beside it."""
    folder = tmp_path / "converted"
    folder.mkdir()
    for file in _converted_digits.parent.iterdir():
        shutil.copy(file, folder)
    return folder / _converted_digits.name


@pytest.fixture
def plugin_options():
    """What loads layerswap's plugin in a pytest of a test's own, where installing it didn't."""
    module = "layerswap.pytest_plugin"
    installed = any(point.value == module for point in entry_points(group="pytest11"))
    return [] if installed else ["-p", module]


@pytest.fixture
def runtime(request):
    """The ONNX runtime that the parameter names; for `parametrize(..., indirect=True)`."""
    from layerswap.onnx_graph.runtimes import open_runtime

    if request.param == "opencv" and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("opencv-python-headless 5 needs NumPy 2")  # not so the lower bounds
    return open_runtime(request.param)
