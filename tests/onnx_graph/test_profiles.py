"""Every profile computes GroupNormalization, in both runtimes, also where float32 is hard put."""

from __future__ import annotations

import functools
import itertools
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf_keras
from onnx import shape_inference, version_converter
from onnx.backend.test.case.node import groupnormalization
from tf_keras import layers

import layerswap as ls
import oracle
from built import build
from groupnorm_graphs import GROUPS, HARD, LENGTH, exact_affine, expanded, model_of, randomized
from layerswap.errors import ExportError, LoadError, MissingExtraError
from layerswap.keras_graph.bridge import trace
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.groupnorm import PROFILES, expand
from layerswap.onnx_graph.opsets import newest_opset
from layerswap.onnx_graph.runtimes import open_runtime
from layerswap.records import PROFILE_OPSETS

VECTORS = Path(__file__).parents[2] / "fixtures" / "torch_groupnorm.npz"
RUNTIMES = ("onnxruntime", "reference")
GN = layers.GroupNormalization

every_profile = pytest.mark.parametrize("profile", PROFILES)
every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)


def run(model, folder, runtime, *inputs):
    onnx.save(model, folder / "m.onnx")
    names = [value.name for value in model.graph.input]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = open_runtime(runtime).session(folder / "m.onnx")(
            dict(zip(names, inputs, strict=True))
        )
    return list(got.values())


def compute(profile, runtime, folder, x, groups, gamma, beta, epsilon):
    """GroupNormalization of `x` over axis 1 by a graph that knows all axes but the batch."""
    opset = max(18, PROFILE_OPSETS[profile])
    shape = [None, *x.shape[1:]]
    model = expanded(model_of(shape, groups, gamma, beta, epsilon=epsilon, opset=opset), profile)
    return run(model, folder, runtime, x)[0]


# What onnxruntime 1.32 makes of the hard inputs is in docs/export.md (`benchmarks/precision.py`).
# 1.18 does the same to a factor of two, onnx's evaluator as well or better.
#
# Where the bounds come from. u = 2⁻²⁴ is half of what float32 tells apart at 1, m, v a group's
# mean and variance, κ = max |m| / √(v + ε) and n = max |x − m| / √(v + ε).
#
# A running sum of k values of one sign is off by at most k·u/2 of itself. Runtimes keep at least
# four of them side by side, so that a mean over L values is off by at most L/8·u·|m|, and the
# variance by as much of itself. Each of the few products rounds once. So K·u bounds the relative
# error of both, with K = L/8 + 8; κ·K·u is the mean's in standard deviations.
ROUNDING = 2.0**-24
STEPS = LENGTH / 8 + 8


def _bound(profile, kappa, largest):
    mean, variance = STEPS * ROUNDING * kappa, STEPS * ROUNDING * largest
    if profile == "precise":
        # The second mean is that of the first one's rounding.
        return variance + mean * STEPS * ROUNDING
    if profile == "native":
        # mean(x²) is off by K·u·(m² + v), and so is the variance, of which more than half may be
        # gone: it may be negative, and anything come out.
        lost = STEPS * ROUNDING * kappa**2
        return variance + mean + lost * largest if lost < 0.5 else np.inf
    return variance + mean


def error_on(name, profile, runtime, folder):
    """Largest error over max|γ|, and κ and n."""
    x, epsilon = HARD[name]
    x = x.astype("float32")
    gamma, beta = exact_affine()
    expected = oracle.group_norm(x, GROUPS, gamma, beta, epsilon, axis=1)
    got = compute(profile, runtime, folder, x, GROUPS, gamma, beta, epsilon)
    blocks = x.astype("float64").reshape(2, GROUPS, -1)
    deviation = np.sqrt(blocks.var(-1) + epsilon)
    kappa = (np.abs(blocks.mean(-1)) / deviation).max()
    largest = np.abs(oracle.group_norm(x, GROUPS, None, None, epsilon, axis=1)).max()
    return np.abs(got - expected).max() / 2, kappa, largest


@every_profile
@every_runtime
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_are_as_exact_as_their_bounds(name, runtime, profile, tmp_path):
    error, kappa, largest = error_on(name, profile, runtime, tmp_path)
    bound = _bound(profile, kappa, largest)
    assert error <= bound or bound == np.inf  # an error that is no number included


