"""Equal graphs come out as equal bytes, whatever their names and order were."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import helper, parser
from onnx.reference import ReferenceEvaluator

from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.canonical import canonicalize

TEXT = """<ir_version: 8, opset_import: ["ai.onnx.ml" : 2, "" : 17]>
graph (float[unk__1,3,unk__2] image, float[unk__1,3,unk__2] other)
=> (float[unk__1,3,u] b, float[q,3,u] a)
<float one = {1}, float uno = {1}, float two = {2}, float unused = {9}> {
  p = Add(image, two)
  q = Mul(p, one)
  r = Mul(q, other)
  dead = Neg(r)
  s = LeakyRelu<alpha = 0.5>(r)
  b = Sub(s, uno)
  a = Relu(p)
}"""


def canonical(model, **options):
    light, constants = graphs.lighten(model)
    canonicalize(light, constants, **options)
    result = graphs.complete(light, constants)
    onnx.checker.check_model(result, full_check=True)
    return result


def shuffled(model, seed):
    """The same graph under other names, with nodes and initializers in another legal order."""
    rng = random.Random(seed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    public = {v.name for v in (*graph.input, *graph.output)}
    inner = {n for node in graph.node for n in (*node.input, *node.output)} - public
    inner |= {t.name for t in graph.initializer}
    names = {old: f"x{rng.random()}" for old in sorted(inner)}
    for node in graph.node:
        node.name = f"n{rng.random()}"
        graphs.replace_all(node.input, [names.get(n, n) for n in node.input])
        graphs.replace_all(node.output, [names.get(n, n) for n in node.output])
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    ready = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    waiting, order = list(graph.node), []
    while waiting:
        node = rng.choice([n for n in waiting if ready.issuperset(n.input)])
        waiting.remove(node)
        order.append(node)
        ready.update(node.output)
    graphs.replace_all(graph.node, order)
    graphs.replace_all(graph.initializer, rng.sample(list(graph.initializer), 4))
    graphs.replace_all(result.opset_import, reversed(result.opset_import))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_names_and_order_do_not_reach_the_bytes(seed):
    model = parser.parse_model(TEXT)
    first = canonical(model).SerializeToString()
    assert canonical(shuffled(model, seed)).SerializeToString() == first


def test_a_second_run_changes_nothing_and_the_input_stays():
    model = parser.parse_model(TEXT)
    before = model.SerializeToString()
    once = canonical(model)
    assert canonical(once) == once
    assert model.SerializeToString() == before


def test_computes_the_same():
    model = parser.parse_model(TEXT)
    inputs = {
        n: np.random.default_rng(1).normal(size=(2, 3, 4)).astype("f") for n in ("image", "other")
    }
    for a, b in zip(
        ReferenceEvaluator(canonical(model)).run(None, inputs),
        ReferenceEvaluator(model).run(None, inputs),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_public_names_stay_and_the_rest_is_tidy():
    model = parser.parse_model(TEXT)
    model.doc_string = model.graph.doc_string = "made on Tuesday"
    result = canonical(model, version="1.2", metadata={"z": "1", "a": "2"})
    assert [v.name for v in result.graph.input] == ["image", "other"]
    assert [v.name for v in result.graph.output] == ["b", "a"]
    assert [n.op_type for n in result.graph.node] == [
        "Add",
        "Mul",
        "Mul",
        "LeakyRelu",
        "Sub",
        "Relu",
    ]
    assert [float(onnx.numpy_helper.to_array(t)) for t in result.graph.initializer] == [2, 1]
    assert [(o.domain, o.version) for o in result.opset_import] == [("", 17)]
    assert [(p.key, p.value) for p in result.metadata_props] == [("a", "2"), ("z", "1")]
    assert (result.producer_name, result.producer_version) == ("layerswap", "1.2")
    assert not result.doc_string
    assert not result.graph.doc_string
    assert not result.graph.value_info


def test_axes_are_named_after_where_they_first_occur():
    result = canonical(parser.parse_model(TEXT))
    axes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*result.graph.input, *result.graph.output)
    ]
    assert axes == [
        ["image_0", 3, "image_2"],
        ["image_0", 3, "image_2"],
        ["image_0", 3, "b_2"],
        ["a_0", 3, "b_2"],
    ]


def test_inner_names_never_clash_with_public_ones():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[2] t1) => (float[2] w0) <float c = {2}> { h = Add(t1, c) w0 = Relu(h) }"""
    )
    result = canonical(model)
    written = [n for node in result.graph.node for n in node.output]
    assert len({*written, "t1", *(t.name for t in result.graph.initializer)}) == 4


