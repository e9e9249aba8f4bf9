"""Every rule on graphs written as text: one that trips it, one that comes close, one in a body."""

import json
import math
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import layerswap as ls
from layerswap import catalog
from layerswap.criteria import Criteria
from layerswap.errors import LoadError
from layerswap.onnx_graph.lint import check_onnx_file

HEAD = (
    '<ir_version: 8, opset_import: ["" : {opset}, "mine" : 1, "com.microsoft" : 1, '
    '"com.microsoft.nchwc" : 1, "com.microsofter" : 1, "ai.onnx.ml" : 2]>\n'
)
CONSTANTS = """
  g = Constant <value = float[4] {1, 2, 3, 4}> ()
  z = Constant <value = float[4] {0, 0, 0, 0}> ()
  o = Constant <value = float[4] {1, 1, 1, 1}> ()
  n = Constant <value = float[4] {0, 0, 0, 1}> ()
  o2 = Constant <value = float[2] {1, 1}> ()
  z2 = Constant <value = float[2] {0, 0}> ()
  o3 = Constant <value = float[3] {1, 1, 1}> ()
  z3 = Constant <value = float[3] {0, 0, 0}> ()
  s2 = Constant <value = int64[3] {0, 2, -1}> ()
  s3 = Constant <value = int64[3] {0, 3, -1}> ()
  s4 = Constant <value = int64[3] {0, 4, -1}> ()
  back = Constant <value = int64[4] {0, 4, 3, 3}> ()
  last = Constant <value = int64[4] {0, 3, 3, 4}> ()
  two = Constant <value = float {2}> ()
  e = Constant <value = float {0.001}> ()
  half = Constant <value = float {0.5}> ()
  minus = Constant <value = float {-0.5}> ()
  one = Constant <value = float {1}> ()
"""
AFFINE = "y = BatchNormalization <epsilon = 0.0> (r, g, z, z, o)"
GROUPNORM = f"""
  f = Reshape (x, s2)
  i = InstanceNormalization <epsilon = 0.001> (f, o2, z2)
  r = Reshape (i, back)
  {AFFINE}
"""
# mean(x²) − mean(x)², and mean((x − mean(x))²)
UNSAFE = """
  m = ReduceMean <axes = [1, 2, 3]> (x)
  xx = Mul (x, x)
  mm = ReduceMean <axes = [1, 2, 3]> (xx)
  m2 = Mul (m, m)
  v = Sub (mm, m2)
"""
SAFE = """
  m = ReduceMean <axes = [1, 2, 3]> (x)
  c = Sub (x, m)
  cc = Mul (c, c)
  v = ReduceMean <axes = [1, 2, 3]> (cc)
"""
DIVIDED = """
  ve = Add (v, e)
  d = Sqrt (ve)
  w = Sub (x, m)
  y = Div (w, d)
"""
NATIVE = "y = GroupNormalization <num_groups = 2, epsilon = 0.001> (x, g, z)"


def graph(body, shape="1,4,3,3", dtype="float", opset=17, tail=""):
    text = f"main ({dtype}[{shape}] x) => ({dtype}[N] y) {{{CONSTANTS}{body}}}{tail}"
    return HEAD.format(opset=opset) + text


def branch(body, **options):
    """The body as one branch of an If."""
    inner = re.sub(r"\by\b", "t", body)
    return graph(
        f"""
  c0 = Constant <value = bool {{1}}> ()
  y = If (c0) <
    then_branch = yes () => (float[N] t) {{ {inner} }},
    else_branch = no () => (float[N] e0) {{ e0 = Identity (x) }}
  >""",
        **options,
    )


def save(text, tmp_path):
    path = tmp_path / "m.onnx"
    model = text if isinstance(text, onnx.ModelProto) else parser.parse_model(text)
    for value in model.graph.output:  # its shape is for shape inference to find
        value.type.tensor_type.ClearField("shape")
    path.write_bytes(model.SerializeToString())
    return path


def judge(text, tmp_path, **fields):
    """What `check` says, but for open axes, as (code, severity, where)."""
    fields.setdefault("dynamic", "any")
    report = ls.check(save(text, tmp_path), **fields)
    return [(f.code, f.severity, f.where) for f in report.findings]


def codes(text, tmp_path, **fields):
    return {code for code, _, _ in judge(text, tmp_path, **fields)}


