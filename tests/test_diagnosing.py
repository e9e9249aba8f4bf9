"""What measurements on samples mean: findings from records made by hand."""

from dataclasses import replace

import pytest

from layerswap.diagnosing import FAR_MEAN, FAR_VARIANCE, HIGH_ERROR, HIGH_SPREAD, find_problems
from layerswap.records import Calibration, LayerFit

GOOD = LayerFit(
    path="block/norm",
    groups=4,
    epsilon=0.5,
    fit="calibrated",
    error_match=0.1,
    error=0.01,
    spread=0.2,
    source_mean=0.05,
    source_variance=1.1,
)


def calibration(*layers, **fields):
    return replace(
        Calibration(
            samples=48,
            held_out=16,
            layers=layers,
            kept=True,
            error_match=0.3,
            error_calibrated=0.1,
            error=0.1,
            drift_match=None,
            drift=None,
        ),
        **fields,
    )


def found(*layers, **fields):
    return list(find_problems(calibration(*layers, **fields)))


def layer(path, **fields):
    return replace(GOOD, path=path, **fields)


def test_nothing_is_said_where_all_is_well():
    assert found(GOOD, layer("next")) == []
    assert found() == []
    assert found(kept=False) == []  # nothing was calibrated


FAR = [
    {"source_mean": FAR_MEAN * 1.01},
    {"source_variance": FAR_VARIANCE * 1.01},
    {"source_variance": 0.99 / FAR_VARIANCE},
    {"source_variance": 0.0},
    {"source_variance": float("inf")},
]


@pytest.mark.parametrize("fields", FAR)
def test_a_first_layer_far_off_says_that_the_samples_are_of_another_kind(fields):
    (finding,) = found(layer("first", **fields), GOOD)
    assert (finding.code, finding.severity, finding.where) == ("samples-range", "warning", "first")
    assert "reprocess" in finding.hint


@pytest.mark.parametrize("fields", FAR)
def test_a_later_layer_far_off_says_that_its_statistics_never_converged(fields):
    (finding,) = found(GOOD, layer("late", **fields))
    assert finding.code == "unconverged-statistics"
    assert (finding.severity, finding.where) == ("warning", "late")
    assert "training" in finding.hint


def test_samples_of_another_kind_are_told_once_whatever_follows_from_them():
    far = {"source_mean": 3.0, "source_variance": 40.0}
    findings = found(layer("first", **far), layer("second", **far), layer("third", **far))
    assert [f.code for f in findings] == ["samples-range"]


def test_each_layer_that_never_converged_is_named():
    far = {"source_mean": 3.0}
    findings = found(GOOD, layer("second", **far), layer("third"), layer("fourth", **far))
    assert [(f.code, f.where) for f in findings] == [
        ("unconverged-statistics", "second"),
        ("unconverged-statistics", "fourth"),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"source_mean": FAR_MEAN},
        {"source_variance": FAR_VARIANCE},
        {"source_variance": 1 / FAR_VARIANCE},
    ],
)
def test_at_the_border_nothing_is_said(fields):
    assert found(layer("first", **fields), layer("second", **fields)) == []


def test_the_numbers_are_told():
    (finding,) = found(layer("first", source_mean=1.25, source_variance=0.031))
    assert "1.2" in finding.message
    assert "0.031" in finding.message


def test_a_layer_that_gets_much_wrong_is_named_with_its_share_and_groups():
    (finding,) = found(GOOD, layer("bad", error=HIGH_ERROR + 0.125, groups=32))
    assert (finding.code, finding.severity, finding.where) == ("high-drift", "warning", "bad")
    assert "32 groups" in finding.message
    assert "38%" in finding.message
    assert "varies" not in finding.message
    assert "fewer groups" in finding.hint
    assert found(layer("less", error=HIGH_ERROR * 0.99)) == []


def test_the_spread_of_the_variance_is_told_where_it_explains_the_error():
    (finding,) = found(layer("bad", error=0.5, spread=HIGH_SPREAD * 2.5))
    assert "2.5 times" in finding.message
    assert found(layer("spread", spread=HIGH_SPREAD * 2.5)) == []  # no harm done


def test_a_fit_that_was_refused_is_told_with_the_reason():
    (finding,) = found(GOOD, layer("held", fit="match", note="the fitted gamma would violate it"))
    assert (finding.code, finding.severity, finding.where) == ("fit-refused", "warning", "held")
    assert finding.message == "the fitted gamma would violate it"


def test_a_calibration_that_did_not_help_is_told_with_both_errors():
    fields = {"kept": False, "error_match": 0.0123, "error_calibrated": 0.456, "error": 0.0123}
    (finding,) = found(GOOD, **fields)
    assert (finding.code, finding.severity) == ("calibration-dropped", "info")
    assert "0.456" in finding.message
    assert "0.0123" in finding.message


def test_several_problems_are_all_told():
    bad = layer("bad", source_mean=2.0, error=0.9, spread=3.0, note="refused")
    codes = [f.code for f in found(bad, kept=False)]
    assert sorted(codes) == ["calibration-dropped", "fit-refused", "high-drift", "samples-range"]
