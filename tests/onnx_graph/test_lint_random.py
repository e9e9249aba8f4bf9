"""`check` on files that nobody made on purpose: it always answers, and never otherwise than so."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

import layerswap as ls
from layerswap.errors import LoadError
from random_graphs import CODES, LIMITS, models


def judge(path):
    """Every rule; the answer is a report on this file with known codes, or a LoadError."""
    targets = "onnxruntime,openvino,opencv,tensorrt"
    report = ls.check(path, weights=True, target=targets, groups=4, select="ALL,LS711")
    assert report.exit_code in (0, 1, 3)
    assert {finding.code for finding in report.findings} <= CODES
    return report


@LIMITS
@given(model=models())
def test_any_graph_is_judged(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert judge(path).to_json() == judge(path).to_json()


@LIMITS
@given(data=st.data())
def test_any_damage_is_judged_or_said(data, digits_onnx):
    content = bytearray(digits_onnx.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = digits_onnx.with_name("damaged.onnx")
    damaged.write_bytes(bytes(content))
    with contextlib.suppress(LoadError):
        judge(damaged)


@pytest.mark.parametrize("operator", ["Identity", "Reshape", "Sqrt", "Mul", "ReduceMean", "Sub"])
def test_a_circle_of_operators(operator, tmp_path):
    """No valid graph, yet one that a file can hold."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[1,4] x) => (float[1,4] y) {{
      a = {operator} (b, b)
      b = {operator} (a, a)
      d = Sqrt (a)
      i = InstanceNormalization (a, b, b)
      y = Div (x, d)
    }}"""
    path = tmp_path / "m.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    assert judge(path).exit_code == 1