def test_constant_outputs_keep_their_names():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[1] x) => (float[1] k, float[1] y) <float[1] c = {2}, float[1] k = {2}>
        { y = Add(x, c) }"""
    )
    result = canonical(model)
    k, y = ReferenceEvaluator(result).run(None, {"x": np.array([1], "float32")})
    assert (k, y) == ([2], [3])


def test_attributes_are_sorted():
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)
    graphs.replace_all(node.attribute, reversed(node.attribute))
    values = [helper.make_tensor_value_info(n, 1, [2, 2]) for n in ("x", "w", "y")]
    graph = helper.make_graph([node], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert [a.name for a in canonical(model).graph.node[0].attribute] == ["alpha", "transB"]


LOOP = """<ir_version: 8, opset_import: ["" : 18]>
g (float[2] x, int64 n) => (float[2] last) <bool yes = {1}, float two = {2}> {
  start = Mul(x, two)
  last = Loop(n, yes, start) <body = inner (int64 i, bool go, float[2] state)
    => (bool on, float[2] next) <float half = {0.5}> {
      on = Identity(go)
      h = Mul(state, half)
      s = Add(h, two)
      next = Add(s, start)
    }>
}"""


def test_loop_bodies_are_renamed_with_what_they_read_from_outside():
    model = parser.parse_model(LOOP)
    renamed = parser.parse_model(
        LOOP.replace("start", "begin")
        .replace("two", "zwei")
        .replace("half", "x9")
        .replace("h =", "x7 =")
        .replace("h,", "x7,")
    )
    result = canonical(model)
    assert canonical(renamed) == result
    assert canonical(result) == result
    inputs = {"x": np.array([1, -2], "float32"), "n": np.array(3)}
    for a, b in zip(
        ReferenceEvaluator(result).run(None, inputs),
        ReferenceEvaluator(model).run(None, inputs),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


BODY = """<ir_version: 8, opset_import: ["" : 18]>
g (float[n,2] x, int64 count) => (float[n,2] last, float[k,u,2] all) <bool yes = {1}> {
  last, all = Loop(count, yes, x) <body = inner (int64 i, bool go, float[unk__7,2] state)
    => (bool on, float[unk__8,2] FIRST, float[unk__7,2] SECOND) {
      on = Identity(go)
      s = Add(state, state)
      t = Neg(s)
      copy = Identity(t)
      unused = Relu(s)
    }>
}"""


def loop(first, second, axis):
    text = BODY.replace("FIRST", first).replace("SECOND", second).replace("unk__", axis)
    return parser.parse_model(text)


def test_axes_and_repeated_outputs_of_bodies_have_one_form():
    result = canonical(loop("t", "copy", "unk__"))
    assert canonical(loop("copy", "t", "unk__9")) == result
    assert canonical(result) == result
    body = next(graphs.subgraphs(result.graph.node[0]))
    assert [n.op_type for n in body.node] == ["Identity", "Add", "Neg", "Identity"]
    looped = (*body.input[2:], *body.output[1:])
    axes = [value.type.tensor_type.shape.dim[0].dim_param for value in looped]
    assert axes == ["axis0", "axis1", "axis0"]
    inputs = {"x": np.array([[1, -2]], "float32"), "count": np.array(3)}
    for a, b in zip(
        ReferenceEvaluator(result).run(None, inputs),
        ReferenceEvaluator(loop("copy", "t", "unk__")).run(None, inputs),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_outputs_that_are_one_tensor_have_one_form(order):
    computed, copied = order
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] a, float[2] b, float[2] c, float[2] d) {{
          {computed} = Neg(x)
          {copied} = Identity({computed})
          c = Add({copied}, {computed})
          d = Identity(x)
        }}"""
    )
    result = canonical(model)
    made = [(n.op_type, *n.input, *n.output) for n in result.graph.node]
    assert made == [
        ("Neg", "x", "a"),
        ("Identity", "a", "b"),
        ("Add", "a", "a", "c"),
        ("Identity", "x", "d"),
    ]


def test_bodies_read_what_an_identity_copied():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[2] x, bool flag) => (float[2] y) {
          p = Neg(x)
          q = Identity(p)
          y = If(flag) <then_branch = yes () => (float[2] r) { r = Relu(q) },
                        else_branch = no () => (float[2] s) { s = Abs(q) }>
        }"""
    )
    result = canonical(model)
    assert [n.op_type for n in result.graph.node] == ["Neg", "If"]
    for flag in (True, False):
        inputs = {"x": np.array([1, -2], "float32"), "flag": np.array(flag)}
        np.testing.assert_array_equal(
            ReferenceEvaluator(result).run(None, inputs)[0],
            ReferenceEvaluator(model).run(None, inputs)[0],
        )