@every_runtime
def test_what_each_profile_is_for(runtime, tmp_path):
    def error(profile, name):
        return error_on(name, profile, runtime, tmp_path)[0]

    # Exact to the last bits whatever the mean.
    for name in ("mean 1e3", "mean 1e4", "constant 1234.567", "group means ±100"):
        assert error("precise", name) < 1e-6
    assert error("portable", "mean 1e4") > 100 * error("precise", "mean 1e4")
    # Why `native` needs a warning.
    assert error("native", "mean 1e3") > 100 * error("portable", "mean 1e3")
    assert not error("native", "mean 1e4") < 0.1


@every_runtime
def test_precise_is_so_in_large_groups(runtime, tmp_path):
    gamma, beta = np.ones(4, "float32"), np.zeros(4, "float32")
    x = np.random.default_rng(0).normal(1e4, 1, (1, 4, 128, 128)).astype("float32")
    expected = oracle.group_norm(x, 1, gamma, beta, 1e-3, axis=1)
    errors = [
        np.abs(compute(p, runtime, tmp_path, x, 1, gamma, beta, 1e-3) - expected).max()
        for p in ("precise", "portable")
    ]
    assert errors[0] < 1e-5  # 2e-6 in onnxruntime
    assert errors[1] > 50 * errors[0]


@every_profile
@pytest.mark.parametrize("name", ["openvino", "opencv"])
def test_other_runtimes(name, profile, tmp_path):
    try:
        runtime = open_runtime(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    gamma, beta = randomized(12)
    one, zero = np.ones(12, "float32"), np.zeros(12, "float32")
    cases = [(1, gamma, beta), (12, gamma, beta)]
    cases += [(3, *values) for values in itertools.product((gamma, one), (beta, zero))]
    sizes = [(12,), (12, 5), (12, 4, 5), (12, None, None), (12, 2, 3, 4)]
    for size, (groups, gamma, beta) in itertools.product(sizes, cases):
        opset = max(18, PROFILE_OPSETS[profile])
        model = expanded(model_of([None, *size], groups, gamma, beta, opset=opset), profile)
        onnx.save(model, tmp_path / "m.onnx")
        shape = [2, *(n or 6 for n in size)]
        # OpenCV takes a variance as mean(x²) − mean(x)², for which `precise` is the remedy.
        for mean, spread in [(2, 3), *[(1e4, 1)] * (profile == "precise")]:
            x = np.random.default_rng(0).normal(mean, spread, shape).astype("float32")
            got = runtime.session(tmp_path / "m.onnx")({"x": x})["y"]
            expected = oracle.group_norm(x, groups, gamma, beta, 0.03, axis=1)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_profile
@every_runtime
def test_torch_agrees(runtime, profile, tmp_path):
    with np.load(VECTORS) as archive:
        stored = dict(archive)
    count = len({key.split("/")[0] for key in stored} - {"torch"})
    assert count > 20
    for i in range(count):
        x, gamma, beta, y = (
            stored[f"{i}/{part}"].astype("float32") for part in ("x", "gamma", "beta", "y")
        )
        groups, epsilon = int(stored[f"{i}/groups"]), float(stored[f"{i}/epsilon"])
        got = compute(profile, runtime, tmp_path, x, groups, gamma, beta, epsilon)
        # `native` loses more where the mean is some times the standard deviation already.
        np.testing.assert_allclose(got, y, rtol=1e-5, atol=5e-5 if profile == "native" else 1e-5)


@every_profile
@every_runtime
@pytest.mark.parametrize("export", ["export", "export_epsilon"])
def test_onnxs_own_vectors_agree(export, runtime, profile, monkeypatch, tmp_path):
    cases = []

    def record(node, inputs, outputs, name):
        cases.append((node, inputs, outputs))

    monkeypatch.setattr(groupnormalization, "expect", record)
    getattr(groupnormalization.GroupNormalization, export)()
    ((node, (x, gamma, beta), (y,)),) = cases
    groups = graphs.attribute(node, "num_groups")
    epsilon = graphs.attribute(node, "epsilon", 1e-5)
    got = compute(profile, runtime, tmp_path, x, groups, gamma, beta, epsilon)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


OPSETS = [o for o in sorted({13, 15, 17, 18, 21, 23, newest_opset()}) if o <= newest_opset()]


@every_profile
@every_runtime
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_every_opset(groups, opset, runtime, profile, tmp_path):
    if opset < PROFILE_OPSETS[profile]:
        with pytest.raises(ExportError, match=f"needs opset {PROFILE_OPSETS[profile]}"):
            expanded(model_of([None, 12, 4, None], groups, *randomized(12), opset=opset), profile)
        return
    gamma, beta = randomized(12)
    model = expanded(model_of([None, 12, 4, None], groups, gamma, beta, opset=opset), profile)
    x = np.random.default_rng(0).normal(2, 3, (2, 12, 4, 5)).astype("float32")
    (got,) = run(model, tmp_path, runtime, x)
    expected = oracle.group_norm(x, groups, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@every_profile
@every_runtime
@pytest.mark.parametrize("opset", [o for o in OPSETS if o > 18])
def test_graphs_that_onnx_converted_to_a_newer_opset(opset, runtime, profile, tmp_path):
    gamma, beta = randomized(12)
    light, constants = graphs.lighten(model_of([None, 12, 4, 5], 3, gamma, beta, count=2))
    for name, value in constants.items():
        light.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, value.shape))
    light = version_converter.convert_version(light, opset)
    del light.graph.input[1:]
    expand(light, constants, profile=profile)
    graphs.replace_all(light.opset_import, [o for o in light.opset_import if not o.domain])
    model = graphs.complete(light, constants)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).normal(2, 3, (2, 12, 4, 5)).astype("float32")
    expected = x
    for _ in range(2):
        expected = oracle.group_norm(expected, 3, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(run(model, tmp_path, runtime, x)[0], expected, atol=5e-5)


# onnx has no shape inference for GroupNormalization.
@pytest.mark.parametrize("profile", [p for p in PROFILES if p != "native"])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(
    "shape", [["b", 12], ["b", 12, 5], ["b", 12, 4, 5], ["b", 12, 2, 3, 4], ["b", 12, 2, 3, 2, 4]]
)
def test_onnx_infers_the_shape(shape, groups, profile):
    model = model_of(shape, groups, *randomized(12), known=[-1, *shape[1:]])
    model = expanded(model, profile)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    sizes = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in sizes] == [0, *shape[1:]]


