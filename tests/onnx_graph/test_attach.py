"""Weights become initializers, what hangs on them is computed, and files are written whole."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from built import build
from layerswap.errors import ExportError
from layerswap.onnx_graph import files, graphs
from layerswap.onnx_graph.attach import attach
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.files import write
from layerswap.onnx_graph.graphs import lighten
from layerswap.onnx_graph.repairs import repair
from layerswap.onnx_graph.runtimes import open_runtime

HEADER = '<ir_version: 8, opset_import: ["" : 18]>\n'
RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def parsed(text):
    return parser.parse_model(HEADER + text)


def attached(text, arrays):
    """The light graph, its constants and the complete model, checked."""
    model = parsed(text)
    before = model.SerializeToString()
    light, constants = graphs.lighten(model)
    attach(light, constants, arrays)
    assert model.SerializeToString() == before
    complete = graphs.complete(light, constants)
    onnx.checker.check_model(complete, full_check=True)
    return light, constants, complete


def evaluate(model, **inputs):
    return ReferenceEvaluator(model).run(None, inputs)[0]


def operators(model):
    return [node.op_type for node in model.graph.node]


def test_layout_chain_ends_as_one_plain_kernel():
    text = """g (float[N,4,7] x, float16[3,4,8] kernel) => (float[N,8,M] y)
    <int64[1] axis = {0}, int64[4] shape = {1, 3, 4, 8}> {
      cast = Cast<to: int = 1>(kernel)
      wide = Unsqueeze(cast, axis)
      same = Reshape(wide, shape)
      turned = Transpose<perm = [3, 2, 0, 1]>(same)
      copied = Identity(turned)
      images = Unsqueeze(x, two)
      z = Conv(images, copied)
      y = Squeeze(z, two)
    }"""
    text = text.replace("shape = {1, 3, 4, 8}", "shape = {1, 3, 4, 8}, int64[1] two = {2}")
    kernel = normal(3, 4, 8).astype(np.float16)
    light, constants, model = attached(text, {"kernel": kernel})
    assert operators(model) == ["Unsqueeze", "Conv", "Squeeze"]
    assert [v.name for v in light.graph.input] == ["x"]
    weight = constants[light.graph.node[1].input[1]]
    expected = kernel.astype(np.float32)[None].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(weight, expected)


def test_nodes_on_data_and_outputs_stay():
    text = """g (float[2] x, float[2,2] w) => (float[2] y, float[2,2] turned) {
      turned = Transpose<perm = [1, 0]>(w)
      z = Identity(x)
      y = Add(z, x)
    }"""
    _, _, model = attached(text, {"w": normal(2, 2)})
    assert operators(model) == ["Transpose", "Identity", "Add"]


def test_results_that_would_swell_the_file_stay_nodes():
    text = """g (float[500,40] x, float[40] w) => (float[500,40] y)
    <int64[2] shape = {500, 40}> {
      wide = Expand(w, shape)
      y = Add(x, wide)
    }"""
    _, _, model = attached(text, {"w": normal(40)})
    assert operators(model) == ["Expand", "Add"]


def test_equal_chains_on_one_weight_share_one_array():
    text = """g (float[3,3] x, float[3,3] w) => (float[3,3] y) {
      a = Transpose<perm = [1, 0]>(w)
      b = Transpose<perm = [1, 0]>(w)
      h = MatMul(x, a)
      y = MatMul(h, b)
    }"""
    light, constants, _ = attached(text, {"w": normal(3, 3)})
    first, second = (node.input[1] for node in light.graph.node)
    assert constants[first] is constants[second]
    assert len(build(parsed(text), {"w": normal(3, 3)}).graph.initializer) == 1


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), np.float32), ((3, 2), np.float64)])
def test_weight_of_another_shape_or_type_is_refused(shape, dtype):
    text = "g (float[3] x, float[3,2] w) => (float[2] y) { y = MatMul(x, w) }"
    with pytest.raises(ExportError, match=r"^w: the weight has shape"):
        attached(text, {"w": np.zeros(shape, dtype)})


STATISTICS = {
    "s": normal(4),
    "o": normal(4),
    "m": normal(4),
    "v": RNG.uniform(0.5, 2, 4).astype(np.float32),
}
BN = "BatchNormalization<epsilon = 0.02>"


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize(
    ("operator", "weight"),
    [("Conv", (4, 3, 2, 2)), ("Conv<group = 3>", (12, 1, 2, 2))],
)
def test_batch_norm_goes_into_its_convolution(operator, weight, bias):
    channels = weight[0]
    text = f"""g (float[N,3,5,5] x, float[{",".join(map(str, weight))}] w, float[{channels}] b,
      float[{channels}] s, float[{channels}] o, float[{channels}] m, float[{channels}] v)
      => (float[N,{channels},4,4] y) {{
      z = {operator}(x, w{bias})
      y = {BN}(z, s, o, m, v)
    }}"""
    arrays = {"w": normal(*weight), "b": normal(channels)}
    arrays |= {name: normal(channels) for name in "som"} | {"v": np.abs(normal(channels)) + 0.5}
    _, _, model = attached(text, arrays)
    assert operators(model) == ["Conv"]
    x = normal(3, 3, 5, 5)
    expected = evaluate(parsed(text), x=x, **arrays)
    np.testing.assert_allclose(evaluate(model, x=x), expected, atol=1e-5)


def test_batch_norm_goes_into_its_transposed_convolution():
    text = f"""g (float[N,3,5,5] x, float[3,4,2,2] w, float[4] s, float[4] o, float[4] m,
      float[4] v)
      => (float[N,4,6,6] y) {{
      z = ConvTranspose(x, w)
      y = {BN}(z, s, o, m, v)
    }}"""
    arrays = {"w": normal(3, 4, 2, 2), **STATISTICS}
    _, _, model = attached(text, arrays)
    assert operators(model) == ["ConvTranspose"]
    x = normal(1, 3, 5, 5)
    expected = evaluate(parsed(text), x=x, **arrays)
    np.testing.assert_allclose(evaluate(model, x=x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        f"z = Conv(x, w) h = {BN}(z, s, o, m, v) y = Add(h, z)",
        f"z = Conv(x, w) r = Relu(z) y = {BN}(r, s, o, m, v)",
        f"z = Conv(x, k) y = {BN}(z, s, o, m, v)",
    ],
    ids=["read twice", "not adjacent", "weight not constant"],
)
def test_batch_norm_that_is_not_alone_behind_constants_stays(body):
    text = f"""g (float[1,3,5,5] x, float[4,3,2,2] k, float[4,3,2,2] w, float[4] s, float[4] o,
      float[4] m, float[4] v) => (float[1,4,4,4] y) {{ {body} }}"""
    _, _, model = attached(text, {"w": normal(4, 3, 2, 2), **STATISTICS})
    assert "BatchNormalization" in operators(model)


def test_one_weight_under_two_batch_norms_is_folded_twice():
    text = f"""g (float[1,3,5,5] x, float[3,3,1,1] w, float[3] s, float[3] o, float[3] m,
      float[3] v)
      => (float[1,3,5,5] y) {{
      a = Conv(x, w)
      b = {BN}(a, s, o, m, v)
      c = Conv(b, w)
      y = {BN}(c, s, o, m, v)
    }}"""
    arrays = {"w": normal(3, 3, 1, 1), **{n: a[:3] for n, a in STATISTICS.items()}}
    _, _, model = attached(text, arrays)
    assert operators(model) == ["Conv", "Conv"]
    x = normal(1, 3, 5, 5)
    expected = evaluate(parsed(text), x=x, **arrays)
    np.testing.assert_allclose(evaluate(model, x=x), expected, atol=1e-5)


def repaired(text):
    light, constants = graphs.lighten(parsed(text))
    repair(light, constants)
    return graphs.complete(light, constants)


@pytest.mark.parametrize(
    ("axes", "keepdims", "moves"), [("1, 2", 0, True), ("1, 2", 1, False), ("1", 0, False)]
)
def test_reduction_skips_a_transpose_where_the_order_survives(axes, keepdims, moves):
    count = axes.count(",") + 1
    text = f"""g (float[2,3,4,5] x) => (float y) <int64[{count}] axes = {{{axes}}}> {{
      t = Transpose<perm = [0, 2, 3, 1]>(x)
      y = ReduceMean<keepdims = {keepdims}>(t, axes)
    }}"""
    model = repaired(text)
    assert (model.graph.node[1].input[0] == "x") is moves
    x = normal(2, 3, 4, 5)
    np.testing.assert_allclose(evaluate(model, x=x), evaluate(parsed(text), x=x), atol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 2.0, 1.5, 0.4])
def test_resize_takes_tensorflows_pixel_in_a_standard_mode(scale, tmp_path):
    text = f"""g (float[1,1,1,10] x) => (float[1,1,1,M] y)
    <float[4] scales = {{1, 1, 1, {scale}}}> {{
      y = Resize<coordinate_transformation_mode = "tf_half_pixel_for_nn", mode = "nearest",
                 nearest_mode = "floor">(x, , scales)
    }}"""
    x = np.arange(10, dtype=np.float32).reshape(1, 1, 1, 10)
    write(*lighten(repaired(text)), tmp_path / "m.onnx")
    got = open_runtime("onnxruntime").session(tmp_path / "m.onnx")({"x": x})["y"].ravel()
    expected = [int((i + 0.5) / scale) for i in range(int(10 * scale))]
    np.testing.assert_array_equal(got, expected)


DENSE = "g (float[N,4] x, float[4,300] w) => (float[N,300] y) { y = MatMul(x, w) }"


def test_build_leaves_its_input_alone_and_refuses_invalid_graphs():
    model = parsed(DENSE)
    before = model.SerializeToString()
    built = build(model, {"w": normal(4, 300)}, {"b": "2", "a": "1"}, version="9")
    assert model.SerializeToString() == before
    assert (built.producer_name, built.producer_version) == ("layerswap", "9")
    assert [(p.key, p.value) for p in built.metadata_props] == [("a", "1"), ("b", "2")]
    wrong = parsed(DENSE.replace("MatMul", "Conv"))
    with pytest.raises(ExportError, match="not valid ONNX"):
        build(wrong, {"w": normal(4, 300)})


@pytest.mark.parametrize("limit", [10**9, 100], ids=["one file", "data beside"])
def test_written_file_loads_and_computes(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SINGLE_FILE_BYTES", limit)
    weight = normal(4, 300)
    model, path, x = build(parsed(DENSE), {"w": weight}), tmp_path / "m.onnx", normal(3, 4)
    written = write(*lighten(model), path)
    assert written == [path, tmp_path / "m.onnx.data"][: len(written)]
    assert sorted(tmp_path.iterdir()) == written
    assert len(written) == (2 if limit == 100 else 1)
    onnx.checker.check_model(str(path))
    for name in ("onnxruntime", "reference"):
        got = open_runtime(name).session(path)({"x": x})["y"]
        np.testing.assert_allclose(got, x @ weight, atol=1e-5)


@pytest.mark.parametrize(
    "chain",
    [
        "y = Transpose<perm = [0,3,1,2]>(x)",
        "a = Sub(x, three) y = Transpose<perm = [0,3,1,2]>(a)",
        "a = Mul(half, x) b = Sub(three, a) c = Div(b, plane) y = Transpose<perm = [0,3,1,2]>(c)",
    ],
)
def test_preprocessing_works_behind_the_transpose(chain):
    constants = {
        "three": normal(3),
        "half": np.array(0.5, np.float32),
        "plane": 1 + np.abs(normal(1, 4, 5, 1)),
    }
    model = parsed(f"g (float[N,4,5,3] x) => (float[N,3,4,5] y) {{ {chain} }}")
    x = normal(2, 4, 5, 3)
    before = ReferenceEvaluator(graphs.complete(model, constants)).run(None, {"x": x})[0]
    count = len(model.graph.node)
    repair(model, constants)
    assert model.graph.node[0].op_type == "Transpose"
    assert len(model.graph.node) == count
    complete = graphs.complete(model, constants)
    onnx.checker.check_model(complete, full_check=True)
    after = ReferenceEvaluator(complete).run(None, {"x": x})[0]
    np.testing.assert_array_equal(after, before)


def test_two_transposes_around_preprocessing_cancel():
    text = """g (float[N,3,4,5] x) => (float[N,3,4,5] y) {
      a = Transpose<perm = [0,2,3,1]>(x)
      b = Mul(a, three)
      c = Sub(b, half)
      d = Transpose<perm = [0,3,1,2]>(c)
      y = Relu(d)
    }"""
    constants = {"three": normal(3), "half": np.array(0.5, np.float32)}
    model, x = parsed(text), normal(2, 3, 4, 5)
    before = ReferenceEvaluator(graphs.complete(model, constants)).run(None, {"x": x})[0]
    repair(model, constants)
    canonicalize(model, constants)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Sub", "Relu"]
    after = ReferenceEvaluator(graphs.complete(model, constants)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "chain",
    [
        "t = Transpose<perm = [0,2,1,3]>(x) a = Sub(t, three) y = Transpose<perm = [0,3,2,1]>(a) "
        "z = Neg(x)",
        "a = Sub(x, three) y = Transpose<perm = [0,3,1,2]>(a) z = Neg(a)",
        "b = Neg(x) a = Sub(b, three) y = Transpose<perm = [0,3,1,2]>(a) z = Neg(x)",
        "a = Sub(x, x) y = Transpose<perm = [0,3,1,2]>(a) z = Neg(x)",
        "a = Sub(x, three) y = Transpose(a) z = Neg(x)",
        "a = Sub(x, wide) b = Transpose<perm = [0,1,4,2,3]>(a) y = Neg(b) z = Neg(x)",
    ],
    ids=[
        "other transposes",
        "read twice",
        "not from the input",
        "no constant",
        "no permutation",
        "more axes",
    ],
)
def test_other_arithmetic_before_a_transpose_stays(chain):
    model = parsed(f"g (float[2,4,5,3] x) => (float[2,3,4,5] y, float[2,4,5,3] z) {{ {chain} }}")
    before = model.SerializeToString()
    repair(model, {"three": normal(3), "wide": normal(2, 1, 1, 1, 1)})
    assert model.SerializeToString() == before


def test_a_resize_reaches_every_size():
    """6 · float32(7 / 6) is below 7."""
    for size in range(1, 40):
        wanted = np.arange(1, 60)
        scales = (wanted / size).astype(np.float32)
        model = parsed(
            'g (float[1,1,H,W] x) => (float[1,1,K,L] y) { y = Resize<mode = "linear">(x, , s) }'
        )
        constants = {"s": scales}
        repair(model, constants)
        reached = np.float32(size) * constants[model.graph.node[0].input[2]]
        np.testing.assert_array_equal(np.floor(reached), wanted)


def test_the_shape_of_a_weight_is_known():
    """Else a kernel that is reshaped by its own shape would be stored twice."""
    text = """g (float[N,6] x) => (float[N,2] y) {
      shape = Shape(w)
      size = Gather(shape, last)
      flat = Concat<axis = 0>(size, size)
      k = Reshape(w, wanted)
      y = MatMul(x, k)
    }"""
    constants = {"last": np.array([2]), "wanted": np.array([6, 2])}
    model = parsed(text)
    constants["w"] = normal(2, 3, 2)
    attach(model, constants, {})
    assert [node.op_type for node in model.graph.node] == ["Concat", "MatMul"]
    np.testing.assert_array_equal(constants["size"], [2])
