"""The oracle itself, against truth that others wrote: PyTorch and the ONNX backend tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.defs
import pytest
from onnx.backend.test.case.node import groupnormalization

from oracle import affine_match, batch_norm, group_norm

VECTORS = Path(__file__).parents[1] / "fixtures" / "torch_groupnorm.npz"


def torch_cases():
    with np.load(VECTORS) as archive:
        arrays = dict(archive)
    numbers = sorted({int(name.split("/")[0]) for name in arrays if "/" in name})
    for number in numbers:
        prefix = f"{number}/"
        case = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        rank, groups, dtype = case["x"].ndim, int(case["groups"]), case["x"].dtype
        yield pytest.param(case, id=f"rank{rank}-groups{groups}-{dtype}")


TORCH_CASES = list(torch_cases())

# `max|a - b| <= tolerance * max|b|`: what the dtype of the expected output can resolve.
RESOLUTION = {"float64": 1e-12, "float32": 2e-6}


def assert_near(actual, expected):
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= RESOLUTION[str(expected.dtype)]


@pytest.mark.parametrize("case", TORCH_CASES)
def test_group_norm_is_torchs(case):
    y = group_norm(
        case["x"], int(case["groups"]), case["gamma"], case["beta"], float(case["epsilon"]), axis=1
    )
    assert_near(y, case["y"])


@pytest.mark.parametrize("case", TORCH_CASES)
def test_group_norm_is_the_same_on_every_axis(case):
    rank = case["x"].ndim
    for axis in range(1, rank):
        x, y = np.moveaxis(case["x"], 1, axis), np.moveaxis(case["y"], 1, axis)
        for same_axis in (axis, axis - rank):
            actual = group_norm(
                x,
                int(case["groups"]),
                case["gamma"],
                case["beta"],
                float(case["epsilon"]),
                axis=same_axis,
            )
            assert_near(actual, y)


def test_torch_vectors_cover_what_they_should():
    cases = [param.values[0] for param in TORCH_CASES]
    covered = {(case["x"].ndim, str(case["x"].dtype)) for case in cases}
    assert covered == {(rank, dtype) for rank in (2, 3, 4, 5) for dtype in ("float32", "float64")}
    assert any(int(case["groups"]) == 1 for case in cases)
    assert any(int(case["groups"]) == case["x"].shape[1] for case in cases)
    assert any(float(case["epsilon"]) != 1e-5 for case in cases)
    assert VECTORS.stat().st_size < 200_000


def onnx_cases(monkeypatch, export):
    """The test vectors that one of onnx's own backend cases produces, by name."""
    cases = {}

    def record(node, inputs, outputs, name):
        cases[name] = (node, inputs, outputs)

    monkeypatch.setattr(groupnormalization, "expect", record)
    getattr(groupnormalization.GroupNormalization, export)()
    return cases


@pytest.mark.parametrize(
    ("export", "name", "epsilon"),
    [
        ("export", "test_group_normalization_example", None),
        ("export_epsilon", "test_group_normalization_epsilon", 0.01),
    ],
)
def test_group_norm_is_onnxs(monkeypatch, export, name, epsilon):
    schema = onnx.defs.get_schema("GroupNormalization")
    assert schema.since_version == 21  # scale and bias per channel, not per group as in opset 18
    node, (x, scale, bias), (y,) = onnx_cases(monkeypatch, export)[name]
    attributes = {attribute.name: attribute for attribute in node.attribute}
    assert ("epsilon" in attributes) == (epsilon is not None)
    stored = attributes.get("epsilon", schema.attributes["epsilon"].default_value).f
    if epsilon is not None:
        assert stored == np.float32(epsilon)
    assert scale.shape == bias.shape == (x.shape[1],)
    assert_near(group_norm(x, attributes["num_groups"].i, scale, bias, stored, axis=1), y)


def test_group_norm_minus_one_is_one_group_per_channel():
    x = np.random.default_rng(0).normal(size=(2, 5, 6))
    assert np.array_equal(
        group_norm(x, -1, None, None, 0.1), group_norm(x, 6, np.ones(6), np.zeros(6), 0.1)
    )


def test_group_norm_leaves_its_input_alone():
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    before = x.copy()
    group_norm(x, 2, None, None, 0.1)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("axis", [0, -3, 3, -4])
def test_batch_axis_and_foreign_axes_are_refused(axis):
    with pytest.raises(ValueError, match="no channel axis"):
        group_norm(np.zeros((2, 3, 4)), 1, None, None, 0.1, axis=axis)


@pytest.mark.parametrize("groups", [0, -2, 3, 8])
def test_illegal_groups_are_refused(groups):
    with pytest.raises(ValueError, match="do not divide"):
        group_norm(np.zeros((2, 4)), groups, None, None, 0.1)
    with pytest.raises(ValueError, match="do not divide"):
        affine_match(None, None, np.zeros(4), np.ones(4), 0.1, groups, 0.1)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_batch_norm_is_the_textbook_formula(axis):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4, 4))
    gamma, beta, mean = rng.normal(size=(3, 4))
    variance = rng.uniform(0.1, 2, size=4)
    shape = (1, 4, 1) if axis == 1 else (1, 1, 4)
    g, b, m, v = (vector.reshape(shape) for vector in (gamma, beta, mean, variance))
    expected = g * (x - m) / np.sqrt(v + 0.3) + b
    np.testing.assert_allclose(
        batch_norm(x, gamma, beta, mean, variance, 0.3, axis=axis), expected, rtol=1e-13, atol=1e-13
    )
    np.testing.assert_allclose(
        batch_norm(x, None, None, mean, variance, 0.3, axis=axis),
        (x - m) / np.sqrt(v + 0.3),
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_matched_group_norm_is_batch_norm_on_the_population(groups, affine):
    """With the whole population as one sample, its group moments are the population's."""
    rng = np.random.default_rng(groups)
    channels = 6
    x = rng.normal(loc=rng.normal(size=channels), scale=2, size=(1, 9, 7, channels))
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    gamma, beta = rng.normal(size=(2, channels)) if affine else (None, None)
    fitted = affine_match(gamma, beta, mean, variance, 0.02, groups, 0.7)
    np.testing.assert_allclose(
        group_norm(x, groups, *fitted, 0.7),
        batch_norm(x, gamma, beta, mean, variance, 0.02),
        rtol=1e-12,
        atol=1e-12,
    )
