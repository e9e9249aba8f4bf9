"""Graphs in float16: what changes, what stays, and that it computes the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, parser

import oracle
from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.build import check
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.float16 import to_float16
from layerswap.onnx_graph.groupnorm import expand

RNG = np.random.default_rng(0)


def converted(text, opset=18, **constants):
    """The graph in float16 as a complete, checked model; and its initializers."""
    head = f'<ir_version: 8, opset_import: ["": {opset}, "layerswap": 1]>\n'
    model = parser.parse_model(head + text)
    values = {name: np.asarray(value) for name, value in constants.items()}
    to_float16(model, values)
    expand(model, values)
    canonicalize(model, values)
    check(model, values)
    return graphs.complete(model, values), values


def run(model, **inputs):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def types(model):
    """Element type of every tensor that a node of a type makes."""
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*known.value_info, *known.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    return {(n.op_type, kinds[name]) for n in known.node for name in n.output}


NET = """g (float[N,3,H,W] x) => (float[N,4,H,W] y) {
  c = Conv<pads = [1,1,1,1]>(x, w)
  n = layerswap.GroupNorm<groups = 2, channels = 4, epsilon = 0.001, path = "gn",
                          shape = [-1,4,-1,-1]>(c, gamma, beta)
  r = Relu(n)
  y = Conv<pads = [0,0,0,0]>(r, v, b)
}"""


@pytest.mark.parametrize("opset", [13, 18])
def test_convolutions_are_halved_and_normalisation_is_not(opset):
    weights = {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 1, 1), "b": normal(4)}
    affine = {"gamma": normal(4), "beta": normal(4)}
    model, values = converted(NET, opset, **weights, **affine)
    made = types(model)
    assert ("Conv", TensorProto.FLOAT16) in made
    assert ("Conv", TensorProto.FLOAT) not in made
    assert ("Relu", TensorProto.FLOAT16) in made
    for op_type in ("InstanceNormalization", "BatchNormalization"):
        assert {kind for op, kind in made if op == op_type} == {TensorProto.FLOAT}
    kinds = Counter(v.dtype.name for v in values.values() if v.ndim > 1)
    assert kinds == {"float16": 2}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT

    x = normal(2, 3, 6, 5)
    double = {name: value.astype(np.float64) for name, value in {**weights, **affine}.items()}
    c = convolve(np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)]), double["w"])
    n = oracle.group_norm(c, 2, double["gamma"], double["beta"], 1e-3, axis=1)
    expected = convolve(np.maximum(n, 0), double["v"]) + double["b"].reshape(4, 1, 1)
    (got,) = run(model, x=x)
    np.testing.assert_allclose(got, expected, atol=5e-3 * np.abs(expected).max())


def convolve(x, w):
    height, width = (x.shape[i] - w.shape[i] + 1 for i in (2, 3))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    assert windows.shape[2:4] == (height, width)
    return np.einsum("nihwab,oiab->nohw", windows, w)


def test_sizes_and_indices_keep_their_digits():
    """Neither fits into float16: 4097 would become 4096, 70000 infinite."""
    text = """g (float[N] x, float[M] index) => (float[K] cut, float[M] taken) {
      shape = Shape(x)
      size = Cast<to = 1>(shape)
      half = Mul(size, factor)
      whole = Cast<to = 7>(half)
      start = Sub(whole, one)
      cut = Slice(x, zero, start)
      number = Cast<to = 7>(index)
      taken = Gather(table, number)
    }"""
    table = np.zeros(70_001, np.float32)
    table[[4097, 70_000]] = 1, 2
    one, zero = (np.array([n], np.int64) for n in (1, 0))
    factor = np.array([1.0], np.float32)
    model, _ = converted(text, table=table, one=one, zero=zero, factor=factor)
    x = np.arange(4097, dtype=np.float32) % 1000
    cut, taken = run(model, x=x, index=np.array([4097, 70_000, 3], np.float32))
    np.testing.assert_array_equal(cut, x[:4096])
    np.testing.assert_array_equal(taken, [1, 2, 0])


def test_scales_of_a_resize_stay_float32():
    text = """g (float[1,1,4,4] x) => (float[1,1,8,8] y) {
      z = Conv(x, w)
      y = Resize<mode = "nearest">(z, , scales)
    }"""
    scales = np.array([1, 1, 2, 2], np.float32)
    w = np.full((1, 1, 1, 1), 2, np.float32)
    model, values = converted(text, scales=scales, w=w)
    assert sorted(v.dtype.name for v in values.values()) == ["float16", "float32"]
    assert ("Resize", TensorProto.FLOAT16) in types(model)
    x = normal(1, 1, 4, 4)
    (got,) = run(model, x=x)
    np.testing.assert_allclose(got, np.kron(2 * x, np.ones((2, 2))), rtol=2e-3)


def test_branches_stay_float32_and_get_float32():
    """As do other readers of their weights, which would else be in the file twice."""
    text = """g (float[2,3] x, bool p) => (float[2,3] y) {
      c = MatMul(x, v)
      d = Relu(c)
      z = If(p) <
        then_branch = t () => (float[2,3] u) { u = Neg(d) },
        else_branch = e () => (float[2,3] s) { a = MatMul(d, w) s = Add(a, d) }
      >
      y = MatMul(z, w)
    }"""
    v, w = normal(3, 3), normal(3, 3)
    model, values = converted(text, v=v, w=w)
    assert sorted(v.dtype.name for v in values.values()) == ["float16", "float32"]
    x = normal(2, 3)
    d = np.maximum(x @ v, 0)
    for p, expected in ((True, -d @ w), (False, (d @ w + d) @ w)):
        (got,) = run(model, x=x, p=np.array(p))
        np.testing.assert_allclose(got, expected, atol=2e-2)


def test_an_output_and_a_tensor_read_twice():
    text = """g (float[2,3] x) => (float[2,3] y, float[2,3] z, float[2,3] e) {
      y = MatMul(x, w)
      z = Add(y, b)
      e = Exp(y)
    }"""
    w, b = normal(3, 3), normal(3)
    model, _ = converted(text, w=w, b=b)
    assert [n.op_type for n in model.graph.node].count("Cast") == 3
    x = normal(2, 3)
    y, z, e = run(model, x=x)
    assert y.dtype == z.dtype == np.float32
    np.testing.assert_allclose(y, x @ w, atol=5e-3)
    np.testing.assert_allclose(z, x @ w + b, atol=5e-3)
    np.testing.assert_allclose(e, np.exp(x @ w), rtol=1e-2)
    assert [v.name for v in model.graph.output] == ["y", "z", "e"]


def halved(text, **constants):
    """Operators that compute in float16."""
    made = types(converted(text, **constants)[0])
    return {op for op, kind in made if kind == TensorProto.FLOAT16} - {"Cast"}


CHAIN = """g (float[2,3] x) => (float[2,3] y) {{
  d = MatMul(x, w)
  {middle}
  y = MatMul(r, w)
}}"""


@pytest.mark.parametrize(
    ("middle", "constant", "is_half"),
    [
        ("r = Mul(d, k)", 0.5, True),
        ("r = Mul(d, k)", 0.0, True),
        ("r = Mul(d, k)", 500, False),
        ("r = Mul(d, k)", 7e4, False),
        ("r = Mul(d, k)", 1e-4, False),
        ("r = Div(d, k)", 255, True),
        ("r = Div(d, k)", 0.001, False),
        ("r = Div(d, k)", 0.0, False),
        ("r = Div(k, d)", 1.0, False),
        ("r = Add(d, k)", -123.7, True),
        ("r = Add(d, k)", -1e9, False),
        ("r = Add(d, k)", 1e-9, False),
        ("r = Min(d, k)", 1e6, False),
        ("r = Max(d, k)", -np.inf, True),
        ("r = Max(d, k)", 1e-12, False),
        ("s = Neg(d) r = Mul(s, d)", 0, False),
        ("s = Sigmoid(d) r = Mul(s, d)", 0, True),
        ("s = Clip(d, k, k) r = Mul(s, d)", 3.0, True),
        ("e = Exp(d) r = Mul(e, d)", 0, False),
        ("s = Div(d, d) r = Identity(s)", 0, False),
    ],
)
def test_arithmetic_behind_a_product(middle, constant, is_half):
    text = CHAIN.format(middle=middle)
    made = halved(text, w=normal(3, 3), k=np.asarray(constant, np.float32))
    op_type = middle.split("= ")[-1].split("(")[0]
    if op_type == "Identity":
        op_type = "Div"
    assert made == {"MatMul"} | ({op_type} if is_half else set()) | (made & {"Neg", "Sigmoid"}) | (
        made & {"Clip"}
    )


def test_products_that_are_summed_stay_float32():
    text = """g (float[2,3] x) => (float[2,1] y) {
      a = MatMul(x, w)
      b = MatMul(x, v)
      p = Mul(a, b)
      y = ReduceSum(p, axes)
    }"""
    axes = np.array([1], np.int64)
    assert halved(text, w=normal(3, 3), v=normal(3, 3), axes=axes) == {"MatMul"}


def test_squares_by_a_matrix_product_stay_float32():
    text = """g (float[2,3] x) => (float[2,2] y) {
      a = MatMul(x, w)
      t = Transpose<perm = [1, 0]>(a)
      y = MatMul(a, t)
    }"""
    model, _ = converted(text, w=np.full((3, 3), 100, np.float32))
    x = normal(2, 3)
    a = 100 * x @ np.ones((3, 3))
    (got,) = run(model, x=x)
    np.testing.assert_allclose(got, a @ a.T, rtol=1e-2)


def test_a_weight_too_large_for_float16_keeps_its_node_in_float32():
    text = "g (float[2,3] x) => (float[2,3] y) { s = Reshape(w, shape) y = MatMul(x, s) }"
    w, shape = normal(9) * np.float32(70_000), np.array([3, 3], np.int64)
    model, values = converted(text, w=w, shape=shape)
    assert not any(v.dtype == np.float16 for v in values.values())
    x = normal(2, 3)
    np.testing.assert_allclose(run(model, x=x)[0], x @ w.reshape(3, 3), rtol=1e-5, atol=1)


def test_a_model_in_float64_is_named_with_the_remedy():
    text = "g (double[2,3] x) => (double[2,3] y) { y = MatMul(x, w) }"
    with pytest.raises(ExportError, match="computes in float64") as caught:
        converted(text, w=np.ones((3, 3)))
    assert caught.value.where == "w"
    assert "--fp16" in caught.value.hint


@pytest.mark.parametrize(
    ("largest", "others", "is_half"),
    [
        (1.0, 1e-20, True),
        (65_504.0, 1.0, True),
        (65_600.0, 1.0, False),
        (7e-5, 7e-5, True),
        (4e-5, 4e-5, False),  # below float16's normal numbers
        (7e-5, 2.9e-8, False),  # 8 % of the norm would be lost
        (0.0, 0.0, True),
    ],
)
def test_weights_that_fit(largest, others, is_half):
    text = "g (float[2,200] x) => (float[2,200] y) { y = MatMul(x, w) }"
    w = np.full((200, 200), others, np.float32)
    w[0, 0] = largest
    assert halved(text, w=w) == ({"MatMul"} if is_half else set())


@pytest.mark.parametrize(("window", "is_half"), [(4, True), (8, False)])
def test_large_windows_are_averaged_in_float32(window, is_half):
    text = """g (float[1,1,16,16] x) => (float[1,1,H,W] y) {
      c = Conv(x, w)
      y = AveragePool<kernel_shape = [SIZE, SIZE]>(c)
    }""".replace("SIZE", str(window))
    made = halved(text, w=np.ones((1, 1, 1, 1), np.float32))
    assert made == {"Conv"} | ({"AveragePool"} if is_half else set())
