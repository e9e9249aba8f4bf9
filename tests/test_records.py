"""Every record there and back as JSON, frozen, and what follows from its fields."""

import dataclasses
import json
import math

import numpy as np
import pytest

from layerswap import records
from layerswap.records import (
    Advice,
    Affine,
    Alternative,
    Artifact,
    Calibration,
    Checked,
    Difference,
    Drift,
    Finding,
    LayerAdvice,
    LayerFit,
    LayerRecord,
    Obstacle,
    Parity,
    Refusal,
    Report,
    Site,
    Skip,
    Statistics,
    Swap,
    SwapPlan,
    Tolerance,
    TransferLog,
    from_json,
    to_json,
)

NOTE = Finding("dead-channels", "warning", "block/bns[0]", "2 of 32 channels are dead", "Prune.")
SITE = Site(
    path="block/bns[0]",
    class_name="BatchNormalization",
    config={"axis": [3], "epsilon": 1e-3, "gamma_regularizer": {"class_name": "L2"}, "name": "é"},
    channels=32,
    axis=3,
    rank=4,
    calls=2,
    spatial=49,
    shape=(None, 7, 7, 32),
    trainable=False,
    obstacles=(Obstacle("renorm", "it renormalizes"),),
)
UNKNOWN = Site("norm", "BatchNormalization", {}, None, None, None)
SWAP = Swap(SITE, {"groups": 8, "axis": 3, "epsilon": 0.5}, "match", (NOTE,))
SKIP = Skip(SITE, "excluded by 'block/**'")
REFUSAL = Refusal(UNKNOWN, "unbuilt", "it was never called", "Call the model once.")
PLAN = SwapPlan("in.keras", {"groups": "auto"}, (SWAP, SKIP, REFUSAL), (NOTE,))
TOLERANCE = Tolerance(1e-5, 1e-4)
PARITY = Parity("onnxruntime", 2e-6, 5e-7, TOLERANCE, (1, 3), True, "logits")
INFINITE = Parity(
    "onnxruntime", math.inf, math.inf, Tolerance(math.inf, 0.0), (1,), False, "logits"
)
DRIFT = Drift(0.6, 0.75, 4)
LOG = TransferLog(("conv/kernel",), ("norm/gamma", "norm/beta"), ())
ARTIFACT = Artifact(
    "out.onnx",
    "onnx",
    610_461,
    18,
    "0" * 64,
    "out.onnx.ref.npz",
    INFINITE,
    Drift(math.inf, None, 4),
)
LAYER = LayerRecord("block/norm", "LayerNormalization", "keras.layers", ("Functional", "Block"))
CHECKED = Checked("in.keras", 12, (LAYER,), ("LS101",))
DIFFERENCE = Difference("LS906", "conv/kernel", "differs", "1", None, {"relative": math.inf})
OTHER = Alternative(2, math.inf)
FIT = LayerFit("bn", 4, 0.5, "calibrated", 0.25, 0.125, 0.5, 0.01, 1.1, "a note", 0.01, (OTHER,))
TIP = LayerAdvice("bn", 8, 2, 0.05, "fewer groups keep more", (OTHER,))
ADVICE = Advice("distill", "too far off", (TIP,), {"groups": "auto"}, True)
CALIBRATION = Calibration(
    192, 64, (FIT,), True, math.inf, 0.02, 0.02, None, Drift(0.1, 0.99, 64), distilled=40
)
FULL = Report(
    "convert",
    "in.keras",
    plan=PLAN,
    transfer=LOG,
    artifact=ARTIFACT,
    parity=(PARITY, INFINITE),
    drift=Drift(math.inf, None, 4),
    calibration=CALIBRATION,
    advice=ADVICE,
    findings=(NOTE,),
    seconds={"load": 0.25, "verify": 1.5},
    checked=(CHECKED,),
    differences=(DIFFERENCE,),
)
EXAMPLES = [
    NOTE,
    Obstacle("renorm", "it renormalizes"),
    SITE,
    UNKNOWN,
    SWAP,
    SKIP,
    REFUSAL,
    PLAN,
    LOG,
    TOLERANCE,
    PARITY,
    INFINITE,
    DRIFT,
    ARTIFACT,
    LAYER,
    CHECKED,
    DIFFERENCE,
    OTHER,
    FIT,
    CALIBRATION,
    TIP,
    ADVICE,
    FULL,
    Report("verify", "out.onnx"),
]
ARRAYS = [
    Statistics(np.ones(2), np.zeros(2), np.zeros(2), np.ones(2)),
    Affine(np.ones(2), np.zeros(2)),
]


