"""What people read, and that machines read the same."""

import dataclasses
import json
import math

import pytest

from layerswap.records import (
    Artifact,
    Checked,
    Drift,
    Finding,
    LayerRecord,
    Parity,
    Refusal,
    Report,
    Site,
    Skip,
    Swap,
    SwapPlan,
    Tolerance,
    TransferLog,
    from_json,
)
from layerswap.render import describe_parity, render

LONG = "/".join(f"stage{i}_block_with_a_long_name" for i in range(8)) + "/bns[0]"
PARITY = Parity("onnxruntime", 2.4e-6, 5.4e-7, Tolerance(1e-5, 1e-4), (1, 3), True, "logits")


def site(path, channels=32, spatial=49):
    return Site(path, "BatchNormalization", {}, channels, 3, 4, spatial=spatial)


def swap(path, notes=(), **fields):
    return Swap(site(path, **fields), {"groups": 2, "axis": 3, "epsilon": 0.25}, "match", notes)


def finding(code, where, severity="warning", hint=""):
    return Finding(code, severity, where, f"{code} is so", hint)


DECISIONS = (
    swap("block/bns[0]", (finding("frozen", "block/bns[0]"),)),
    swap("open", spatial=None),
    Skip(site("[bold]head[/bold]"), "excluded by 'head/**'"),
    Refusal(site("norm", None), "unbuilt", "it was never called", "Call it."),
)
PLAN = SwapPlan("my[red]model.keras", {"groups": 2}, DECISIONS)


def plan_text(*decisions, width=None):
    plan = SwapPlan("m.keras", {}, decisions)
    return render(Report("plan", "m.keras", plan=plan, findings=plan.notes), "text", width)


def rows(text, path):
    return [line.split() for line in text.splitlines() if line.startswith(path)]


def test_the_plan_as_a_table():
    text = render(Report("plan", PLAN.source, plan=PLAN), "text")
    lines = text.splitlines()
    for name in ("layer", "class", "channels", "groups", "per group", "elements", "epsilon"):
        assert name in lines[0]
    for name in ("decision", "reason"):
        assert name in lines[0]
    (cells,) = rows(text, "block/bns[0]")
    assert cells[:8] == [
        "block/bns[0]", "BatchNormalization", "32", "2", "16", "784", "0.25", "swap",
    ]  # fmt: skip
    assert "frozen is so" in text
    (cells,) = rows(text, "open")
    assert cells[5] == "dynamic"
    (cells,) = rows(text, "norm")
    assert cells[2:] == ["?", "refusal", "it", "was", "never", "called", "[unbuilt]"]


def test_brackets_are_not_markup():
    text = render(Report("plan", PLAN.source, plan=PLAN), "text")
    for literal in ("block/bns[0]", "[bold]head[/bold]", "[unbuilt]", "my[red]model.keras"):
        assert literal in text


@pytest.mark.parametrize("path", ["[/]", "[", "[link=http://x]a[/link]", ":smile:", "\\[x]"])
def test_no_path_is_taken_for_markup(path):
    assert rows(plan_text(swap(path)), path)


def test_nothing_is_coloured():
    assert "\x1b" not in render(Report("plan", PLAN.source, plan=PLAN), "text", 80)


def test_the_counts_follow_the_table():
    text = render(Report("plan", PLAN.source, plan=PLAN), "text")
    assert text.endswith(
        "my[red]model.keras: 4 BatchNormalization layers: 2 to swap, 1 skipped, 1 refused\n"
    )


@pytest.mark.parametrize("width", [None, 80, 100, 200])
def test_a_long_path_is_folded_never_cut(width):
    text = plan_text(swap(LONG), width=width)
    table = text.splitlines()[:-1]
    assert "…" not in text
    column = "".join(line.split(" ")[0] for line in table[1:])
    assert column == LONG
    assert all(len(line) <= (width or 160) for line in table)


def test_lines_have_no_trailing_blanks():
    text = plan_text(swap("a"), swap(LONG))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_model_without_batchnorm_is_said_so():
    assert plan_text() == "m.keras: no BatchNormalization; there is nothing to swap\n"


def test_equal_findings_are_said_once_with_their_number():
    notes = tuple(finding("frozen", f"bn_{i}", hint="Thaw it.") for i in range(3))
    report = Report("plan", "m", plan=SwapPlan("m", {}, ()), findings=notes)
    lines = [line for line in render(report, "text").splitlines() if "frozen" in line]
    assert lines == ["warning [frozen] bn_0 (and 2 more): frozen is so. Thaw it."]