def half(body):
    """In float16, with its constants."""
    return re.sub(r"\bfloat\b", "float16", body)


GROUPS_OF_3 = """
  f = Reshape (x, s3)
  i = InstanceNormalization <epsilon = 0.001> (f, o3, z3)
  r = Reshape (i, back)
  y = BatchNormalization <epsilon = 0.0> (r, g, z, z, o)
"""
EACH_CHANNEL = "y = InstanceNormalization <epsilon = 0.001> (x, g, z)"
ROWS = """
  rows = Constant <value = int64[3] {1, -1, 12}> ()
  f = Reshape (x, rows)
  m1 = ReduceMean <axes = [0, 2], keepdims = 0> (f)
  m3 = ReduceMean <axes = [0, 2], keepdims = 1> (f)
  c = Sub (f, m3)
  cc = Mul (c, c)
  v = ReduceMean <axes = [0, 2], keepdims = 0> (cc)
  b = BatchNormalization <epsilon = 0.001> (f, o3, z3, m1, v)
  y = Reshape (b, back)
"""
# A mean over the elements of each group, and a Reshape back.
BY_HAND = """
  m = ReduceMean <axes = [AXES]> (f)
  c = Sub (f, m)
  cc = Mul (c, c)
  v = ReduceMean <axes = [AXES]> (cc)
  ve = Add (v, e)
  d = Sqrt (ve)
  w = Div (c, d)
  q = Reshape (w, back)
  y = Relu (q)
"""
# rule → (graph that trips it, one that comes close, options of the graphs, criteria)
CASES = {
    "LS004": ("y = mine.Mystery (x)", "y = ai.onnx.ml.Scaler (x)", {}, {}),
    "LS004-carrier": (
        "y = com.microsoft.EPContext <embed_mode = 0> (x)",
        "y = ai.onnx.ml.Scaler (x)",
        {},
        {},
    ),
    "LS004-not-a-vendor": (
        "y = com.microsofter.Thing (x)",
        "y = ai.onnx.ml.Scaler (x)",
        {},
        {},
    ),
    "LS101": (
        "y = BatchNormalization <epsilon = 0.001> (x, g, z, z, o)",
        GROUPNORM,
        {},
        {},
    ),
    "LS101-rows": (  # a mean over the samples, and one over the rows of each
        ROWS.replace("[3] {1, -1, 12}", "[3] {1, 4, -1}"),
        ROWS,
        {},
        {},
    ),
    "LS101-vendor": (
        "y = com.microsoft.nchwc.FusedBatchNorm (x, g, z)",
        "y = com.microsoft.nchwc.Conv (x, g)",
        {},
        {},
    ),
    "LS103": ("y = mine.my_batch_norm (x)", "y = mine.my_batch (x)", {}, {}),
    "LS103-by-hand": (  # over the samples, and over the channels of each
        (SAFE + DIVIDED).replace("[1, 2, 3]", "[0, 2, 3]"),
        (SAFE + DIVIDED).replace("[1, 2, 3]", "[2, 3]"),
        {},
        {},
    ),
    "LS103-weights": (  # a weight that the model standardises, and an activation
        (SAFE + DIVIDED).replace("[1, 2, 3]", "[0, 1, -1]").replace("(x", "(x2"),
        (SAFE + DIVIDED).replace("[1, 2, 3]", "[0, 1, -1]").replace("(x", "(kernel"),
        {},
        {},
    ),
    "LS104": (AFFINE.replace("(r,", "(x,"), GROUPNORM, {}, {}),
    "LS201": (GROUPS_OF_3, GROUPNORM, {}, {}),
    "LS201-native": (
        NATIVE.replace("= 2", "= 3"),
        NATIVE,
        {"opset": 21},
        {},
    ),
    "LS201-other-reshape": (  # from images to rows; and back, or not
        GROUPS_OF_3,
        GROUPS_OF_3.replace("i = Inst", "y = Inst").split("  r = ")[0],
        {},
        {},
    ),
    "LS201-samples": (  # groups of each sample, or of two as one
        GROUPNORM.replace("s2", "s3").replace("o2, z2", "o3, z3"),
        GROUPNORM.replace("s2", "s8").replace("o2, z2", "o8, z8"),
        {"shape": "2,4,3,3"},
        {},
    ),
    "LS201-rows": (
        GROUPS_OF_3,
        "s9 = Constant <value = int64[3] {0, 9, 4}> ()\n  f = Reshape (x, s9)"
        + BY_HAND.replace("AXES", "2"),
        {},
        {},
    ),
    "LS201-none": (
        NATIVE.replace("= 2", "= 0"),
        NATIVE.replace("= 2", "= 1"),
        {"opset": 21},
        {},
    ),
    "LS201-negative": (
        NATIVE.replace("= 2", "= -2"),
        NATIVE.replace("= 2", "= 4"),
        {"opset": 21},
        {},
    ),
    "LS202": (
        GROUPNORM,
        GROUPNORM.replace("s2", "s4").replace("o2, z2", "o, z"),
        {},
        {"groups": 4},
    ),
    "LS202-by-hand": (
        "f = Reshape (x, s2)" + BY_HAND.replace("AXES", "-1"),
        "f = Reshape (x, s4)" + BY_HAND.replace("AXES", "-1"),
        {},
        {"groups": 4},
    ),
    "LS202-channels-last": (
        "s = Constant <value = int64[5] {0, 3, 3, 2, 2}> ()\n  f = Reshape (x, s)"
        + BY_HAND.replace("AXES", "1, 2, 4").replace("back", "last"),
        "s = Constant <value = int64[5] {0, 3, 3, 4, 1}> ()\n  f = Reshape (x, s)"
        + BY_HAND.replace("AXES", "1, 2, 4").replace("back", "last"),
        {"shape": "1,3,3,4"},
        {"groups": 4},
    ),
    "LS203": (EACH_CHANNEL, EACH_CHANNEL.replace("(x,", "(x2,"), {"shape": "1,4,1,1"}, {}),
    "LS204": (
        GROUPNORM.replace("back", "small"),
        GROUPNORM.replace("back", "small").replace("s2", "s1").replace("o2, z2", "o1, z1"),
        {"shape": "1,4,1,3"},
        {},
    ),
    "LS302": ("y = Gelu (x)", "y = Relu (x)", {}, {}),
    "LS303": (
        "y = GroupNormalization <num_groups = 2> (x, o2, z2)",
        "y = InstanceNormalization (x, g, z)",
        {"opset": 18},
        {},
    ),
    "LS304": ("y = com.microsoft.Gelu (x)", "y = Gelu (x)", {"opset": 20}, {}),
    "LS501": (UNSAFE + DIVIDED, SAFE + DIVIDED, {}, {}),
    "LS501-power": (
        (UNSAFE + DIVIDED)
        .replace("Mul (x, x)", "Pow (x, two)")
        .replace("Sqrt (ve)", "Pow (ve, half)"),
        (UNSAFE + DIVIDED).replace("Mul (m, m)", "Mul (m, e)"),
        {},
        {},
    ),
    "LS501-native": (NATIVE, EACH_CHANNEL, {"opset": 21}, {}),
    "LS501-mvn": (
        "y = MeanVarianceNormalization (x)",
        "y = LpNormalization (x)",
        {},
        {},
    ),
    "LS502": (
        SAFE + DIVIDED.replace("Sqrt (ve)", "Sqrt (v)"),
        SAFE + DIVIDED.replace("Add (v, e)", "Max (e, v)"),
        {},
        {},
    ),
    "LS502-inverse": (
        SAFE + "d = Sqrt (v)\n rr = Reciprocal (d)\n w = Sub (x, m)\n y = Mul (rr, w)",
        SAFE + "d = Sqrt (v)\n y = Mul (x, d)",
        {},
        {},
    ),
    "LS502-attribute": (
        "y = InstanceNormalization <epsilon = 0.0> (x, g, z)",
        EACH_CHANNEL,
        {},
        {},
    ),
    "LS503": (
        half(EACH_CHANNEL.replace("0.001", "0.00000001")),
        half(EACH_CHANNEL.replace("0.001", "0.000001")),
        {"dtype": "float16"},
        {},
    ),
    "LS601": (
        "k = Constant <value = float[2] {1, nan}> ()\n y = Identity (k)",
        "k = Constant <value = float[2] {1, 3.4e38}> ()\n y = Identity (k)",
        {},
        {"weights": True},
    ),
    "LS602": (
        "k = Constant <value = float[1,4,1,1] {0, 0, 0, 0}> ()\n y = Conv (x, k)",
        "k = Constant <value = float[1,4,1,1] {0, 0, 0, 1}> ()\n y = Conv (x, k)",
        {},
        {"weights": True},
    ),
    "LS603": (
        GROUPNORM.replace("(r, g,", "(r, z,"),
        GROUPNORM.replace("(r, g,", "(r, n,"),
        {},
        {},
    ),
    "LS603-mul": (
        GROUPNORM.replace(
            AFFINE, "c4 = Constant <value = float[4,1,1] {0, 0, 0, 0}> ()\n y = Mul (r, c4)"
        ),
        GROUPNORM.replace(
            AFFINE, "c4 = Constant <value = float[4,1,1] {0, 0, 0, 1}> ()\n y = Mul (c4, r)"
        ),
        {},
        {},
    ),
}
MORE = """
  small = Constant <value = int64[4] {0, 4, 1, 3}> ()
  s1 = Constant <value = int64[3] {0, 1, -1}> ()
  o1 = Constant <value = float[1] {1}> ()
  z1 = Constant <value = float[1] {0}> ()
  s8 = Constant <value = int64[3] {1, 8, -1}> ()
  o8 = Constant <value = float[8] {1, 1, 1, 1, 1, 1, 1, 1}> ()
  z8 = Constant <value = float[8] {0, 0, 0, 0, 0, 0, 0, 0}> ()
  x2 = Concat <axis = 3> (x, x)
  kernel = Constant <value = float[1,1,2,2] {1, 2, 3, 4}> ()
"""


