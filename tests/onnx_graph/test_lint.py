"""Which operators of a graph are BatchNormalization, on graphs written as text."""

import json

import onnx
import pytest
from onnx import parser

import layerswap as ls
from layerswap.errors import LoadError
from layerswap.onnx_graph.lint import check_onnx_file

HEAD = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1, "com.microsoft" : 1]>\n'
VECTORS = """
  g = Constant <value = float[4] {1, 2, 3, 4}> ()
  z = Constant <value = float[4] {0, 0, 0, 0}> ()
  o = Constant <value = float[4] {1, 1, 1, 1}> ()
  n = Constant <value = float[4] {0, 0, 0, 1}> ()
  s = Constant <value = int64[4] {0, 4, 2, 2}> ()
"""
AFFINE = "y = BatchNormalization <epsilon = 0.0> (r, g, z, z, o)"
GROUPNORM = f"""
  f = Reshape (x, s)
  i = InstanceNormalization <epsilon = 0.001> (f, o, z)
  r = Reshape (i, s)
  {AFFINE}
"""


def graph(body):
    return f"{HEAD}main (float[1,4,2,2] x) => (float[1,4,2,2] y) {{{VECTORS}{body}}}"


def check(text, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return check_onnx_file(path)


def found(findings):
    return [(f.severity, f.code, f.where) for f in findings]


def test_the_affine_of_a_groupnorm_is_none(tmp_path):
    checked, findings = check(graph(GROUPNORM), tmp_path)
    assert findings == []
    assert checked.examined == 9
    assert [x.class_name for x in checked.layers] == ["InstanceNormalization", "BatchNormalization"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("z, z, o)", "z, n, o)"),
        ("z, z, o)", "z, z, n)"),
        ("<epsilon = 0.0>", "<epsilon = 0.001>"),
        ("<epsilon = 0.0>", ""),
        ("<epsilon = 0.0>", "<epsilon = 0.0, training_mode = 1>"),
        ("InstanceNormalization <epsilon = 0.001> (f, o, z)", "Relu (f)"),
        ("r = Reshape (i, s)", "r = Relu (i)"),
        ("(r, g, z, z, o)", "(x, g, z, z, o)"),
        ("(r, g, z, z, o)", "(r, g, z, v, o)\n  v = Constant <value = float[4] {0, 0, 0, 0}> ()"),
    ],
)
def test_anything_else_is_left_over(old, new, tmp_path):
    assert old in GROUPNORM
    _, findings = check(graph(GROUPNORM.replace(old, new)), tmp_path)
    assert found(findings) == [("error", "LS101", "y")]


def test_initializers_are_constants_unless_they_are_inputs(tmp_path):
    model = parser.parse_model(graph(GROUPNORM))
    zeros = onnx.helper.make_tensor("mean", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    model.graph.initializer.append(zeros)
    model.graph.node[-1].input[3] = "mean"
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert check_onnx_file(path)[1] == []
    fed = onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, [4])
    model.graph.input.append(fed)
    onnx.save(model, path)
    assert found(check_onnx_file(path)[1]) == [("error", "LS101", "y")]


def branch(body):
    return graph(f"""
  c = Constant <value = bool {{1}}> ()
  y = If (c) <
    then_branch = yes () => (float[1,4,2,2] t) {{ {body} }},
    else_branch = no () => (float[1,4,2,2] e) {{ e = Identity (x) }}
  >""")


def test_bodies_are_looked_into(tmp_path):
    checked, findings = check(branch("t = BatchNormalization (x, g, z, z, o)"), tmp_path)
    assert found(findings) == [("error", "LS101", "y/t")]
    assert checked.layers[0].parents == ("If",)


def test_a_groupnorm_in_a_body_reads_constants_from_outside(tmp_path):
    body = GROUPNORM.replace("y =", "t =")
    assert check(branch(body), tmp_path)[1] == []
    # A name of the body's own hides the one outside.
    hidden = "z = Constant <value = float[4] {0, 1, 0, 0}> ()" + body
    assert found(check(branch(hidden), tmp_path)[1]) == [("error", "LS101", "y/t")]


def test_local_functions_are_looked_into(tmp_path):
    text = (
        graph("y = mine.norm (x, g, z, o)")
        + """
<domain: "mine", opset_import: ["" : 17]>
norm (a, g, z, o) => (b) { b = BatchNormalization (a, g, z, z, o) }
"""
    )
    checked, findings = check(text, tmp_path)
    assert found(findings) == [("error", "LS101", "norm/b")]
    assert checked.examined == 7


def test_an_operator_that_only_its_vendor_knows_keeps_the_answer_open(tmp_path):
    _, findings = check(graph("y = mine.Mystery (x)"), tmp_path)
    assert found(findings) == [("undetermined", "LS004", "y")]
    _, findings = check(graph("y = com.microsoft.Gelu (x)"), tmp_path)
    assert findings == []


def test_a_training_graph_is_looked_into(tmp_path):
    model = parser.parse_model(graph("y = Relu (x)"))
    bad = parser.parse_model(graph("y = BatchNormalization (x, g, z, z, o)"))
    model.training_info.add().algorithm.CopyFrom(bad.graph)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert found(check_onnx_file(path)[1]) == [("error", "LS101", "training_info[0]/y")]


def test_weights_outside_the_file_are_not_read(tmp_path):
    model = parser.parse_model(graph(GROUPNORM))
    zeros = onnx.TensorProto(name="mean", data_type=onnx.TensorProto.FLOAT, dims=[4])
    zeros.data_location = onnx.TensorProto.EXTERNAL
    zeros.external_data.add(key="location", value="../absent.bin")
    model.graph.initializer.append(zeros)
    model.graph.node[-1].input[3] = "mean"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert found(check_onnx_file(tmp_path / "m.onnx")[1]) == [("error", "LS101", "y")]


def test_an_export_of_ours_is_clean(digits_onnx):
    report = ls.check(digits_onnx)
    assert report.ok
    norms = [x.class_name for x in report.checked[0].layers]
    assert norms.count("InstanceNormalization") == norms.count("BatchNormalization") > 0
    assert json.loads(report.to_json())["checked"][0]["examined"] > len(norms)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"PK\x03\x04", b"\x0a" * 10_000])
def test_what_is_no_graph_is_said(data, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(LoadError) as caught:
        check_onnx_file(path)
    assert caught.value.where == str(path)


def test_a_truncated_graph_and_an_absent_one(digits_onnx, tmp_path):
    digits_onnx.write_bytes(digits_onnx.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="damaged"):
        check_onnx_file(digits_onnx)
    with pytest.raises(LoadError, match="no such file"):
        check_onnx_file(tmp_path / "absent.onnx")
