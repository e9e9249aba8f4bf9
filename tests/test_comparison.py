"""Parity and drift against numbers worked out by hand."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from layerswap import comparison
from layerswap.comparison import (
    DEFAULT_TOLERANCES,
    compare_parity,
    measure_drift,
    tolerance_for,
    widened,
)
from layerswap.errors import UsageError
from layerswap.records import Tolerance

TIGHT = Tolerance(absolute=0.0, relative=0.01)


def parity(actual, expected, tolerance=TIGHT):
    """Parity of one batch with one output."""
    return compare_parity("rt", [{"y": actual}], [{"y": expected}], tolerance, (len(expected),))


def test_equal_outputs_agree():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    result = parity(x, x.copy(), Tolerance(0.0, 0.0))
    assert result.ok
    assert (result.max_absolute, result.max_relative) == (0.0, 0.0)
    assert (result.runtime, result.batches, result.worst_output) == ("rt", (3,), "y")


def test_the_relative_part_is_of_the_largest_magnitude():
    expected = np.array([[100.0, 0.001]])
    assert parity(np.array([[100.0, 0.9]]), expected).ok
    assert not parity(np.array([[100.0, 1.1]]), expected).ok
    result = parity(np.array([[102.0, 0.001]]), expected)
    assert result.max_absolute == pytest.approx(2.0)
    assert result.max_relative == pytest.approx(0.02)


def test_the_absolute_part_counts_where_the_output_is_all_zero():
    zeros = np.zeros((2, 2))
    assert parity(zeros + 1e-6, zeros, Tolerance(1e-5, 0.0)).ok
    result = parity(zeros + 1e-4, zeros, Tolerance(1e-5, 0.0))
    assert not result.ok
    assert result.max_relative == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_fails(bad, side):
    good, broken = np.ones((2, 2)), np.array([[1.0, bad], [1.0, 1.0]])
    actual = good if side == "expected" else broken
    expected = good if side == "actual" else broken
    result = parity(actual, expected, Tolerance(1e9, 1e9))
    assert not result.ok
    assert result.max_absolute == math.inf


@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2, 2, 1), (4,), ()])
def test_another_shape_fails_even_if_it_broadcasts(shape):
    result = parity(np.ones(shape), np.ones((2, 2)), Tolerance(1e9, 1e9))
    assert not result.ok
    assert result.max_absolute == math.inf


def test_a_missing_output_fails_and_an_extra_one_does_not():
    one, both = {"a": np.ones((1, 1))}, {"a": np.ones((1, 1)), "b": np.ones((1, 1))}
    assert compare_parity("rt", [both], [one], TIGHT, (1,)).ok
    missing = compare_parity("rt", [one], [both], TIGHT, (1,))
    assert (missing.ok, missing.worst_output, missing.max_absolute) == (False, "b", math.inf)


def test_the_worst_output_is_the_one_furthest_beyond_its_own_limit():
    expected = {"big": np.full((1, 1), 1000.0), "small": np.full((1, 1), 1.0)}
    actual = {"big": np.full((1, 1), 1001.0), "small": np.full((1, 1), 1.05)}
    result = compare_parity("rt", [actual], [expected], TIGHT, (1,))
    assert (result.ok, result.worst_output) == (False, "small")
    assert result.max_absolute == pytest.approx(1.0)


def test_every_batch_counts():
    good, bad = {"y": np.ones((2, 2))}, {"y": np.full((3, 2), 2.0)}
    fine = {"y": np.ones((3, 2))}
    assert compare_parity("rt", [good, fine], [good, fine], TIGHT, (2, 3)).ok
    assert not compare_parity("rt", [good, bad], [good, fine], TIGHT, (2, 3)).ok
    assert not compare_parity("rt", [bad, good], [fine, good], TIGHT, (3, 2)).ok


def test_integers_and_booleans_have_to_be_equal():
    loose = Tolerance(1e9, 1e9)
    big = np.array([[2**60, 2**60]], dtype=np.int64)
    assert parity(big, big.copy(), loose).ok
    assert not parity(big + 1, big, loose).ok
    flags = np.array([[True, False]])
    assert parity(flags, flags.copy(), loose).ok
    assert not parity(~flags, flags, loose).ok


def test_sixteen_bit_outputs_are_compared_in_float64():
    expected = np.array([[60000.0, 1.0]], dtype=np.float16)
    result = parity(-expected, expected)
    assert result.max_absolute == pytest.approx(2 * float(expected[0, 0]))


def test_an_empty_output_agrees():
    assert parity(np.ones((0, 3)), np.ones((0, 3))).ok


def test_nothing_to_compare_is_no_parity():
    for actual, expected in ([[], []], [[{}], [{}]], [[], [{"y": np.ones(1)}]]):
        with pytest.raises(ValueError, match="batches"):
            compare_parity("rt", actual, expected, TIGHT, ())


def test_drift_by_hand():
    bn = [{"y": np.array([[3.0, 0.0]])}, {"y": np.array([[0.0, 4.0], [0.0, 0.0]])}]
    gn = [{"y": np.array([[0.0, 3.0]])}, {"y": np.array([[0.0, 4.0], [0.0, 0.0]])}]
    drift = measure_drift(bn, gn)
    assert drift.relative_error == pytest.approx(math.sqrt(18) / 5)
    assert drift.argmax_agreement == pytest.approx(2 / 3)
    assert drift.samples == 3


def test_drift_spans_all_outputs():
    bn = [{"a": np.array([[3.0]]), "b": np.array([[4.0]])}]
    gn = [{"a": np.array([[3.0]]), "b": np.array([[5.0]])}]
    assert measure_drift(bn, gn).relative_error == pytest.approx(1 / 5)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3, 2), (4, 2, 2, 2)])
def test_only_score_vectors_have_an_argmax(shape):
    x = np.random.default_rng(1).normal(size=shape)
    assert measure_drift([{"y": x}], [{"y": x}]).argmax_agreement is None


def test_integer_outputs_do_not_enter_the_drift():
    bn = {"y": np.ones((2, 2)), "label": np.array([[1, 2], [3, 4]])}
    gn = {"y": np.ones((2, 2)), "label": np.array([[9, 2], [3, 4]])}
    drift = measure_drift([bn], [gn])
    assert (drift.relative_error, drift.argmax_agreement) == (0.0, 1.0)
    assert measure_drift([{"label": bn["label"]}], [{"label": gn["label"]}]) is None


def test_drift_that_is_not_finite_is_infinite_never_nan():
    bn = np.array([[1.0, 2.0], [1.0, 2.0]])
    for bad in (np.nan, np.inf):
        gn = np.array([[1.0, 2.0], [1.0, bad]])
        drift = measure_drift([{"y": bn}], [{"y": gn}])
        assert drift.relative_error == math.inf
        assert drift.argmax_agreement == 0.5
        assert measure_drift([{"y": gn}], [{"y": bn}]).relative_error == math.inf


def test_drift_of_an_all_zero_model():
    zeros = np.zeros((2, 2))
    assert measure_drift([{"y": zeros}], [{"y": zeros}]).relative_error == 0.0
    assert measure_drift([{"y": zeros}], [{"y": zeros + 1}]).relative_error == math.inf


def test_drift_of_models_that_do_not_match():
    with pytest.raises(ValueError, match="'y'"):
        measure_drift([{"y": np.ones((2, 2))}], [{"z": np.ones((2, 2))}])
    with pytest.raises(ValueError, match="'y'"):
        measure_drift([{"y": np.ones((2, 2))}], [{"y": np.ones((1, 2))}])
    with pytest.raises(ValueError, match="zip"):
        measure_drift([{"y": np.ones((2, 2))}], [])


def test_default_tolerances():
    assert tolerance_for("float32") == tolerance_for(np.float32) == Tolerance(1e-5, 1e-4)
    assert tolerance_for("bfloat16") == DEFAULT_TOLERANCES["bfloat16"]
    assert tolerance_for("int64") == tolerance_for(np.dtype(bool)) == Tolerance(0.0, 0.0)
    coarser = [DEFAULT_TOLERANCES[name] for name in ("float64", "float32", "float16", "bfloat16")]
    assert coarser == sorted(coarser, key=lambda t: (t.relative, t.absolute))
    for unknown in ("string", "float8", "complex64", "object"):
        with pytest.raises(UsageError):
            tolerance_for(unknown)


def test_the_relative_tolerance_stays_above_the_machine_epsilon():
    for name in ("float16", "float32", "float64"):
        assert DEFAULT_TOLERANCES[name].relative >= 5 * np.finfo(name).eps


@pytest.mark.parametrize("module", ["comparison", "references", "atomic"])
def test_the_core_reaches_no_framework(module):
    source = Path(comparison.__file__).with_name(f"{module}.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"tensorflow", "tf_keras", "onnx", "h5py", "onnxruntime"}


def test_a_model_that_amplifies_rounding_is_held_to_what_it_can_do():
    strict = Tolerance(1e-5, 1e-4)
    answers = {"a": np.array([2.0, -4.0]), "b": np.array([1, 2])}
    for change, relative in ((0.0, 1e-4), (4e-6, 1e-4), (4e-5, 6.4e-4), (0.1, 1e-2)):
        moved = {"a": answers["a"] + change, "b": answers["b"]}
        assert widened(strict, answers, moved) == Tolerance(1e-5, pytest.approx(relative))
    lost = {"a": np.array([np.nan, 0.0]), "b": answers["b"]}
    assert widened(strict, answers, lost) == strict
    assert widened(strict, {}, {}) == strict


def test_the_output_error_is_a_share_of_the_variance_averaged_over_outputs():
    rng = np.random.default_rng(0)
    first, second = rng.normal(5, 2, (6, 3)), rng.normal(0, 100, (6, 4))
    wrong = first + 0.5
    before = [{"a": first[:2], "b": second[:2]}, {"a": first[2:], "b": second[2:]}]
    after = [{"a": wrong[:2], "b": second[:2]}, {"a": wrong[2:], "b": second[2:]}]
    expected = 18 * 0.25 / ((first - first.mean(axis=0)) ** 2).sum() / 2
    assert comparison.output_error(before, after) == pytest.approx(expected)
    assert comparison.output_error(before, before) == 0


def test_probabilities_are_compared_as_logits():
    rng = np.random.default_rng(0)
    logits, moved = rng.normal(0, 3, (2, 8, 5))

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    before, after = [{"p": softmax(logits)}], [{"p": softmax(moved)}]
    assert comparison.probabilities(before) == {"p"}
    a, b = (z - z.mean(axis=1, keepdims=True) for z in (logits, moved))
    assert comparison.output_error(before, after) == pytest.approx(
        ((a - b) ** 2).sum() / ((a - a.mean(axis=0)) ** 2).sum(), rel=1e-6
    )


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.5, 0.6]]),  # no sum of 1
        np.array([[1.5, -0.5]]),  # negative
        np.array([[1.0], [1.0]]),  # one class
        np.array([0.5, 0.5]),  # no axis of classes
        np.array([[1, 0]]),  # integers
    ],
)
def test_other_outputs_are_no_probabilities(array):
    assert comparison.probabilities([{"y": array}]) == set()


def test_an_output_that_is_not_finite_is_infinitely_wrong():
    before = [{"y": np.array([[1.0, 2.0]])}]
    assert comparison.output_error(before, [{"y": np.array([[1.0, np.nan]])}]) == math.inf


def test_what_differs_between_features_hides_no_error():
    rng = np.random.default_rng(0)
    before = rng.normal([1000, 0], 1, (50, 2))
    after = before.mean(axis=0) + np.zeros_like(before)  # nothing of the input is left
    assert comparison.output_error([{"y": before}], [{"y": after}]) == pytest.approx(1)