def code_of(name):
    return name.partition("-")[0]


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_trips_a_rule(name, tmp_path):
    trips, _, options, criteria = CASES[name]
    assert code_of(name) in codes(graph(MORE + trips, **options), tmp_path, **criteria)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_comes_close(name, tmp_path):
    _, close, options, criteria = CASES[name]
    assert code_of(name) not in codes(graph(MORE + close, **options), tmp_path, **criteria)


@pytest.mark.parametrize("name", CASES)
def test_the_same_in_a_body(name, tmp_path):
    trips, close, options, criteria = CASES[name]
    for body, expected in ((trips, True), (close, False)):
        found = judge(branch(MORE + body, **options), tmp_path, **criteria)
        places = [where for code, _, where in found if code == code_of(name)]
        assert bool(places) == expected
        assert all("y/" in where or where == "y" for where in places)


def test_every_rule_of_graphs_has_a_case_here():
    """The others have tests of their own: files, proof, targets, and what is no graph."""
    apart = {"LS001", "LS301", "LS305", *(f"LS40{n}" for n in range(1, 5))}
    rules = {r.code for r in catalog.RULES if "onnx" in r.kinds and r.code < "LS7"}
    assert {code_of(name) for name in CASES} == rules - apart


# --- the walk -------------------------------------------------------------------------------