def test_mere_information_on_a_plan_stays_in_the_json():
    trivia, remark = finding("trivia", "x", "info"), finding("remark", "", "info")
    plan = SwapPlan("m.keras", {}, (), (trivia,))
    report = Report("convert", "m.keras", plan=plan, findings=(trivia, remark))
    assert "trivia" not in render(report, "text")
    assert "trivia" in render(report, "json")
    assert "info [remark]: remark is so." in render(report, "text")


CONVERTED = Report(
    "convert",
    "in.keras",
    plan=SwapPlan("in.keras", {}, (swap("norm"),)),
    transfer=TransferLog(("a", "b"), ("c",), ()),
    artifact=Artifact("out[1].onnx", "onnx", 610_461, 18, "0" * 64, "out[1].onnx.ref.npz"),
    parity=(PARITY,),
    drift=Drift(0.634, None, 4),
    seconds={"load": 0.61, "export": 12.0},
)


def test_a_conversion_ends_with_a_summary():
    assert render(CONVERTED, "text").splitlines() == [
        "in.keras: 1 BatchNormalization layers: 1 to swap, 0 skipped, 0 refused",
        "variables: 2 copied, 1 fitted, 0 fresh",
        "wrote out[1].onnx (onnx, opset 18, 0.6 MB)",
        "reference out[1].onnx.ref.npz",
        describe_parity(PARITY),
        "drift from the BN model on random noise: relative error 0.634 "
        "(on your data it is another; measure it there)",
        "time: load 0.6 s, export 12.0 s",
    ]


def test_a_conversion_shows_its_table_only_where_something_is_refused():
    assert "per group" not in render(CONVERTED, "text")
    refused = dataclasses.replace(CONVERTED, plan=PLAN)
    assert "per group" in render(refused, "text")


@pytest.mark.parametrize(
    ("size", "text"), [(800, "0.8 kB"), (99_999, "100.0 kB"), (2_500_000, "2.5 MB")]
)
def test_sizes(size, text):
    artifact = Artifact("out.h5", "h5", size)
    report = render(Report("convert", "in", artifact=artifact), "text")
    assert report == f"wrote out.h5 (h5, {text})\n"


UNKEPT = "text and bfloat16 can't be kept in one"
UNKNOWN = "the model takes or gives text or bfloat16, or it fails or answers NaN on random inputs"


@pytest.mark.parametrize("form", ["onnx", "savedmodel"])
@pytest.mark.parametrize(("parity", "reason"), [(PARITY, UNKEPT), (None, UNKNOWN)])
def test_a_missing_reference_is_said(form, parity, reason):
    artifact = Artifact("out", form, 800, parity=parity)
    lines = render(Report("export", "in", artifact=artifact), "text").splitlines()
    assert lines[1:] == [f"no reference, so `verify` has nothing to compare with: {reason}"]


def test_parity_in_one_line():
    assert describe_parity(PARITY) == (
        "onnxruntime reproduces the Keras model at batch size 1 and 3: largest difference "
        "2.4e-06, relative 5.4e-07 (tolerance 1e-05 + 0.0001 of the output's largest value)"
    )


def test_parity_beyond_tolerance():
    parity = dataclasses.replace(PARITY, ok=False, max_absolute=math.inf, batches=(1,))
    text = render(Report("verify", "m.onnx", parity=(parity,)), "text")
    assert text.startswith("onnxruntime DIFFERS from the Keras model at batch size 1: ")
    assert "largest difference inf" in text


@pytest.mark.parametrize("report", [CONVERTED, Report("verify", "m.onnx", parity=(PARITY,))])
def test_json_is_the_report(report):
    text = render(report, "json")
    assert from_json(Report, text) == report
    assert text.endswith("}\n")
    assert json.loads(text)["command"] == report.command


def test_the_json_of_a_plan_is_the_plan():
    text = render(Report("plan", PLAN.source, plan=PLAN), "json")
    assert from_json(SwapPlan, text) == PLAN
    assert text == PLAN.to_json() + "\n"


def test_an_affine_in_a_clean_graph_is_explained():
    affine = LayerRecord("norm", "BatchNormalization", "", ())
    clean = Report("check", "m.onnx", checked=(Checked("m.onnx", 4, (affine,), ("LS101",)),))
    assert "operator listed has statistics of batches" in render(clean, "text")
    instance = LayerRecord("norm", "InstanceNormalization", "", ())
    other = Report("check", "m.onnx", checked=(Checked("m.onnx", 4, (instance,)),))
    assert "affine" not in render(other, "text")
