"""`diff` as a whole: what can be compared with what, exit codes, reports, and what it imports."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import layerswap as ls
from layerswap import catalog
from layerswap.__main__ import run
from layerswap.errors import LoadError, UsageError
from layerswap.records import Report, from_json, to_json

DOCUMENT = Path(__file__).parents[1] / "docs" / "diff.md"
FORMATS = ("text", "json", "junit", "sarif", "github")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def graph(path, op="Relu", value=1.0, *, missing=False):
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        main (float[2,4] x) => (float[2,4] y) {{ h = MatMul (x, w) y = {op} (h) }}"""
    )
    tensor = numpy_helper.from_array(np.full((4, 4), value, np.float32), "w")
    if missing:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="absent.bin")
    model.graph.initializer.append(tensor)
    onnx.save(model, path)
    return path


@pytest.fixture
def files(digits):
    """One file of each kind, by suffix."""
    shutil.copy(digits, "m.keras")
    graph("m.onnx")
    with open("m.json", "w") as file:
        file.write(to_json(ls.plan("m.keras")))
    with open("m.txt", "w") as file:
        file.write("text")
    return {name.rpartition(".")[2]: name for name in ("m.keras", "m.onnx", "m.json", "m.txt")}


# --- what can be compared -----------------------------------------------------------------------