def test_the_affine_of_a_groupnorm_is_none(tmp_path):
    report = ls.check(save(graph(GROUPNORM), tmp_path), dynamic="any")
    assert report.findings == ()
    (checked,) = report.checked
    assert [x.class_name for x in checked.layers] == ["InstanceNormalization", "BatchNormalization"]
    assert checked.examined == 4 + CONSTANTS.count("Constant")
    norm = checked.layers[0]
    assert (norm.groups, norm.channels, norm.elements) == (2, 4, 18)
    assert norm.epsilon == pytest.approx(0.001)
    assert norm.dtype == "float32"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("z, z, o)", "z, n, o)", "LS101"),
        ("z, z, o)", "z, z, n)", "LS101"),
        ("<epsilon = 0.0>", "<epsilon = 0.001>", "LS101"),
        ("<epsilon = 0.0>", "", "LS101"),
        ("<epsilon = 0.0>", "<epsilon = 0.0, training_mode = 1>", "LS101"),
        ("InstanceNormalization <epsilon = 0.001> (f, o2, z2)", "Relu (f)", "LS104"),
        ("r = Reshape (i, back)", "r = Relu (i)", "LS104"),
        ("(r, g, z, z, o)", "(x, g, z, z, o)", "LS104"),
    ],
)
def test_anything_else_is_left_over_or_astray(old, new, code, tmp_path):
    assert old in GROUPNORM
    found = judge(graph(GROUPNORM.replace(old, new)), tmp_path, select="LS1")
    assert [(c, where) for c, _, where in found] == [(code, "y")]


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "code"),
    [
        (13, "", "y", None),
        (13, "", "y, m", "LS101"),
        (9, "", "y, m, v, sm, sv", "LS101"),
        (14, ", training_mode = 0", "y", None),
        (6, ", is_test = 1", "y", None),
        (6, ", is_test = 0", "y", "LS101"),
        (6, "", "y", "LS101"),
    ],
)
def test_older_opsets_say_in_other_ways_that_it_trains(opset, attributes, outputs, code, tmp_path):
    body = GROUPNORM.replace(
        "y = BatchNormalization <epsilon = 0.0>",
        f"{outputs} = BatchNormalization <epsilon = 0.0{attributes}>",
    )
    assert judge(graph(body, opset=opset), tmp_path, select="LS1") == (
        [(code, "error", "y")] if code else []
    )


