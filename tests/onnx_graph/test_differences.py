"""`diff` on ONNX graphs: what a new export changes is no difference, and every change is told."""

import contextlib
import itertools
import os
import random

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

import layerswap as ls
from groupnorm_graphs import expanded, model_of, randomized
from layerswap.difference_text import describe
from layerswap.errors import LoadError
from layerswap.onnx_graph.alignment import common
from layerswap.onnx_graph.profiles import PROFILES
from layerswap.records import PROFILE_OPSETS
from random_graphs import CODES, LIMITS, models


def parsed(body, signature="float[2,4] x) => (float[2,4] y", weights="", functions="", opset=17):
    return parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}, "mine" : 1]>
        main ({signature}) {weights} {{ {body} }} {functions}"""
    )


def compared(one, other, folder, **options):
    paths = [folder / "a.onnx", folder / "b.onnx"]
    for path, model in zip(paths, (one, other), strict=True):
        path.write_bytes(model.SerializeToString())
    return ls.diff(*paths, **options)


def told(report):
    return [(d.code, d.where) for d in report.differences]


def copied(model):
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


BASE = parsed(
    """
    h = MatMul (x, w)
    b = Add (h, bias)
    n = BatchNormalization <epsilon = 0.001> (b, scale, shift, mean, variance)
    r = Relu (n)
    axes = Constant <value = int64[1] {1}> ()
    u = Unsqueeze (r, axes)
    s = Squeeze (u, axes)
    y = LeakyRelu <alpha = 0.5> (s)
    """,
    weights="""<float[4,4] w = {1,2,3,4, 5,6,7,8, 9,8,7,6, 5,4,3,2}, float[4] bias = {1,2,3,4},
    float[4] scale = {1,2,1,2}, float[4] shift = {0,1,0,1}, float[4] mean = {0,0,1,1},
    float[4] variance = {1,2,3,4}>""",
)


def changed(change):
    model = copied(BASE)
    change(model, {node.output[0]: node for node in model.graph.node})
    return model


def test_a_model_doesn_t_differ_from_itself(tmp_path):
    report = compared(BASE, BASE, tmp_path, exit_code=True)
    assert (report.differences, report.findings, report.exit_code) == ((), (), 0)


# --- what a new export changes ----------------------------------------------------------------


@st.composite
def graphs_of_operators(draw):
    """A graph in which everything may be like everything else, with its weights."""
    nodes, weights, tensors = [], [], ["x"]
    for number in range(draw(st.integers(1, 14))):
        op = draw(st.sampled_from(["Relu", "Abs", "Add", "Sub", "MatMul", "MatMul", "Max"]))
        inputs = [draw(st.sampled_from(tensors))]
        if op == "MatMul":
            value = np.full((4, 4), draw(st.integers(1, 3)), np.float32)
            weights.append(numpy_helper.from_array(value, f"w{number}"))
            inputs.append(f"w{number}")
        elif op in ("Add", "Sub", "Max"):
            inputs.append(draw(st.sampled_from(tensors)))
        nodes.append(helper.make_node(op, inputs, [f"t{number}"], f"n{number}"))
        tensors.append(f"t{number}")
    used = {name for node in nodes for name in node.input}
    ends = [name for name in tensors[1:] if name not in used]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", *ends)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def scrambled(model, seed):
    """The same in another order, under other names, with some weights as Constant nodes."""
    rng = random.Random(seed)
    result = copied(model)
    graph = result.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    names = {}

    def renamed(name):
        if not name or name in kept:
            return name
        return names.setdefault(name, f"{rng.randrange(1 << 30)}/{len(names)}")

    waiting = list(graph.node)
    known = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    order = []
    while waiting:
        node = rng.choice([n for n in waiting if known.issuperset(n.input)])
        waiting.remove(node)
        known.update(node.output)
        order.append(node)
    weights = rng.sample(list(graph.initializer), len(graph.initializer))
    nodes = []
    for weight in weights:
        weight.name = renamed(weight.name)
        if rng.random() < 0.5:
            nodes.append(helper.make_node("Constant", [], [weight.name], value=weight))
    nodes += order
    for node in order:
        node.name = f"node {rng.random()}"
        for field in (node.input, node.output):
            new = list(map(renamed, field))
            del field[:]
            field.extend(new)
    for weight in [w for w in weights if any(n.output[0] == w.name for n in nodes)]:
        weights.remove(weight)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    tensors = [TensorProto.FromString(weight.SerializeToString()) for weight in weights]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(tensors)
    return result


@LIMITS
@given(model=graphs_of_operators(), seed=st.integers(0, 1 << 20))
def test_order_names_and_where_constants_are_make_no_difference(model, seed, tmp_path):
    assert compared(model, scrambled(model, seed), tmp_path).differences == ()


@LIMITS
@given(model=graphs_of_operators(), seed=st.integers(0, 1 << 20), data=st.data())
def test_one_weight_is_found_among_operators_that_are_alike(model, seed, data, tmp_path):
    weights = list(model.graph.initializer)
    if weights:
        chosen = data.draw(st.sampled_from(weights))
        other = copied(model)
        tensor = next(t for t in other.graph.initializer if t.name == chosen.name)
        value = numpy_helper.to_array(tensor).copy()
        value[2, 1] += 0.5
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        (difference,) = compared(model, scrambled(other, seed), tmp_path).differences
        assert difference.code == "LS906"
        assert (difference.norms["difference"], difference.norms["largest"]) == (0.5, 0.5)


@LIMITS
@given(model=graphs_of_operators(), data=st.data())
def test_what_is_said_to_be_the_same_computes_the_same(model, data, tmp_path):
    """One input is taken from elsewhere; onnx's own evaluator says whether that matters."""
    other = copied(model)
    place = data.draw(st.integers(0, len(model.graph.node) - 1))
    earlier = ["x", *(node.output[0] for node in model.graph.node[:place])]
    other.graph.node[place].input[0] = data.draw(st.sampled_from(earlier))
    if not compared(model, scrambled(other, place), tmp_path).differences:
        x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
        for one, two in zip(
            *(ReferenceEvaluator(m).run(None, {"x": x}) for m in (model, other)), strict=True
        ):
            assert np.array_equal(one, two)