def test_each_kind_with_itself(files, capsys):
    for suffix in ("keras", "onnx", "json"):
        report = ls.diff(files[suffix], files[suffix], exit_code=True)
        assert (report.differences, report.findings, report.ok) == ((), (), True)
        assert report.command == "diff"
        assert run(["diff", files[suffix], files[suffix], "--exit-code"]) == 0
        name = files[suffix]
        assert capsys.readouterr().out == f"{name} → {name}: no difference\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [("keras", "onnx"), ("onnx", "keras"), ("keras", "json"), ("json", "onnx"), ("txt", "txt")],
)
def test_mixtures(first, second, files, capsys):
    with pytest.raises(UsageError, match="can't be compared"):
        ls.diff(files[first], files[second])
    assert run(["diff", files[first], files[second]]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_folders(tmp_path, files):
    (tmp_path / "folder.onnx").mkdir()
    assert run(["diff", "folder.onnx", "folder.onnx"]) == 2
    assert run(["diff", str(tmp_path), files["onnx"]]) == 2


@pytest.mark.parametrize("suffix", [".onnx", ".keras", ".h5", ".hdf5", ".json"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"nonsense" * 100])
def test_wrong_files(suffix, content, files, capsys):
    kind = {".onnx": "onnx", ".json": "json"}.get(suffix, "keras")
    bad = f"bad{suffix}"
    if content is not None:
        with open(bad, "wb") as file:
            file.write(content)
    for pair in ((bad, files[kind]), (files[kind], bad)):
        with pytest.raises(LoadError) as raised:
            ls.diff(*pair)
        assert raised.value.where == bad
        assert run(["diff", *pair]) == 3
        err = capsys.readouterr().err
        assert err.startswith(f"Error: {bad}: ")
        assert "unexpected" not in err


@pytest.mark.parametrize("suffix", ["onnx", "keras", "json"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_files_that_were_cut_off(suffix, share, files, capsys):
    with open(files[suffix], "rb") as file:
        content = file.read()
    with open(f"cut.{suffix}", "wb") as file:
        file.write(content[: int(len(content) * share)])
    assert run(["diff", files[suffix], f"cut.{suffix}"]) == 3
    assert "unexpected" not in capsys.readouterr().err


# --- exit codes ---------------------------------------------------------------------------------


def test_a_difference_is_no_fault_unless_asked():
    one, other = graph("a.onnx"), graph("b.onnx", "Abs")
    assert run(["diff", one, other]) == 0
    assert run(["diff", one, other, "--exit-code"]) == 1
    assert {f.severity for f in ls.diff(one, other).findings} == {"info"}
    assert {f.severity for f in ls.diff(one, other, exit_code=True).findings} == {"error"}


def test_what_can_t_be_compared_is_no_proof():
    one, lost = graph("a.onnx"), graph("b.onnx", missing=True)
    assert run(["diff", one, lost]) == 0
    assert run(["diff", one, lost, "--exit-code"]) == 3
    report = ls.diff(one, lost, exit_code=True)
    assert (report.undetermined, report.exit_code) == (True, 3)
    # What is certain wins over what is not.
    assert run(["diff", one, graph("c.onnx", "Abs", missing=True), "--exit-code"]) == 1


# --- reports ------------------------------------------------------------------------------------


def test_the_text(capsys):
    run(["diff", graph("a.onnx"), graph("b.onnx", "Abs", 2.0)])
    assert capsys.readouterr().out.splitlines() == [
        "a.onnx → b.onnx: 2 differences",
        "",
        f"[LS904] {catalog.find('LS904').summary}: 1",
        "  y: operator: Relu → Abs",
        "",
        f"[LS906] {catalog.find('LS906').summary}: 1",
        "  w: values differ; norm 4 → 8, of the difference 4 (100.00%), largest 1",
    ]
    run(["diff", "a.onnx", graph("c.onnx", missing=True)])
    out = capsys.readouterr().out
    assert out.startswith("a.onnx → c.onnx: no difference, but not all was compared\n")


def test_many_differences_are_grouped(capsys):
    def chain(path, op):
        nodes = [helper.make_node(op, [f"t{n}"], [f"t{n + 1}"], f"n{n}") for n in range(40)]
        weights = [numpy_helper.from_array(np.full(2, n, np.float32), f"w{n}") for n in range(20)]
        for n, weight in enumerate(weights):
            weight.raw_data = np.full(2, n + (op == "Abs") * n / 10, np.float32).tobytes()
            nodes[n].input.append(weight.name)
            nodes[n].op_type = "Add"
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("t0", "t40")]
        onnx.save(
            helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], weights)), path
        )
        return path

    assert run(["diff", chain("a.onnx", "Relu"), chain("b.onnx", "Abs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30
    assert any(" more; --report-format json has them all" in line for line in lines)
    assert any(line.startswith("  20 × (n20, n21, n22 and 17 more): ") for line in lines)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_names_every_difference(form, capsys):
    one, other = graph("a.onnx"), graph("b.onnx", "Abs", 2.0)
    codes = [d.code for d in ls.diff(one, other).differences]
    assert run(["diff", one, other, "--exit-code", "--report-format", form]) == 1
    out = capsys.readouterr().out
    assert all(code in out for code in codes)
    if form == "json":
        assert from_json(Report, out) == ls.diff(one, other, exit_code=True)
    elif form == "junit":
        failures = ET.fromstring(out).iter("failure")
        assert len(list(failures)) == len(codes)
    elif form == "sarif":
        results = json.loads(out)["runs"][0]["results"]
        assert [(r["ruleId"], r["level"]) for r in results] == [(code, "error") for code in codes]
    elif form == "github":
        assert out.count("::error ") == len(codes)


def test_weights_that_are_no_numbers_are_valid_json(capsys):
    one, other = graph("a.onnx", value=0.0), graph("b.onnx", value=np.nan)
    assert run(["diff", one, other, "--report-format", "json"]) == 0
    out = capsys.readouterr().out
    json.loads(out)
    (difference,) = from_json(Report, out).differences
    assert np.isnan(difference.norms["difference"])
    assert ls.diff(other, other).differences == ()
    assert run(["diff", one, graph("c.onnx", value=1.0), "--report-format", "json"]) == 0
    (difference,) = from_json(Report, capsys.readouterr().out).differences
    assert difference.norms["relative"] == np.inf


def test_the_report_in_a_file(capsys):
    one, other = graph("a.onnx"), graph("b.onnx", "Abs")
    arguments = ["diff", one, other, "--output-file", "report.txt"]
    assert run(arguments) == 0
    with open("report.txt", encoding="utf-8") as file:
        assert "1 difference" in file.read()
    assert run(arguments) == 2  # it exists
    for file in (one, other):
        assert run(["diff", one, other, "--output-file", file, "--force"]) == 2
        assert ls.diff(one, other).differences


# --- the document -------------------------------------------------------------------------------


def test_the_commands_of_the_document_run_and_it_names_every_code(digits, capfd):
    text = DOCUMENT.read_text(encoding="utf-8")
    shutil.copy(digits, "model.keras")
    for line in re.findall(r"^\$ layerswap (.*)$", text, re.MULTILINE):
        assert run(shlex.split(line)) == (1 if "--exit-code" in line else 0), line
    assert "Error" not in capfd.readouterr().err
    codes = {rule.code for rule in catalog.RULES if rule.code.startswith("LS9")}
    assert set(re.findall(r"^\| (LS\d+) \|", text, re.MULTILINE)) == codes


# --- imports ------------------------------------------------------------------------------------


def test_what_is_imported(files):
    """No TensorFlow; onnx for ONNX files alone; in Python as on the command line."""
    code = """
import sys
import layerswap as ls
from layerswap.__main__ import run
print(run(["diff", sys.argv[1], sys.argv[1]]), ls.diff(sys.argv[1], sys.argv[1]).ok)
heavy = {"tensorflow", "tf_keras", "keras", "tf2onnx", "onnxruntime", "openvino", "cv2", "onnx"}
print(*sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    for suffix, expected in (("keras", ""), ("json", ""), ("onnx", "onnx")):
        done = subprocess.run(
            [sys.executable, "-c", code, files[suffix]], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-2:] == ["0 True", expected]