def test_initializers_are_constants_unless_they_are_inputs(tmp_path):
    model = parser.parse_model(graph(GROUPNORM))
    zeros = helper.make_tensor("mean", TensorProto.FLOAT, [4], [0.0] * 4)
    model.graph.initializer.append(zeros)
    model.graph.node[-1].input[3] = "mean"
    assert judge(model, tmp_path) == []
    fed = helper.make_tensor_value_info("mean", TensorProto.FLOAT, [4])
    model.graph.input.append(fed)
    assert judge(model, tmp_path) == [("LS101", "error", "y")]


def test_bodies_are_looked_into_and_named(tmp_path):
    report = ls.check(save(branch(CASES["LS101"][0]), tmp_path), dynamic="any")
    assert [(f.code, f.where) for f in report.findings] == [("LS101", "y/t")]
    assert report.checked[0].layers[0].parents == ("If",)


def test_a_name_of_the_body_s_own_hides_the_one_outside(tmp_path):
    hidden = "z = Constant <value = float[4] {0, 1, 0, 0}> ()" + GROUPNORM
    assert "LS101" in codes(branch(hidden), tmp_path)


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_loops_are_looked_into(kind, tmp_path):
    texts = {
        "Loop": """
  trips = Constant <value = int64 {2}> ()
  go = Constant <value = bool {1}> ()
  y = Loop (trips, go, x) <body = b (int64 k, bool c, float[1,4,3,3] s) =>
    (bool c2, float[1,4,3,3] t) { c2 = Identity (c)
      t = BatchNormalization (s, g, z, z, o) }>""",
        "Scan": """
  y, ys = Scan <num_scan_inputs = 1, body = b (float[4,3,3] s, float[4,3,3] u) =>
    (float[4,3,3] s2, float[1,4,3,3] t) { s2 = Identity (s)
      q = Constant <value = int64[1] {0}> ()
      w = Unsqueeze (u, q)
      t = BatchNormalization (w, g, z, z, o) }> (i0, x)
  i0 = Constant <value = float[4,3,3] {0}> ()""",
    }
    found = judge(graph(texts[kind]), tmp_path, select="LS101")
    assert found == [("LS101", "error", "y/t")]


FUNCTION = """
<domain: "mine", opset_import: ["" : 17]>
norm (a, g, z, o) => (b) { b = BatchNormalization (a, g, z, z, o) }
"""


def test_local_functions_are_looked_into(tmp_path):
    found = judge(graph("y = mine.norm (x, g, z, o)", tail=FUNCTION), tmp_path)
    assert [f for f in found if f[0] != "LS301"] == [("LS101", "error", "norm/b")]


def test_a_training_graph_is_looked_into(tmp_path):
    model = parser.parse_model(graph("y = Relu (x)"))
    bad = parser.parse_model(graph("y = BatchNormalization (x, g, z, z, o)"))
    model.training_info.add().algorithm.CopyFrom(bad.graph)
    found = judge(model, tmp_path, select="LS1")
    assert found == [("LS101", "error", "training_info[0]/y")]


# --- operators and versions -----------------------------------------------------------------


def test_the_checker_has_its_say(tmp_path):
    body = "q = Concat (x, x)\n y = Relu (x)"  # axis is missing
    report = ls.check(save(graph(body), tmp_path), dynamic="any")
    assert [f.code for f in report.findings] == ["LS301"]
    assert "axis" in report.findings[0].message
    assert judge(graph(body.replace("(x, x)", "<axis = 0> (x, x)")), tmp_path) == []
    assert codes(branch(body), tmp_path) == {"LS301"}