def test_defaults_and_old_ways_to_list_weights_make_no_difference(tmp_path):
    one = parsed("y = LeakyRelu (x)")
    assert not compared(one, parsed("y = LeakyRelu <alpha = 0.01> (x)"), tmp_path).differences
    old = copied(BASE)
    for tensor in old.graph.initializer:
        old.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    assert not compared(BASE, old, tmp_path).differences


# --- each change by itself --------------------------------------------------------------------


def _alpha(model, nodes):
    nodes["y"].attribute[0].f = 0.25


def _operator(model, nodes):
    nodes["r"].op_type = "Sigmoid"


def _axes(model, nodes):
    nodes["axes"].attribute[0].t.int64_data[0] = 2


def _weight(model, nodes):
    model.graph.initializer[0].float_data[3] = 40


def _shape(model, nodes):
    bias = model.graph.initializer[1]
    bias.dims.insert(0, 1)


def _added(model, nodes):
    model.graph.node.append(helper.make_node("Tanh", ["r"], ["t"], "new"))
    nodes["u"].input[0] = "t"
    reordered = sorted(model.graph.node, key=lambda n: [*nodes, "t"].index(n.output[0]))
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _removed(model, nodes):
    nodes["u"].input[0] = "n"
    model.graph.node.remove(nodes["r"])


def _skipped(model, nodes):
    nodes["u"].input[0] = "n"  # and Relu stays, for nobody


def _epsilon(model, nodes):
    nodes["n"].attribute[0].f = 0.01


def _output(model, nodes):
    nodes["y"].output[0] = model.graph.output[0].name = "z"


def _type(model, nodes):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _axis(model, nodes):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"


def _opset(model, nodes):
    model.opset_import[0].version = 16


def _metadata(model, nodes):
    model.metadata_props.add(key="origin", value="here")


def _producer(model, nodes):
    model.producer_name = "me"


def _folded(model, nodes):
    for tensor in list(model.graph.initializer)[2:]:
        model.graph.initializer.remove(tensor)
    nodes["r"].input[0] = "b"
    model.graph.node.remove(nodes["n"])


