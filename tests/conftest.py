"""What several test files share: the bundled models, and one converted file per process."""

import shutil
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def digits():
    """The bundled BN model as a `.keras` file; not to be written to."""
    return FIXTURES / "digits_bn.keras"


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