def test_what_a_rule_says_the_checker_needs_not_repeat(tmp_path):
    assert codes(graph("y = Gelu (x)"), tmp_path) == {"LS302"}


def test_functions_in_a_circle(tmp_path):
    tail = """
<domain: "mine", opset_import: ["" : 17, "mine" : 1]>
norm (a) => (b) { b = mine.norm (a) }
"""
    assert codes(graph("y = mine.norm (x)", tail=tail), tmp_path) == {"LS301"}


def test_functions_that_double_at_each_step(tmp_path):
    steps = 40
    model = parser.parse_model(graph("y = mine.f0 (x)"))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for step in range(steps):
        domain, inner = ("mine", f"f{step + 1}") if step < steps - 1 else ("", "Relu")
        nodes = [
            helper.make_node(inner, ["a"], ["t"], domain=domain),
            helper.make_node(inner, ["t"], ["b"], domain=domain),
        ]
        model.functions.append(
            helper.make_function("mine", f"f{step}", ["a"], ["b"], nodes, imports)
        )
    assert judge(model, tmp_path, ignore="LS301") == []  # and before the end of time


def test_a_file_from_the_future_is_undetermined(tmp_path):
    model = parser.parse_model(graph("y = Relu (x)"))
    model.ir_version = onnx.IR_VERSION + 1
    assert judge(model, tmp_path) == [("LS301", "undetermined", "")]
    model = parser.parse_model(graph("y = Invented (x)"))
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    assert judge(model, tmp_path) == [("LS302", "undetermined", "y")]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"min_opset": 17}, []),
        ({"max_opset": 17}, []),
        ({"min_opset": 18}, ["LS305"]),
        ({"max_opset": 16}, ["LS305"]),
        ({"min_opset": 13, "max_opset": 16}, ["LS305"]),
    ],
)
def test_the_range_of_opsets(fields, found, tmp_path):
    assert [code for code, _, _ in judge(graph("y = Relu (x)"), tmp_path, **fields)] == found


# --- the interface ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "allowed", "found"),
    [
        ("N,4", "none", {"x", "y"}),
        ("N,4", "batch", set()),
        ("N,4", "any", set()),
        ("N,C", "batch", {"x", "y"}),
        ("N,C", "any", set()),
        ("1,4", "none", set()),
    ],
)
def test_open_axes(shape, allowed, found, tmp_path):
    text = (
        HEAD.format(opset=17) + f"main (float[{shape}] x) => (float[{shape}] y) {{ y = Relu (x) }}"
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    findings = ls.check(path, dynamic=allowed).findings
    assert {(f.code, f.where) for f in findings} == {("LS701", name) for name in found}


def test_an_output_without_a_shape(tmp_path):
    path = save(graph("y = Relu (x)"), tmp_path)
    (finding,) = ls.check(path).findings
    assert (finding.code, finding.where) == ("LS701", "y")
    assert "no shape" in finding.message


# --- weights outside the file -----------------------------------------------------------------


IN_A_BODY = """{ c = Constant <value = bool {1}> ()
  y = If (c) <
    then_branch = yes () => (float[1,4] t) { t = MatMul (x, w) },
    else_branch = no () => (float[1,4] e) { e = Identity (x) }
  > }"""


def outside(tmp_path, *, location="w.bin", offset=0, length=None, size=64, value=1.0, body=False):
    """A model whose kernel, perhaps that of a body, is in another file of `size` bytes."""
    operators = IN_A_BODY if body else "{ y = MatMul (x, w) }"
    text = HEAD.format(opset=17) + f"main (float[1,4] x) => (float[1,4] y) {operators}"
    model = parser.parse_model(text)
    graph = model.graph.node[1].attribute[0].g if body else model.graph
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(4, 4))
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": length}
    for key, item in entries.items():
        if item is not None:
            tensor.external_data.add(key=key, value=str(item))
    graph.initializer.append(tensor)
    folder = tmp_path / "model"
    folder.mkdir()
    if size is not None:
        place = folder / "w.bin"
        place.write_bytes(np.full(math.ceil(size / 4), value, "<f4").tobytes()[:size])
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, None),
        ({"length": 64}, None),
        ({"offset": 16, "size": 80}, None),
        ({"size": None}, "LS702"),
        ({"location": "w.bim"}, "LS702"),
        ({"location": "."}, "LS702"),
        ({"location": "w" * 300}, "LS702"),
        ({"size": 63}, "LS703"),
        ({"offset": 4}, "LS703"),
        ({"length": 60}, "LS703"),
        ({"length": "much"}, "LS703"),
        ({"offset": -4}, "LS703"),
        ({"location": None}, "LS703"),
        ({"location": "../outside.bin"}, "LS704"),
        ({"location": "/etc/hostname"}, "LS704"),
        ({"location": "C:\\w.bin"}, "LS704"),
        ({"location": "./w.bin"}, None),
    ],
)
@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_external_data(options, code, weights, body, tmp_path):
    (tmp_path / "outside.bin").write_bytes(bytes(64))
    report = ls.check(outside(tmp_path, body=body, **options), weights=weights)
    found = [f.code for f in report.findings if f.code.startswith("LS70")]
    assert found == ([] if code is None else [code])
    if code is not None:
        assert report.exit_code == 1