CHANGES = {
    _alpha: [("LS904", "y")],
    _operator: [("LS904", "r")],
    _axes: [("LS904", "u"), ("LS904", "s")],
    _weight: [("LS906", "w")],
    _shape: [("LS906", "bias")],
    _added: [("LS902", "new")],
    _removed: [("LS903", "r")],
    _skipped: [("LS904", "u")],
    _epsilon: [("LS904", "n")],
    _output: [("LS905", "y")],
    _type: [("LS905", "x")],
    _axis: [("LS905", "x")],
    _opset: [("LS907", "ai.onnx")],
    _metadata: [("LS909", "metadata_props/origin")],
    _producer: [("LS909", "producer_name")],
    _folded: [("LS903", "n")],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_each_change_is_told_as_what_it_is(change, tmp_path):
    report = compared(BASE, changed(change), tmp_path)
    expected = CHANGES[change]
    if change is _axes:  # one constant, of which two operators make use
        expected = expected[:1]
    assert told(report) == expected
    # The other way round it is as many; what was added is removed.
    back = compared(changed(change), BASE, tmp_path)
    other_way = {"LS902": "LS903", "LS903": "LS902"}
    assert [d.code for d in back.differences] == [other_way.get(c, c) for c, _ in expected]


def test_an_operator_that_nothing_is_left_to_compare_with(tmp_path):
    """Both ends differ, so nothing before or behind an operator is as it was."""
    for count in (40, 3_000):  # the second is more than a table of all by all could hold

        def chain(ends, size=count):
            operators = [ends, *["Relu"] * size, ends]
            names = ["x", *(f"{ends}{n}" for n in range(size + 1)), "y"]
            body = [
                f"{b} = {op} ({a})"
                for op, (a, b) in zip(operators, itertools.pairwise(names), strict=True)
            ]
            return parsed("\n".join(body))

        report = compared(chain("Sin"), chain("Cos"), tmp_path)
        assert {d.before for d in report.differences if d.code == "LS904"} <= {"Sin"}
        assert {d.message.split()[0] for d in report.differences} <= {"Sin", "Cos", "operator"}
        assert len(report.differences) <= 4


def test_the_same_weights_are_an_anchor_wherever_they_stand(tmp_path):
    weights = """<float[4,4] a = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2},
    float[4,4] b = {4,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}>"""
    one = parsed("p = MatMul (x, a) q = Relu (p) y = MatMul (q, b)", weights=weights)
    other = parsed(
        "n = Neg (x) p = MatMul (n, a) q = Relu (p) r = MatMul (q, b) y = Exp (r)", weights=weights
    )
    assert told(compared(one, other, tmp_path)) == [("LS902", "n"), ("LS902", "y")]


def blocks(count, values):
    """Alike blocks in a row, each with a residual connection; the one weight of each by value."""
    body, weights, x = [], [], "x"
    for n in range(count):
        body += [f"h{n} = MatMul ({x}, w{n})", f"r{n} = Relu (h{n})", f"a{n} = Add ({x}, r{n})"]
        numbers = ",".join([str(values.get(n, 1))] * 16)
        weights.append(f"float[4,4] w{n} = {{{numbers}}}")
        x = f"a{n}"
    return parsed("\n".join([*body, f"y = Identity ({x})"]), weights=f"<{', '.join(weights)}>")


@pytest.mark.parametrize("place", [0, 7, 14])
def test_the_one_block_that_changed_among_those_that_are_alike(place, tmp_path):
    report = compared(blocks(15, {}), blocks(15, {place: 3}), tmp_path)
    (difference,) = report.differences
    assert (difference.code, difference.where) == ("LS906", f"w{place}")
    assert difference.norms == {
        "before": 4.0, "after": 12.0, "difference": 8.0, "relative": 2.0, "largest": 2.0
    }  # fmt: skip


def test_norms_are_numpy_s_in_float64(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 4)).astype(np.float32)
    b = (a + rng.normal(size=(4, 4)) * 1e-3).astype(np.float32)
    files = []
    for value in (a, b):
        model = copied(BASE)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, "w"))
        files.append(model)
    (difference,) = compared(*files, tmp_path).differences
    x, z = a.astype(np.float64), b.astype(np.float64)
    assert difference.norms == pytest.approx(
        {
            "before": np.linalg.norm(x),
            "after": np.linalg.norm(z),
            "difference": np.linalg.norm(z - x),
            "relative": np.linalg.norm(z - x) / np.linalg.norm(x),
            "largest": np.abs(z - x).max(),
        },
        rel=1e-12,
    )


# --- bodies and functions ---------------------------------------------------------------------