# Whole models, traced once each.


def sequential(*stack, shape):
    return tf_keras.Sequential([tf_keras.Input(shape), *stack])


def swapped():
    stack = [layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU()]
    dense = [layers.Flatten(), layers.Dense(6), layers.BatchNormalization(center=False)]
    source = randomize(sequential(*stack, *dense, shape=(6, 6, 3)))
    return ls.swap(source, groups=2).model


def nested():
    inner = tf_keras.Sequential([layers.Conv2D(8, 3), GN(4)], name="inner")
    image = tf_keras.Input((8, 8, 3))
    return tf_keras.Model(image, layers.ReLU()(GN(8)(inner(image))))


class Cell(layers.Layer):
    """A recurrent cell that normalises: GroupNormalization in the body of a loop."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.state_size = layers.Dense(12), GN(2), 12

    def build(self, shape):
        self.dense.build((None, shape[-1] + 12))
        self.norm.build((None, 12))
        self.built = True

    def call(self, x, states):
        y = self.norm(self.dense(tf.concat([x, states[0]], -1)))
        return y, [y]


class Repeated(layers.Layer):
    """GroupNormalization in the body of a loop, or in a branch."""

    def __init__(self, loop):
        super().__init__()
        self.loop, self.norm = loop, GN(2)

    def call(self, x):
        if self.loop:
            return tf.while_loop(
                lambda i, y: i < 3, lambda i, y: (i + 1, self.norm(y) + x), (0, x)
            )[1]
        return tf.cond(tf.reduce_sum(x) > 1e9, lambda: x, lambda: self.norm(x))


HALF = {"dtype": "mixed_float16"}
MODELS = {
    "rank 2": lambda: sequential(GN(3), shape=(12,)),
    "rank 2, instance": lambda: sequential(GN(-1), shape=(12,)),
    "rank 3": lambda: sequential(layers.Conv1D(12, 2), GN(3), shape=(6, 2)),
    "rank 3, first": lambda: sequential(GN(4, axis=1, scale=False), shape=(12, 5)),
    "rank 3, open": lambda: sequential(layers.Conv1D(8, 2), GN(2), shape=(None, 2)),
    "rank 4": lambda: sequential(layers.Conv2D(12, 2), GN(3), GN(1), shape=(6, 5, 2)),
    "rank 4, first": lambda: sequential(GN(-1, axis=1), GN(4, axis=1), shape=(12, 4, 5)),
    "rank 4, middle": lambda: sequential(GN(3, axis=2), shape=(4, 12, 5)),
    "rank 4, open": lambda: sequential(layers.Conv2D(8, 2), GN(2), shape=(None, None, 2)),
    "rank 4, instance": lambda: sequential(layers.Conv2D(8, 2), GN(-1), shape=(None, None, 2)),
    "rank 5": lambda: sequential(layers.Conv3D(8, 2), GN(4, center=False), shape=(3, 4, 5, 2)),
    "rank 5, first": lambda: sequential(GN(6, axis=1), shape=(12, 2, 3, 4)),
    "rank 5, open": lambda: sequential(GN(2), shape=(None, None, None, 4)),
    "rank 6": lambda: sequential(GN(4), shape=(2, 3, 2, 3, 12)),
    "neutral": lambda: sequential(GN(2, scale=False, center=False), shape=(3, 4, 6)),
    "half": lambda: sequential(layers.Conv2D(8, 3, **HALF), GN(4, **HALF), shape=(7, 7, 3)),
    "nested": nested,
    "loop": lambda: sequential(Repeated(loop=True), shape=(3, 4, 6)),
    "branch": lambda: sequential(Repeated(loop=False), shape=(3, 6)),
    "recurrent": lambda: sequential(layers.RNN(Cell()), shape=(5, 3)),
    "swapped": swapped,
}


def randomize(model):
    rng = np.random.default_rng(0)
    values = []
    for weight in model.weights:
        spread = np.prod(weight.shape[:-1]) ** -0.5 if len(weight.shape) > 1 else 0.3
        mean = float("gamma" in weight.name or "variance" in weight.name)
        values.append(rng.normal(mean, min(spread, 0.5), weight.shape).clip(-2, 2))
        if "variance" in weight.name:
            values[-1] = np.abs(values[-1]) + 0.1
    model.set_weights(values)
    return model


@functools.cache
def traced(name, opset=18):
    model = MODELS[name]()
    if name != "swapped":
        randomize(model)
    return model, trace(model, opset=opset)


# An operator of each profile that nothing else in the models brings along.
MARKS = {
    "portable": {"InstanceNormalization"},
    "plain": {"InstanceNormalization"},
    "precise": {"InstanceNormalization"},
    "primitive": {"Sqrt"},
    "native": {"GroupNormalization"},
}


def kinds(graph):
    """The operators of a graph and of all bodies in it."""
    bodies = [kinds(body) for node in graph.node for body in graphs.subgraphs(node)]
    return {node.op_type for node in graph.node}.union(*bodies)


@every_profile
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name, profile, tmp_path):
    model, result = traced(name)
    graph = result.graph
    if PROFILE_OPSETS[profile] > 18:
        graph = version_converter.convert_version(graph, PROFILE_OPSETS[profile])
    graph = build(graph, result.arrays, profile=profile)
    assert {node.domain for node in graph.graph.node} == {""}
    # onnx's evaluator joins what the turns of a Loop yield along the wrong axis.
    for runtime in RUNTIMES[: 1 if name == "recurrent" else None]:
        for batch in (1, 3):
            shape = [batch, *(n or 7 for n in model.inputs[0].shape[1:])]
            x = np.random.default_rng(batch).normal(0.5, 2.0, shape).astype("float32")
            expected = np.asarray(model(x), "float64")
            try:
                (got,) = run(graph, tmp_path, runtime, x)
            except LoadError as error:
                if profile == "native" and "GroupNormalization" in str(error):
                    pytest.skip(
                        f"onnx {onnx.__version__} evaluates no GroupNormalization in a body"
                    )
                raise
            assert got.shape == expected.shape
            limit = (5e-3 if name == "half" else 2e-5) * np.abs(expected).max()
            assert np.abs(got - expected).max() <= limit