def name_of(record):
    return type(record).__name__


def refuse_constant(name):
    pytest.fail(f"{name} is not JSON")


def test_the_examples_are_of_every_record():
    known = {kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)}
    assert {type(record) for record in (*EXAMPLES, *ARRAYS)} == known


def test_the_full_report_leaves_nothing_out():
    for field in dataclasses.fields(FULL):
        assert getattr(FULL, field.name), field.name


@pytest.mark.parametrize("record", EXAMPLES, ids=name_of)
def test_json_round_trip(record):
    again = from_json(type(record), to_json(record))
    assert again == record
    assert to_json(again) == to_json(record)


@pytest.mark.parametrize("record", EXAMPLES, ids=name_of)
def test_json_is_valid_for_every_parser(record):
    plain = json.loads(to_json(record), parse_constant=refuse_constant)
    assert list(plain) == [field.name for field in dataclasses.fields(record)]


def test_infinities_survive_as_text():
    parity = json.loads(FULL.to_json())["parity"][1]
    assert parity["max_absolute"] == parity["max_relative"] == "Infinity"
    assert from_json(Report, FULL.to_json()).parity[1].max_absolute == math.inf


def test_a_number_that_is_none_survives():
    drift = Drift(math.nan, None, 0)
    assert math.isnan(from_json(Drift, to_json(drift)).relative_error)


@pytest.mark.parametrize("record", [SWAP, SKIP, REFUSAL], ids=name_of)
def test_decisions_keep_their_kind(record):
    again = from_json(SwapPlan, PLAN.to_json()).decisions[PLAN.decisions.index(record)]
    assert type(again) is type(record)
    assert json.loads(to_json(record))["kind"] == record.kind


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"command": "plan"}', "null"])
def test_what_is_no_report_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        from_json(Report, text)


@pytest.mark.parametrize("record", [*EXAMPLES, *ARRAYS], ids=name_of)
def test_records_are_frozen_and_slotted(record):
    first = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, first, getattr(record, first))
    assert not hasattr(record, "__dict__")


def test_records_with_arrays_compare_by_identity():
    for record in ARRAYS:
        assert record == record
        assert record != dataclasses.replace(record)


@pytest.mark.parametrize("field", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_are_finite_or_not(field, value):
    assert ARRAYS[0].finite
    assert not dataclasses.replace(ARRAYS[0], **{field: np.array([1.0, value])}).finite


def test_what_follows_from_a_swap():
    assert (SWAP.channels, SWAP.groups, SWAP.channels_per_group) == (32, 8, 4)
    assert SWAP.elements_per_group == 4 * 49


def test_another_axis_has_its_own_channels():
    swap = Swap(SITE, {"groups": 7, "axis": 1}, "reset")
    assert (swap.channels, swap.channels_per_group) == (7, 1)
    assert swap.elements_per_group == 7 * 32, "7·7·32 elements in 7 groups"


def test_elements_of_open_shapes_are_unknown():
    site = dataclasses.replace(SITE, spatial=None, shape=())
    swap = dataclasses.replace(SWAP, site=site)
    assert swap.elements_per_group is None
    assert swap.channels == 32


def test_a_plan_sorts_its_decisions():
    assert (PLAN.swaps, PLAN.skips, PLAN.refusals) == ((SWAP,), (SKIP,), (REFUSAL,))
    assert PLAN.notes == (NOTE, NOTE), "the model's and the swap's"
    assert not PLAN.ok
    assert dataclasses.replace(PLAN, decisions=(SWAP, SKIP)).ok


@pytest.mark.parametrize(
    ("fields", "ok"),
    [
        ({}, True),
        ({"parity": (PARITY,)}, True),
        ({"parity": (PARITY, INFINITE)}, False),
        ({"findings": (NOTE,)}, True),
        ({"findings": (NOTE, dataclasses.replace(NOTE, severity="error"))}, False),
        ({"plan": PLAN}, False),
        ({"plan": dataclasses.replace(PLAN, decisions=(SWAP, SKIP))}, True),
    ],
)
def test_a_report_is_ok_unless_something_is_refused_or_beyond_tolerance(fields, ok):
    report = Report("convert", "in.keras", **fields)
    assert report.ok is ok
    assert report.exit_code == (0 if ok else 1)


def test_plans_and_reports_say_their_schema():
    for record in (PLAN, FULL):
        assert json.loads(record.to_json())["schema"] == records.SCHEMA_VERSION == 1