def branches(then="t = Relu (x)", other="e = Neg (x)"):
    model = parsed("c = Constant <value = bool {1}> () y = If (c)")
    for name, body in (("then_branch", then), ("else_branch", other)):
        graph = parser.parse_graph(f"{name} () => (float[2,4] {body.split()[0]}) {{ {body} }}")
        model.graph.node[1].attribute.append(helper.make_attribute(name, graph))
    return model


def test_bodies(tmp_path):
    assert told(compared(branches(), branches(), tmp_path)) == []
    assert told(compared(branches(), branches("u = Relu (x)"), tmp_path)) == []
    assert told(compared(branches(), branches("t = Abs (x)"), tmp_path)) == [("LS904", "y/t")]
    swapped = compared(branches(), branches("t = Neg (x)", "e = Relu (x)"), tmp_path)
    assert {d.code for d in swapped.differences} == {"LS904"}


def function(body="h = MatMul (a, w) b = Relu (h)"):
    head = '<domain: "mine", opset_import: ["" : 17]>'
    return f"{head} block (a, w) => (b) {{ {body} }}"


def test_local_functions_are_what_they_hold(tmp_path):
    weights = "<float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}>"
    call = "p = mine.block (x, w) y = mine.block (p, w)"
    one = parsed(call, weights=weights, functions=function())
    flat = parsed("h = MatMul (x,w) p = Relu (h) k = MatMul (p,w) y = Relu (k)", weights=weights)
    assert told(compared(one, one, tmp_path)) == []
    assert told(compared(one, flat, tmp_path)) == []
    other = parsed(call, weights=weights, functions=function("h = MatMul (a, w) b = Abs (h)"))
    assert told(compared(one, other, tmp_path)) == [("LS904", "p/b"), ("LS904", "y/b")]


def test_functions_that_call_each_other(tmp_path):
    """In a circle, or so often that a small file stands for a graph without end."""
    circle = parsed("y = mine.block (x, x)", functions=function("b = mine.block (a, w)"))
    with pytest.raises(LoadError, match="deep"):
        compared(circle, circle, tmp_path)
    huge = parsed("y = mine.f0 (x)")
    for number in range(40):  # not an operator among them
        node = helper.make_node(f"f{number + 1}", ["a"], ["b"], domain="mine")
        twice = helper.make_node(f"f{number + 1}", ["b"], ["c"], domain="mine")
        imports = [helper.make_opsetid("mine", 1)]
        own = helper.make_function("mine", f"f{number}", ["a"], ["c"], [node, twice], imports)
        huge.functions.append(own)
    huge.functions.append(helper.make_function("mine", "f40", ["a"], ["a"], [], imports))
    with pytest.raises(LoadError, match="more than"):
        compared(huge, huge, tmp_path)


# --- GroupNormalization -----------------------------------------------------------------------

SHAPES = {
    "grouped": ((None, 8, 4, 4), 4),
    "one group": ((None, 8, 4, 4), 1),
    "channels apart": ((None, 8, 4, 4), 8),
    "open axes": ((None, 8, None, None), 4),
    "one axis": ((None, 8, 6), 2),
    "no axis": ((None, 8), 2),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_profile = pytest.mark.parametrize("profile", PROFILES)
LEARNED = ("g", "b")


def norm_graphs(shape, profile, seed=3):
    """A graph with two normalizations in `profile`; the same with BatchNormalization."""
    axes, groups = SHAPES[shape]
    opset = max(18, PROFILE_OPSETS[profile])
    gamma, beta = randomized(8, seed)
    source = model_of(axes, groups, gamma, beta, count=2, opset=opset)
    batch = copied(source)
    for node in batch.graph.node:
        node.op_type, node.domain = "BatchNormalization", ""
        node.input.extend(["mean", "variance"])
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("epsilon", 0.001))
    for name, value in (("mean", 0.3), ("variance", 2.0)):
        array = np.full(8, value, np.float32)
        batch.graph.initializer.append(numpy_helper.from_array(array, name))
    del batch.opset_import[0]
    learned = np.concatenate([gamma, beta]).astype(np.float64)
    return expanded(source, profile), batch, learned


