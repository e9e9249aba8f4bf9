"""The committed fixtures: intact, small, loadable with plain tf_keras, and as good as promised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ("digits_bn.keras", "digits_bn.h5", "digits_bn_savedmodel")
PROMISED_ACCURACY = 0.985
PROMISED_BYTES = 5_000_000


def files():
    return sorted(
        path
        for path in FIXTURES.rglob("*")
        if path.is_file() and "__pycache__" not in path.relative_to(FIXTURES).parts
    )


@pytest.fixture(scope="module")
def digits():
    with np.load(FIXTURES / "digits_test.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def models():
    import tf_keras

    return {name: tf_keras.models.load_model(FIXTURES / name) for name in MODELS}


def test_checksums_match_and_list_every_data_file():
    listed = {}
    for line in (FIXTURES / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ")
        listed[name] = digest
    found = {
        path.relative_to(FIXTURES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files()
        if path.suffix not in {".py", ".md"} and path.name != "SHA256SUMS"
    }
    assert found == listed


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in files()) < PROMISED_BYTES


def test_every_file_is_explained():
    readme = (FIXTURES / "README.md").read_text(encoding="utf-8")
    names = {path.relative_to(FIXTURES).parts[0] for path in files()} - {"README.md"}
    assert [name for name in sorted(names) if f"`{name}" not in readme] == []


def test_digits_are_what_the_readme_says(digits):
    assert set(digits) == {"x", "y", "x_train", "y_train"}
    for x, y in ((digits["x"], digits["y"]), (digits["x_train"], digits["y_train"])):
        assert x.dtype == np.float32
        assert x.shape == (len(y), 8, 8, 1)
        assert y.dtype == np.int64
        assert set(y) == set(range(10))
        assert x.min() == 0
        assert x.max() == 1
    held_out = {sample.tobytes() for sample in digits["x"]}
    assert not held_out & {sample.tobytes() for sample in digits["x_train"]}


def test_the_three_formats_hold_the_same_model(models, digits):
    outputs = {name: model.predict(digits["x"], verbose=0) for name, model in models.items()}
    first, *others = outputs.values()
    for other in others:
        assert np.abs(other - first).max() <= 1e-5 * np.abs(first).max()
    weights = [
        {variable.name: variable.numpy() for variable in model.weights} for model in models.values()
    ]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(np.array_equal(other[name], weights[0][name]) for name in other)


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_on_held_out_digits(models, digits, name):
    predicted = models[name].predict(digits["x"], verbose=0).argmax(axis=-1)
    accuracy = float((predicted == digits["y"]).mean())
    assert accuracy >= PROMISED_ACCURACY
    recorded = json.loads((FIXTURES / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert accuracy == pytest.approx(recorded["accuracy"]["held_out"], abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_compiled(models, digits, name):
    model = models[name]
    assert type(model.optimizer).__name__ == "SGD"
    loss, accuracy = model.evaluate(digits["x"], digits["y"], verbose=0)
    assert np.isfinite(loss)
    assert accuracy >= PROMISED_ACCURACY


def test_moving_statistics_have_converged(models, digits):
    """Each BN's moving mean and variance are those of the training data, within noise."""
    import tf_keras

    model = models["digits_bn.keras"]
    norms = [
        layer for layer in model.layers if isinstance(layer, tf_keras.layers.BatchNormalization)
    ]
    assert {layer.scale for layer in norms} == {True, False}
    probe = tf_keras.Model(model.input, [layer.input for layer in norms])
    for layer, x in zip(norms, probe.predict(digits["x_train"], verbose=0), strict=True):
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        deviation = np.sqrt(variance.mean())
        assert np.abs(layer.moving_mean.numpy() - mean).max() < 0.3 * deviation, layer.name
        np.testing.assert_allclose(
            layer.moving_variance.numpy(), variance, rtol=0.3, err_msg=layer.name
        )