def test_a_link_out_of_the_folder(tmp_path):
    path = outside(tmp_path)
    (tmp_path / "elsewhere.bin").write_bytes((path.parent / "w.bin").read_bytes())
    (path.parent / "w.bin").unlink()
    (path.parent / "w.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert [f.code for f in ls.check(path).findings] == ["LS704"]


def test_weights_outside_are_read_on_request_only(tmp_path):
    path = outside(tmp_path, value=math.nan)
    assert ls.check(path).ok
    (finding,) = ls.check(path, weights=True).findings
    assert (finding.code, finding.where) == ("LS601", "w")
    assert finding.message.startswith("16 of its 16 values")


@pytest.mark.parametrize("weights", [False, True])
def test_an_affine_whose_vectors_are_outside(weights, tmp_path):
    """Exporters move all but the shortest tensors out of the file."""
    wide = 300
    model = parser.parse_model(
        graph(GROUPNORM, shape=f"1,{wide},3,3").replace("4, 3, 3", f"{wide}, 3, 3")
    )
    for name, value in (("g", 2.0), ("z", 0.0), ("o", 1.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.full(wide, value, "f4"), name))
    kept = [n for n in model.graph.node if n.output[0] not in ("g", "z", "o")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data")
    assert (tmp_path / "m.data").stat().st_size >= 3 * 4 * wide
    assert ls.check(path, weights=weights, dynamic="any", select="LS1").findings == ()
    (tmp_path / "m.data").unlink()
    found = ls.check(path, weights=weights, dynamic="any", select="LS1,LS702").findings
    assert [f.code for f in found] == ["LS101", "LS702"]


def test_zero_weights_outside(tmp_path):
    findings = ls.check(outside(tmp_path, value=0.0), weights=True).findings
    assert [f.code for f in findings] == ["LS602"]


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_type_that_knows_nan(dtype, tmp_path):
    kind = getattr(TensorProto, {"float64": "DOUBLE", "float32": "FLOAT"}.get(dtype, dtype.upper()))
    for values, bad in (([1.0, math.inf, math.nan], "2 of its 3 values"), ([1.0, 2.0, 0.0], None)):
        model = parser.parse_model(graph("y = Relu (x)"))
        model.graph.initializer.append(helper.make_tensor("w", kind, [3], values))
        findings = ls.check(save(model, tmp_path), weights=True, dynamic="any").findings
        assert [f.message.partition(" are")[0] for f in findings] == ([bad] if bad else [])


@pytest.mark.parametrize("kind", ["sparse", "sparse-attribute", "branch-without-operators"])
def test_weights_in_corners(kind, tmp_path):
    model = parser.parse_model(branch("y = Relu (x)"))
    bad = numpy_helper.from_array(np.array([np.nan], np.float32), "bad")
    places = numpy_helper.from_array(np.array([2], np.int64), "places")
    sparse = helper.make_sparse_tensor(bad, places, [4])
    if kind == "sparse":
        model.graph.sparse_initializer.append(sparse)
    elif kind == "sparse-attribute":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], sparse_value=sparse))
    else:
        value = helper.make_tensor_value_info("bad", TensorProto.FLOAT, [1])
        body = helper.make_graph([], "body", [], [value], [bad])
        model.graph.node[-1].attribute[0].g.CopyFrom(body)
    assert "LS601" in codes(model, tmp_path, weights=True)
    bad.ClearField("raw_data")
    bad.data_location = TensorProto.EXTERNAL
    bad.external_data.add(key="location", value="../elsewhere")
    for tensor in model.graph.sparse_initializer:
        tensor.values.CopyFrom(bad)
    for item in [item for node in model.graph.node for item in node.attribute]:
        if item.HasField("sparse_tensor"):
            item.sparse_tensor.values.CopyFrom(bad)
        if item.HasField("g") and item.g.initializer:
            item.g.initializer[0].CopyFrom(bad)
    assert "LS704" in codes(model, tmp_path)