@every_shape
@every_profile
def test_every_spelling_in_the_place_of_batchnorm_is_told_as_that(shape, profile, tmp_path):
    group, batch, learned = norm_graphs(shape, profile)
    _, other, before = norm_graphs(shape, profile, seed=5)
    for tensor in other.graph.initializer:
        if tensor.name in LEARNED:
            next(t for t in batch.graph.initializer if t.name == tensor.name).CopyFrom(tensor)
    report = compared(batch, group, tmp_path)
    assert [d.code for d in report.differences] == ["LS901", "LS901"]
    for difference in report.differences:
        groups = SHAPES[shape][1]
        assert f"{groups} group{'s' * (groups > 1)}, epsilon 0.03" in difference.message
        norm, distance = np.linalg.norm(before), np.linalg.norm(learned - before)
        assert difference.norms["before"] == pytest.approx(norm, rel=1e-12)
        assert difference.norms["difference"] == pytest.approx(distance, rel=1e-12)


@every_shape
@every_profile
def test_each_spelling_against_each(shape, profile, tmp_path):
    group, _, _ = norm_graphs(shape, profile)
    assert compared(group, scrambled(group, 7), tmp_path).differences == ()
    for name in PROFILES:
        other, _, _ = norm_graphs(shape, name)
        differences = compared(group, other, tmp_path).differences
        own = [d for d in differences if d.code not in ("LS907", "LS909")]  # opset, IR version
        assert {(d.code, d.message) for d in own} <= {("LS904", "spelled as")}
    learned, _, _ = norm_graphs(shape, profile, seed=4)
    assert {d.code for d in compared(group, learned, tmp_path).differences} == {"LS906"}


