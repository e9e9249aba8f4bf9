"""Graphs tuned for one runtime compute the same; and which sites are tuned."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest
from onnx import parser

from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.build import check
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.groupnorm import expand
from layerswap.onnx_graph.targets import TARGETS

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def graph(body, channels, size="14,14", outputs="float[N,C,H,W] y"):
    norm = (
        f'layerswap.GroupNorm<groups = 4, channels = {channels}, epsilon = 0.001, path = "gn", '
        f"shape = [-1,{channels},{size.replace('H', '-1').replace('W', '-1')}]>"
    )
    text = body.replace("GN", norm)
    return parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18, "layerswap": 1]>
        g (float[N,K,{size}] x) => ({outputs}) {{ {text} }}"""
    )


def both(model, constants):
    """The model as it is and tuned, and the operators of the latter."""
    results = []
    for tune in (False, True):
        light, values = model.__class__(), dict(constants)
        light.CopyFrom(model)
        expand(light, values)
        if tune:
            TARGETS["onnxruntime"](light, values)
        canonicalize(light, values)
        check(light, values)
        results.append(graphs.complete(light, values))
    return results, Counter(node.op_type for node in results[1].graph.node)


def assert_same(models, x):
    sessions = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        for m in models
    ]
    plain, tuned = (session.run(None, {"x": x}) for session in sessions)
    for ours, theirs in zip(tuned, plain, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def affine(channels):
    return {"gamma": normal(channels), "beta": normal(channels)}


@pytest.mark.parametrize("after", ["Relu(n)", "Clip(n, zero, six)", "Add(n, x)", "Add(x, n)"])
@pytest.mark.parametrize("size", ["14,14", "14,W"])
def test_an_affine_before_what_a_convolution_takes_in_becomes_one(after, size):
    limits = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    model = graph(f"n = GN(x, gamma, beta) y = {after}", 32, size)
    models, operators = both(model, affine(32) | limits)
    assert operators["Conv"] == 1
    assert operators["BatchNormalization"] == 0
    assert_same(models, normal(2, 32, 14, 14))


@pytest.mark.parametrize(
    ("body", "channels", "size", "outputs"),
    [
        ("n = GN(x, gamma, beta) y = Sigmoid(n)", 32, "14,14", "float[N,C,H,W] y"),
        ("y = GN(x, gamma, beta)", 32, "14,14", "float[N,C,H,W] y"),
        ("n = GN(x, gamma, beta) y = Relu(n)", 24, "14,14", "float[N,C,H,W] y"),
        ("n = GN(x, gamma, beta) y = Relu(n)", 32, "14", "float[N,C,H] y"),
        ("n = GN(x, gamma, beta) a = Relu(n) y = Mul(a, n)", 32, "14,14", "float[N,C,H,W] y"),
        ("n = GN(x, gamma, beta) y = Relu(n)", 32, "14,14", "float[N,C,H,W] y, float[N,C,H,W] n"),
        ("g = Abs(gamma) n = GN(x, g, beta) y = Relu(n)", 32, "14,14", "float[N,C,H,W] y"),
    ],
    ids=["sigmoid", "output", "half a block", "rank 3", "two readers", "also output", "computed"],
)
def test_elsewhere_it_stays(body, channels, size, outputs):
    _, operators = both(graph(body, channels, size, outputs), affine(channels))
    assert operators["BatchNormalization"] == 1
    assert operators["Conv"] == 0


CONV = "c = Conv{}(x, w) y = GN(c, gamma, beta)"


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 96), (96, 24)])
def test_a_narrow_convolution_becomes_a_product(inputs, outputs):
    weights = affine(outputs) | {"w": normal(outputs, inputs, 1, 1)}
    models, operators = both(graph(CONV.format(""), outputs), weights)
    assert operators["MatMul"] == 1
    assert operators["Conv"] == 0
    assert_same(models, normal(3, inputs, 14, 14))


@pytest.mark.parametrize(
    ("settings", "kernel", "size"),
    [
        ("<strides = [2,2]>", (96, 16, 1, 1), "28,28"),
        ("<pads = [1,1,1,1]>", (96, 16, 1, 1), "14,14"),
        ("<group = 2>", (96, 8, 1, 1), "14,14"),
        ("", (96, 64, 1, 1), "14,14"),
        ("", (96, 16, 1, 1), "7,7"),
        ("", (96, 16, 1, 1), "H,W"),
        ("<pads = [1,1,1,1]>", (96, 16, 3, 3), "14,14"),
    ],
    ids=["strided", "padded", "grouped", "wide", "few positions", "open", "3 × 3"],
)
def test_any_other_convolution_stays(settings, kernel, size):
    shape = {"28,28": "14,14", "14,14": "16,16" if "pads" in settings else "14,14"}
    shape = "14,14" if kernel[2] == 3 else shape.get(size, size)
    model = graph(CONV.format(settings), 96, shape)
    for axis, value in enumerate(size.split(","), 2):
        dim = model.graph.input[0].type.tensor_type.shape.dim[axis]
        dim.Clear()
        if value.isdigit():
            dim.dim_value = int(value)
    _, operators = both(model, affine(96) | {"w": normal(*kernel)})
    assert operators["MatMul"] == 0
    assert operators["Conv"] == 1


@pytest.mark.parametrize("trained", ["mean", "variance", "epsilon"])
def test_a_batchnorm_of_the_user_s_is_not_taken_for_the_affine(trained):
    """A GN without γ and β has no affine; what follows it may look like one."""
    epsilon = 0.01 if trained == "epsilon" else 0.0
    body = f"n = GN(x, one, zero) b = BatchNormalization<epsilon = {epsilon}>(n, g, h, m, v)"
    constants = {
        "one": np.ones(32, np.float32),
        "zero": np.zeros(32, np.float32),
        "g": normal(32),
        "h": normal(32),
        "m": normal(32) if trained == "mean" else np.zeros(32, np.float32),
        "v": normal(32) ** 2 + 0.1 if trained == "variance" else np.ones(32, np.float32),
    }
    models, operators = both(graph(f"{body} y = Relu(b)", 32), constants)
    assert operators["BatchNormalization"] == 1
    assert_same(models, normal(2, 32, 14, 14))


def test_a_biased_convolution_and_one_with_two_readers_stay():
    biased = "c = Conv(x, w, b) y = GN(c, gamma, beta)"
    twice = "c = Conv(x, w) n = GN(c, gamma, beta) y = Add(n, c)"
    weights = affine(24) | {"w": normal(24, 96, 1, 1), "b": normal(24)}
    for body in (biased, twice):
        _, operators = both(graph(body, 24), weights)
        assert operators["MatMul"] == 0