def test_a_tensor_that_contradicts_itself_is_no_crash(tmp_path):
    model = parser.parse_model(graph(GROUPNORM))
    broken = numpy_helper.from_array(np.zeros(4, np.float32), "mean")
    broken.dims[0] = 5
    model.graph.initializer.append(broken)
    model.graph.node[-1].input[3] = "mean"
    found = codes(model, tmp_path, weights=True)
    assert {"LS101", "LS301"} <= found


# --- files -----------------------------------------------------------------------------------


def test_an_export_of_ours_is_clean(digits_onnx):
    report = ls.check(digits_onnx, weights=True, select="ALL,LS711")
    assert report.ok
    assert report.findings == ()
    norms = [x.class_name for x in report.checked[0].layers]
    assert norms.count("InstanceNormalization") == norms.count("BatchNormalization") > 0
    assert json.loads(report.to_json())["checked"][0]["examined"] > len(norms)


def test_where_a_file_comes_from(digits_onnx, tmp_path):
    model = onnx.load(digits_onnx)
    table = {p.key: p for p in model.metadata_props}["layerswap.groupnorms"]
    sites = json.loads(table.value)
    for changed in (
        [{**sites[0], "groups": sites[0]["groups"] * 2}, *sites[1:]],
        [{**sites[0], "epsilon": 17.0}, *sites[1:]],
        [*sites, sites[0]],
        "nonsense",
    ):
        table.value = changed if isinstance(changed, str) else json.dumps(changed)
        onnx.save(model, tmp_path / "changed.onnx")
        assert [f.code for f in ls.check(tmp_path / "changed.onnx").findings] == ["LS712"]
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    assert ls.check(tmp_path / "bare.onnx").ok
    (finding,) = ls.check(tmp_path / "bare.onnx", select="LS711").findings
    assert finding.code == "LS711"


def test_a_file_that_isn_t_its_reference_s(digits_onnx):
    assert ls.check(digits_onnx).ok
    digits_onnx.write_bytes(digits_onnx.read_bytes() + b"\x12\x01x")  # another producer
    report = ls.check(digits_onnx)
    assert [f.code for f in report.findings] == ["LS713"]
    assert ls.check(digits_onnx, ignore="checksum-mismatch").ok


def test_a_reference_that_can_t_be_read(digits_onnx):
    reference = digits_onnx.with_name(f"{digits_onnx.name}.ref.npz")
    reference.write_bytes(b"nothing")
    assert [f.code for f in ls.check(digits_onnx).findings] == ["LS713"]


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 100, b"PK\x03\x04", b"\x0a" * 10_000, b"\x3a\x00" * 100]
)
def test_what_is_no_graph_is_said(data, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(LoadError) as caught:
        check_onnx_file(path, Criteria())
    assert caught.value.where == str(path)


def test_ten_megabytes_of_nesting(tmp_path):
    """A graph in an attribute of a node of a graph, and so on: more than protobuf descends."""

    def field(number, content):
        size, length = len(content), b""
        while size > 127:
            length += bytes([size & 127 | 128])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    content = b""
    for _ in range(20_000):
        content = field(1, field(5, field(6, content)))  # node, attribute, g
        if len(content) > 10 << 20:
            break
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x08" + field(7, content + bytes(0)))
    with pytest.raises(LoadError, match="damaged"):
        check_onnx_file(path, Criteria())


def test_a_truncated_graph_and_an_absent_one(digits_onnx, tmp_path):
    digits_onnx.write_bytes(digits_onnx.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="damaged"):
        check_onnx_file(digits_onnx, Criteria())
    with pytest.raises(LoadError, match="no such file"):
        check_onnx_file(tmp_path / "absent.onnx", Criteria())