def edited(model, **values):
    """With other constants in the place of all that are equal to a first one."""
    result = copied(model)
    for old, new in values.values():
        found = [t for t in result.graph.initializer if numpy_helper.to_array(t).tolist() == old]
        assert found
        for tensor in found:
            array = np.array(new, numpy_helper.to_array(tensor).dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return result


@pytest.mark.parametrize("profile", ["portable", "plain", "precise", "primitive"])
def test_what_lies_between_the_operators_of_one_spelling_counts(profile, tmp_path):
    """The shape that the last Reshape gives is another: the result is no longer the same."""
    group, _, _ = norm_graphs("grouped", profile)
    other = edited(group, shape=([0, 8, 4, 4], [0, 8, 2, 8]))
    assert {d.code for d in compared(group, other, tmp_path).differences} == {"LS904"}


HAND = """
m = ReduceMean <axes = {axes}, keepdims = {keep}> (x)
c = Sub (x, m)
q = Mul (c, c)
v = ReduceMean <axes = {axes}, keepdims = {keep}> (q)
e = Constant <value = float {{0.001}}> ()
a = Add (v, e)
s = Sqrt (a)
d = Div (c, s)
g = Mul (d, gamma)
y = Add (g, beta)
"""


def by_hand(axes="[2,3]", keep=1, shape="4,1,1", rest="2,2"):
    values = "{1,2,3,4}"
    weights = f"<float[{shape}] gamma = {values}, float[{shape}] beta = {values}>"
    signature = f"float[2,4,{rest}] x) => (float[2,4,{rest}] y"
    return parsed(HAND.format(axes=axes, keep=keep), signature, weights)


def is_one_operator(model, folder):
    findings = compared(parsed("y = Relu (x)"), model, folder).findings
    return any("GroupNormalization" in finding.message for finding in findings)


def test_what_only_looks_like_a_groupnorm_is_none(tmp_path):
    assert is_one_operator(by_hand(), tmp_path)
    assert is_one_operator(by_hand("[1,2,3]"), tmp_path)
    assert not is_one_operator(by_hand("[1]"), tmp_path)  # over the channels of each pixel
    assert not is_one_operator(by_hand("[2]"), tmp_path)
    assert not is_one_operator(by_hand(keep=0), tmp_path)
    assert not is_one_operator(by_hand(shape="1,1,4", rest="2,4"), tmp_path)
    body = """
    a = Reshape (x, there) n = InstanceNormalization (a, one, zero) y = Reshape (n, back)"""
    for there, back in (("0,4,-1", "0,4,2,2"), ("0,2,-1", "0,4,2,2"), ("2,-1,2,2", "0,4,2,2")):
        size = there.count(",") + 1
        weights = f"""<int64[{size}] there = {{{there}}}, int64[4] back = {{{back}}},
        float[4] one = {{1,1,1,1}}, float[4] zero = {{0,0,0,0}}>"""
        model = parsed(body, "float[2,4,2,2] x) => (float[2,4,2,2] y", weights)
        findings = compared(parsed("y = Relu (x)"), model, tmp_path).findings
        form = "as Reshape + InstanceNormalization + Reshape"
        assert any(form in f.message for f in findings) == (there == "0,4,-1")


def test_gamma_along_another_axis_is_another_weight(tmp_path):
    one = by_hand(shape="4,1,1", rest="4,4")
    other = by_hand(shape="1,4,1", rest="4,4")
    assert compared(one, other, tmp_path).differences


def test_what_batchnorm_folded_into_a_convolution_leaves(tmp_path):
    group, _, _ = norm_graphs("grouped", "native")
    plain = parsed("y = Identity (x)", "float[N,8,4,4] x) => (float[N,8,4,4] y", opset=21)
    added = [d for d in compared(plain, group, tmp_path).differences if d.code == "LS902"]
    assert len(added) == 2
    assert all("folded" in d.message and "4 groups" in d.message for d in added)
    assert all(len(describe(d)) < 200 for d in added)  # the text would cut it off


# --- data outside the file --------------------------------------------------------------------


def outside(folder, value, *, name="w.bin", length=None, offset=0):
    model = parsed("y = MatMul (x, w)", weights=f"<float[4,4] w = {{{','.join(['1'] * 16)}}}>")
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", name), ("offset", str(offset)), ("length", str(length or 64))):
        tensor.external_data.add(key=key, value=text)
    folder.mkdir()
    if value is not None:
        (folder / name).write_bytes(bytes(offset) + np.full((4, 4), value, np.float32).tobytes())
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_data_outside_the_file(tmp_path):
    one = outside(tmp_path / "a", 1.0)
    assert ls.diff(one, outside(tmp_path / "b", 1.0, name="other.bin", offset=96)).ok
    report = ls.diff(one, outside(tmp_path / "c", 2.0))
    assert told(report) == [("LS906", "w")]
    assert report.differences[0].norms["relative"] == 1.0
    inside = tmp_path / "d.onnx"
    onnx.save(onnx.load(one), inside)
    assert not ls.diff(one, inside).differences


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"value": None}, "is missing"),
        ({"value": 1.0, "length": 60}, "doesn't hold"),
        ({"value": None, "name": "../a/w.bin"}, "outside"),
        ({"value": None, "name": "a\0b"}, "contradicts"),
        ({"value": None, "name": "n" * 5000}, "contradicts"),
    ],
)
def test_data_that_is_not_there(fields, reason, tmp_path):
    one = outside(tmp_path / "a", 1.0)
    other = outside(tmp_path / "b", **fields)
    for first, second in ((one, other), (other, one), (other, other)):
        report = ls.diff(first, second, exit_code=True)
        assert told(report) == [("LS910", "w")]
        assert reason in report.differences[0].message
        assert report.exit_code == 3


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    one = outside(tmp_path / "a", 1.0)
    other = outside(tmp_path / "b", None)
    os.symlink(tmp_path / "a" / "w.bin", tmp_path / "b" / "w.bin")
    assert told(ls.diff(one, other)) == [("LS910", "w")]


PACKED = ["UINT4", "INT4", "UINT2", "INT2", "FLOAT4E2M1"]


@pytest.mark.parametrize("kind", [k for k in PACKED if k in dict(TensorProto.DataType.items())])
def test_types_of_a_few_bits(kind, tmp_path):
    number = TensorProto.DataType.Value(kind)
    files = []
    for content in (b"\x11\x01", b"\x11\x10"):
        folder = tmp_path / str(len(files))
        size = 3 if "4" in kind else 7
        tensor = TensorProto(name="w", data_type=number, dims=[size], raw_data=content)
        model = parsed("y = Cast <to = 1> (w)")
        model.graph.initializer.append(tensor)
        folder.mkdir()
        files.append(folder / "inside.onnx")
        onnx.save(model, files[-1])
        (folder / "w.bin").write_bytes(content)
        outer = model.graph.initializer[0]
        outer.ClearField("raw_data")
        outer.data_location = TensorProto.EXTERNAL
        outer.external_data.add(key="location", value="w.bin")
        onnx.save_model(model, folder / "outside.onnx")
        assert not ls.diff(folder / "inside.onnx", folder / "outside.onnx").differences
    assert ls.diff(*files).differences


# --- what nobody made on purpose --------------------------------------------------------------


@LIMITS
@given(one=models(), other=models())
def test_any_two_graphs_are_compared_or_refused(one, other, tmp_path):
    with contextlib.suppress(LoadError):
        report = compared(one, other, tmp_path, exit_code=True)
        assert {d.code for d in report.differences} <= CODES
        assert report.exit_code == (1 if any(d.code != "LS910" for d in report.differences) else
                                    3 if report.differences else 0)  # fmt: skip
        assert report.to_json()
    with contextlib.suppress(LoadError):
        assert {d.code for d in compared(one, one, tmp_path).differences} <= {"LS910"}


TENSORS = {
    "too short": {"raw_data": b"123"},
    "too long": {"raw_data": b"1" * 64},
    "no value": {},
    "no such type": {"data_type": 99, "raw_data": b"1" * 16},
    "negative": {"dims": [-4], "raw_data": b"1" * 16},
    "huge": {"dims": [1 << 62, 1 << 62], "raw_data": b"1" * 16},
    "outside, no such type": {"data_type": 99, "data_location": TensorProto.EXTERNAL},
    "outside, text": {"data_type": TensorProto.STRING, "data_location": TensorProto.EXTERNAL},
}


@pytest.mark.parametrize("fields", TENSORS.values(), ids=TENSORS)
def test_a_weight_that_contradicts_itself(fields, tmp_path):
    model = parsed("y = Add (x, w)")
    tensor = TensorProto(**{"name": "w", "data_type": 1, "dims": [4], **fields})
    model.graph.initializer.append(tensor)
    sound = parsed("y = Add (x, w)", weights="<float[4] w = {1,2,3,4}>")
    assert told(compared(model, model, tmp_path)) == [("LS910", "w")]
    assert {d.code for d in compared(sound, model, tmp_path).differences} <= {"LS906", "LS910"}
    model = parsed("y = Relu (x)")
    model.graph.node[0].attribute.append(helper.make_attribute("strange", tensor))
    assert told(compared(model, model, tmp_path)) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = Relu (a) a = Relu (y)", "circle"),
        ("y = Relu (absent)", "nowhere defined"),
        ("y = Relu (y)", "circle"),
    ],
)
def test_graphs_that_are_none(body, message, tmp_path):
    with pytest.raises(LoadError, match=message):
        compared(parsed(body), parsed("y = Relu (x)"), tmp_path)


def test_a_name_defined_twice(tmp_path):
    model = parsed("a = Relu (x) a = Abs (x) y = Relu (a)")
    assert told(compared(model, model, tmp_path)) == []


def test_bodies_in_bodies(tmp_path):
    """As deep as protobuf reads them."""
    graph = parser.parse_graph("g () => (float y) { y = Relu (x) }")
    for _ in range(28):
        node = helper.make_node("If", ["x"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], list(graph.output))
    model = parsed("y = Relu (x)")
    model.graph.node[0].CopyFrom(node)
    with contextlib.suppress(LoadError):
        assert told(compared(model, model, tmp_path)) == []


def test_graphs_without_anything_in_common_end_soon(tmp_path):
    """Every second operator is shared, so that there are as many ways to align them as can be."""

    def chain(other, size=1_500):
        body = [f"t{n + 1} = {('Relu', other)[n % 2]} (t{n})" for n in range(size)]
        return parsed("\n".join([f"t0 = {other} (x)", *body, f"y = {other} (t{size})"]))

    report = compared(chain("Sin"), chain("Cos"), tmp_path)
    assert {d.code for d in report.differences} <= {"LS902", "LS903", "LS904"}


# --- alignment --------------------------------------------------------------------------------


def longest(first, second):
    """Length of the longest common subsequence, by the table that everybody knows."""
    row = [0] * (len(second) + 1)
    for a in first:
        above = row[:]
        for n, b in enumerate(second):
            row[n + 1] = above[n] + 1 if a == b else max(above[n + 1], row[n])
    return row[-1]


@settings(derandomize=True, deadline=None)
@given(first=st.text("abc", max_size=20), second=st.text("abc", max_size=20))
def test_the_alignment_is_as_long_as_there_is(first, second):
    pairs = common(first, second)
    assert len(pairs) == longest(first, second)
    assert all(first[a] == second[b] for a, b in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
