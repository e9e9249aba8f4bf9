"""Keras model → ONNX file, run by onnxruntime, compared with Keras and with NumPy."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import oracle
from built import build
from layerswap.errors import ExportError, UsageError
from layerswap.keras_graph import running
from layerswap.keras_graph.bridge import trace
from layerswap.keras_graph.converter import reason
from layerswap.keras_graph.serving import serving_signature
from layerswap.onnx_graph.files import write
from layerswap.onnx_graph.graphs import lighten
from layerswap.onnx_graph.runtimes import open_runtime

GN = layers.GroupNormalization
STOCK_CALL = GN.call
per_step = layers.TimeDistributed


def randomize(model, seed=0):
    """Weights with nothing at a default: γ about 1, variances positive, kernels scaled."""
    rng = np.random.default_rng(seed)
    values = []
    for variable in model.weights:
        shape, name = tuple(variable.shape), variable.name
        if not variable.dtype.is_floating:
            values.append(variable.numpy())
        elif len(shape) > 1:
            values.append(rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape))
        elif "variance" in name:
            values.append(rng.uniform(0.5, 2.0, shape))
        else:
            values.append(rng.normal("gamma" in name, 0.3, shape))
    model.set_weights(values)
    return model


def sequential(*stack, shape, **options):
    return randomize(tf_keras.Sequential([tf_keras.Input(shape, **options), *stack]))


def export(model, **options):
    traced = trace(model, **options)
    return traced, build(traced.graph, traced.arrays)


def run(model, traced, inputs, folder):
    path = folder / "model.onnx"
    write(*lighten(model), path)
    interface = traced.interface
    got = open_runtime("onnxruntime").session(path)(
        dict(zip(interface.inputs, inputs, strict=True))
    )
    assert tuple(got) == interface.outputs
    return list(got.values())


def samples(model, batch, free=7):
    rng = np.random.default_rng(batch)
    return [
        rng.normal(0.5, 2.0, [batch, *(n or free for n in t.shape[1:])]).astype("float32")
        for t in model.inputs
    ]


def assert_parity(model, folder, tolerance=1e-5, **options):
    """Exports, and compares with Keras at two batch sizes. Returns the trace and the graph."""
    traced, graph = export(model, **options)
    for batch in (1, 3):
        inputs = samples(model, batch)
        expected = tf.nest.flatten(model(inputs if len(inputs) > 1 else inputs[0]))
        got = run(graph, traced, inputs, folder)
        for a, b in zip(got, expected, strict=True):
            b = b.numpy().astype("float64")
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
    return traced, graph


def kinds(graph):
    return Counter(node.op_type for node in graph.graph.node)


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [
        ((12,), -1, 3),
        ((5, 12), -1, 3),
        ((12, 5), 1, 4),
        ((4, 5, 12), -1, 1),
        ((12, 4, 5), 1, -1),
        ((4, 12, 5), 2, 3),
        ((2, 3, 4, 12), -1, 2),
        ((12, 2, 3, 4), 1, 6),
        ((2, 12, 3, 4), -3, 2),
        ((2, 3, 2, 3, 12), -1, 4),
        ((2, 3, 12, 2, 3), 3, 4),
    ],
)
def test_every_rank_and_axis_equals_the_definition(shape, axis, groups, tmp_path):
    layer = GN(groups, axis=axis, epsilon=0.04)
    model = sequential(layer, shape=shape)
    traced, graph = export(model)
    for batch in (1, 3):
        (x,) = samples(model, batch)
        (got,) = run(graph, traced, [x], tmp_path)
        expected = oracle.group_norm(
            x, groups, layer.gamma.numpy(), layer.beta.numpy(), 0.04, axis=axis
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    (site,) = traced.groupnorms
    assert site.groups == (12 if groups == -1 else groups)
    assert (site.path, site.channels, site.rank) == (layer.name, 12, len(shape) + 1)
    assert site.epsilon == pytest.approx(0.04)


@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_missing_gamma_is_one_and_missing_beta_zero(scale, center, tmp_path):
    layer = GN(2, scale=scale, center=center, epsilon=0.1)
    model = sequential(layer, shape=(3, 4, 6))
    traced, graph = export(model)
    (x,) = samples(model, 3)
    gamma = layer.gamma.numpy() if scale else None
    beta = layer.beta.numpy() if center else None
    expected = oracle.group_norm(x, 2, gamma, beta, 0.1)
    np.testing.assert_allclose(run(graph, traced, [x], tmp_path)[0], expected, atol=2e-5)


@pytest.mark.parametrize("opset", range(13, 19))
def test_every_opset_gives_four_nodes_and_one_layout_change(opset, tmp_path):
    stack = [layers.Conv2D(8, 3), GN(4, epsilon=0.01), layers.ReLU(), layers.Conv2D(4, 3)]
    model = sequential(*stack, layers.GlobalAveragePooling2D(), shape=(9, 8, 3))
    _, graph = assert_parity(model, tmp_path, opset=opset)
    assert graph.opset_import[0].version == opset
    found = kinds(graph)
    pooling = sum(found.pop(op, 0) for op in ("GlobalAveragePool", "ReduceMean", "Squeeze"))
    assert pooling <= 2
    assert found == {
        "Transpose": 1,
        "Conv": 2,
        "Relu": 1,
        "Reshape": 2,
        "InstanceNormalization": 1,
        "BatchNormalization": 1,
    }


def test_thirty_layers_have_four_nodes_each_and_no_transposes_between(tmp_path):
    x = inputs = tf_keras.Input((8, 8, 3))
    for i in range(30):
        y = GN(4, epsilon=0.01)(layers.Conv2D(8, 3, padding="same", use_bias=i % 2 == 0)(x))
        x = layers.ReLU()(y if x.shape[-1] == 3 else layers.Add()([x, y]))
    model = randomize(tf_keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    traced, graph = assert_parity(model, tmp_path)
    found = kinds(graph)
    assert len(traced.groupnorms) == 30
    assert found["Transpose"] == 1
    assert found["Reshape"] == 60
    assert found["InstanceNormalization"] == found["BatchNormalization"] == 30
    assert {n.domain for n in graph.graph.node} == {""}
    kernels = {t.name: list(t.dims) for t in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Conv":
            assert kernels[node.input[1]] in ([8, 3, 3, 3], [8, 8, 3, 3])


@pytest.mark.parametrize(
    ("shape", "convolution", "nodes"),
    [
        ((None, None, 3), layers.Conv2D, 5),
        ((None, 9, 3), layers.Conv2D, 4),
        ((None, 3), layers.Conv1D, 4),
        ((None, None, None, 3), layers.Conv3D, 5),
    ],
)
def test_dynamic_axes_stay_dynamic(shape, convolution, nodes, tmp_path):
    model = sequential(convolution(8, 3), GN(2, epsilon=0.02), shape=shape)
    _, graph = assert_parity(model, tmp_path)
    found = kinds(graph)
    around = sum(found[op] for op in ("Shape", "Reshape", "InstanceNormalization"))
    assert around + found["BatchNormalization"] == nodes
    sizes = graph.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in sizes] == [0, *(n or 0 for n in shape)]
    named = [d.dim_param for d in sizes if d.dim_param]
    assert len(named) == len(set(named)) == 1 + shape.count(None)


def test_batch_that_the_model_fixes_stays_fixed(tmp_path):
    inputs = tf_keras.Input((6,), batch_size=4)
    x = layers.Lambda(lambda t: tf.reshape(t, (4, 3, 2)))(inputs)
    model = randomize(tf_keras.Model(inputs, GN(2)(x)))
    traced, graph = export(model)
    assert traced.interface.shapes == ((4, 6),)
    for value in (graph.graph.input[0], graph.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_value == 4
    (x,) = samples(model, 4)
    np.testing.assert_allclose(run(graph, traced, [x], tmp_path)[0], model(x), atol=1e-5)
    with pytest.raises(UsageError, match="contradicts"):
        trace(model, input_shape={"all": (1, 6)})


def test_batch_that_the_model_does_not_need_is_opened(tmp_path):
    inputs = tf_keras.Input((6,), batch_size=4)
    model = randomize(tf_keras.Model(inputs, GN(2)(layers.Dense(4)(inputs))))
    traced, graph = assert_parity(model, tmp_path)
    assert traced.interface.shapes == ((None, 6),)
    assert graph.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert trace(model, input_shape={"all": (4, 6)}).interface.shapes == ((4, 6),)


def test_batch_of_the_first_call_stays_open_after_saving(tmp_path):
    model = tf_keras.Sequential([layers.Dense(4), GN(2)])
    model(np.zeros((2, 5), "float32"))
    model.save(tmp_path / "m.keras")
    again = tf_keras.models.load_model(tmp_path / "m.keras")
    assert again.inputs[0].shape[0] == 2
    assert trace(again).interface.shapes == ((None, 5),)


def test_stateful_recurrent_layer_starts_from_its_state(tmp_path):
    inputs = tf_keras.Input((5, 6), batch_size=4)
    model = randomize(tf_keras.Model(inputs, layers.LSTM(3, stateful=True)(inputs)))
    traced, graph = export(model)
    (x,) = samples(model, 4)
    got = run(graph, traced, [x], tmp_path)
    np.testing.assert_allclose(got[0], model(x), atol=1e-5)


def test_batch_of_the_first_call_stays_open():
    model = tf_keras.Sequential([layers.Dense(4), GN(2)])
    model(np.zeros((2, 5), "float32"))
    assert trace(model).interface.shapes == ((None, 5),)


def test_shared_layer_nested_models_and_dictionary_outputs(tmp_path):
    shared = GN(2, epsilon=0.03)
    inner = tf_keras.Sequential([layers.Conv2D(4, 3, padding="same"), shared], name="inner")
    outer = tf_keras.Sequential([inner, layers.ReLU(), GN(4, name="gn")], name="outer")
    image = tf_keras.Input((6, 6, 4), name="image")
    outputs = {"b": outer(image), "a": shared(image), "c": inner(image)}
    model = randomize(tf_keras.Model(image, outputs))
    traced, _ = assert_parity(model, tmp_path)
    assert traced.interface.inputs == ("image",)
    assert traced.interface.outputs == tuple(model.output_names)
    assert sorted(site.path for site in traced.groupnorms) == sorted(
        [shared.name, f"inner/{shared.name}", f"outer/inner/{shared.name}", "outer/gn"]
    )


def test_clashing_names_are_made_unique(tmp_path):
    vector = tf_keras.Input((4,), name="x")
    dense = layers.Dense(4, name="d")(vector)
    model = randomize(tf_keras.Model(vector, [dense, vector, dense]))
    traced, _ = assert_parity(model, tmp_path)
    assert len(set(traced.interface.inputs + traced.interface.outputs)) == 4
    assert traced.interface.inputs == ("x",)
    assert traced.interface.outputs[0] == "d"


def test_several_inputs_keep_their_order(tmp_path):
    a, b = tf_keras.Input((4,), name="z"), tf_keras.Input((6,), name="a")
    model = randomize(tf_keras.Model([a, b], [GN(2)(a), layers.Dense(2)(b)]))
    traced, _ = assert_parity(model, tmp_path)
    assert traced.interface.inputs == ("z", "a")


def test_batch_normalization_stays_and_is_folded(tmp_path):
    bn = layers.BatchNormalization
    stack = [layers.Conv2D(8, 3), bn(epsilon=0.02), GN(2), layers.DepthwiseConv2D(3), bn()]
    transposed = [layers.Conv2DTranspose(4, 3), bn(), layers.Conv2D(4, 1, use_bias=False), bn()]
    model = sequential(*stack, *transposed, layers.Flatten(), bn(), shape=(9, 9, 3))
    traced, graph = assert_parity(model, tmp_path)
    assert len(traced.groupnorms) == 1
    assert kinds(graph)["BatchNormalization"] == 1  # GroupNorm's own; the last became Mul, Add


@pytest.mark.parametrize(
    ("stack", "shape"),
    [
        ([per_step(layers.Conv2D(4, 3)), per_step(GN(2))], (3, 5, 5, 2)),
        ([per_step(layers.Dense(4)), per_step(GN(2))], (None, 6)),
        ([layers.SeparableConv2D(8, 3), GN(2), layers.UpSampling2D(3), GN(4)], (7, 6, 3)),
        ([layers.Conv2D(8, 3, groups=2), GN(2), layers.Conv2D(4, 3, dilation_rate=2)], (9, 9, 4)),
        ([layers.Conv2DTranspose(4, 3, strides=2, padding="same"), GN(2)], (5, 6, 3)),
        ([layers.Conv1D(8, 3), GN(2), layers.Conv1DTranspose(4, 3, strides=2), GN(2)], (9, 3)),
        ([layers.Conv3DTranspose(4, 3, strides=2), GN(2), layers.MaxPool3D()], (3, 4, 4, 2)),
        ([layers.Dense(6), GN(3), layers.LayerNormalization(), layers.Dense(2)], (5, 4)),
        ([layers.Reshape((2, 3, 4)), GN(2), layers.Flatten(), layers.Dense(3)], (24,)),
        ([layers.GlobalAveragePooling2D(keepdims=True), GN(2), layers.Conv2D(4, 1)], (5, 5, 4)),
    ],
)  # fmt: skip
def test_neighbours_of_every_kind(stack, shape, tmp_path):
    fresh = [type(layer).from_config(layer.get_config()) for layer in stack]
    assert_parity(sequential(*fresh, shape=shape), tmp_path)


@pytest.mark.parametrize("value", [3.0, np.full((1, 1, 1), 3.0, np.float32)])
def test_number_added_to_a_convolution(value, tmp_path):
    # tf2onnx's optimiser takes it for a bias; as a scalar it made the export fail.
    inputs = tf_keras.Input((6, 6, 3))
    x = tf.nn.relu(layers.Conv2D(4, 3, use_bias=False)(inputs) + value)
    assert_parity(randomize(tf_keras.Model(inputs, layers.Conv2D(2, 1)(x))), tmp_path)


def test_embedding_and_normalization(tmp_path):
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (64, 4)))
    tokens, features = tf_keras.Input((5,), dtype="int32"), tf_keras.Input((4,))
    text = GN(2)(layers.Embedding(10, 6)(tokens))
    model = tf_keras.Model([tokens, features], [text, GN(2)(normalization(features))])
    traced, graph = export(model)
    inputs = [np.array([[1, 2, 3, 4, 9]] * 3, "int32"), samples(model, 3)[1]]
    for a, b in zip(run(graph, traced, inputs, tmp_path), model(inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_recurrent_layers_and_groupnorm_inside_a_cell(tmp_path):
    class Cell(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.norm, self.state_size = layers.Dense(4), GN(2), 4

        def build(self, shape):
            self.dense.build((None, shape[-1] + 4))
            self.norm.build((None, 4))
            self.built = True

        def call(self, x, states):
            y = self.norm(self.dense(tf.concat([x, states[0]], -1)))
            return y, [y]

    stack = [layers.Conv1D(8, 3), GN(2), layers.LSTM(6, return_sequences=True), GN(3)]
    model = sequential(*stack, layers.RNN(Cell()), shape=(6, 3))
    traced, graph = assert_parity(model, tmp_path, tolerance=1e-4)
    assert len(traced.groupnorms) == 3
    assert not traced.arrays
    assert {"LSTM", "Loop"} <= kinds(graph).keys()


def test_groupnorm_inside_a_branch(tmp_path):
    class Branch(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = GN(2)

        def call(self, x):
            return tf.cond(tf.reduce_sum(x) > 1e9, lambda: x, lambda: self.norm(x))

    inputs = tf_keras.Input((5, 4))
    model = randomize(tf_keras.Model(inputs, Branch()(inputs)))
    assert_parity(model, tmp_path)


def test_subclassed_model(tmp_path):
    class Subclassed(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norms = layers.Conv2D(4, 3), [GN(2), GN(4)]

        def call(self, image, training=None):
            x = self.conv(image)
            if training:
                x *= 2.0
            return {"out": self.norms[1](tf.nn.relu(self.norms[0](x))), "conv": x}

    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype("float32")
    with pytest.raises(ExportError, match="inputs are unknown"):
        trace(model)
    model(x[:2])
    randomize(model)
    traced, graph = export(model)
    assert traced.interface.outputs == ("conv", "out")
    for a, b in zip(run(graph, traced, [x], tmp_path), tf.nest.flatten(model(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Scaled(tf_keras.Model):
    """Takes two tensors; `factor` is none."""

    def __init__(self):
        super().__init__(name="scaled")
        self.dense, self.norm = layers.Dense(4), GN(2)

    def call(self, x, scale=None, factor=1.0, training=None):
        y = self.norm(self.dense(x)) * factor
        return y if scale is None else y * scale


def test_tensors_by_position_are_inputs_in_their_order(tmp_path):
    model, rng = Scaled(), np.random.default_rng(0)
    x, scale = (rng.normal(size=(3, n)).astype("float32") for n in (5, 4))
    model(x[:1], scale[:1], 1.0, False)
    randomize(model)
    with pytest.raises(ExportError, match=r"^scaled: .*'factor' that isn't made of tensors"):
        trace(model)
    model = Scaled()
    model(x[:1], scale[:1])
    traced, graph = export(randomize(model))
    assert traced.interface.shapes == ((None, 5), (None, 4))
    (got,) = run(graph, traced, [x, scale], tmp_path)
    np.testing.assert_allclose(got, model(x, scale), atol=1e-5)
    assert running.interface_of(model).inputs == traced.interface.inputs
    answers = running.answer(model, dict(zip("ab", (x, scale), strict=True)), ["y"])
    np.testing.assert_allclose(answers["y"], model(x, scale), atol=1e-6)


def test_tensor_by_keyword_is_refused_by_name():
    model = Scaled()
    model(np.zeros((1, 5), "float32"), scale=np.zeros((1, 4), "float32"))
    for export_form in (trace, serving_signature):
        with pytest.raises(ExportError, match=r"^scaled: .*'scale' by keyword(.|\n)*by position"):
            export_form(model)


@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("opset", [13, 18])
def test_gelu(approximate, opset, tmp_path):
    gelu = layers.Lambda(lambda x: tf.nn.gelu(x, approximate=approximate))
    model = sequential(layers.Dense(6), gelu, layers.Conv1D(2, 1), shape=(4, 5))
    assert_parity(model, tmp_path, opset=opset)


def test_gelu_of_a_scalar_and_by_its_name(tmp_path):
    class Gated(layers.Layer):
        def call(self, x):
            return x * tf.nn.gelu(tf.reduce_mean(tf.constant([0.3, -1.2])) + tf.reduce_max(x))

    model = sequential(layers.Dense(6, "gelu"), Gated(), shape=(5,))
    assert_parity(model, tmp_path)


CHANNELS_FIRST = {"data_format": "channels_first"}


@pytest.mark.parametrize(
    "first",
    [
        lambda: layers.Conv2D(3, 1, **CHANNELS_FIRST),
        lambda: tf_keras.Sequential([layers.MaxPool2D(**CHANNELS_FIRST)]),
    ],
)
def test_input_that_is_channels_first_already_is_not_permuted(first):
    image = tf_keras.Input((3, 8, 8), name="image")
    model = tf_keras.Model(image, first()(layers.Rescaling(0.5)(image)))
    with pytest.raises(UsageError, match="'image' is channels first in the model already"):
        trace(model, inputs_as_nchw=["all"])


def test_layouts_behind_other_layers_do_not_count():
    image = tf_keras.Input((8, 8, 3), name="image")
    x = layers.Permute((3, 1, 2))(layers.Conv2D(3, 1)(image))
    model = tf_keras.Model(image, layers.UpSampling2D(**CHANNELS_FIRST)(x))
    assert trace(model, inputs_as_nchw=["all"]).interface.inputs_as_nchw == ("image",)


def test_compiled_inner_function_is_not_poisoned(tmp_path):
    class Compiled(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = GN(2, epsilon=0.05)

        @tf.function
        def call(self, x):
            return self.norm(x)

    model = sequential(layers.Conv2D(4, 3), Compiled(), shape=(6, 6, 3))
    traced, _ = assert_parity(model, tmp_path)
    assert traced.groupnorms == ()  # stock computation: right, only slower
    (x,) = samples(model, 4)
    norm = model.layers[1].norm
    expected = oracle.group_norm(model.layers[0](x), 2, norm.gamma.numpy(), norm.beta.numpy(), 0.05)
    np.testing.assert_allclose(model(x), expected, atol=2e-5)


def test_subclass_with_its_own_computation_keeps_it(tmp_path):
    class Doubled(GN):
        def _apply_normalization(self, **arguments):
            return 2.0 * super()._apply_normalization(**arguments)

    traced, _ = assert_parity(sequential(Doubled(2), shape=(4, 4, 6)), tmp_path)
    assert traced.groupnorms == ()


def test_arithmetic_on_weights_is_done_once(tmp_path):
    class Standardized(layers.Conv2D):
        def convolution_op(self, inputs, kernel):
            mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
            return super().convolution_op(inputs, (kernel - mean) * tf.math.rsqrt(variance + 1e-5))

    model = sequential(Standardized(8, 3), GN(2), shape=(6, 6, 3))
    _, graph = assert_parity(model, tmp_path)
    assert len(graph.graph.node) == 1 + 4 + 2


def test_tied_weights_are_stored_once(tmp_path):
    conv = layers.Conv2D(4, 3, padding="same")
    inputs = tf_keras.Input((6, 6, 4))
    model = randomize(tf_keras.Model(inputs, conv(GN(2)(conv(inputs)))))
    _, graph = assert_parity(model, tmp_path)
    assert [list(t.dims) for t in graph.graph.initializer].count([4, 4, 3, 3]) == 1


def test_mixed_float16_keeps_groupnorm_in_float32(tmp_path):
    half = "mixed_float16"
    stack = [layers.Conv2D(8, 3, dtype=half), GN(4, dtype=half), layers.ReLU(dtype=half)]
    model = sequential(*stack, layers.Conv2D(4, 3, dtype=half), GN(2), shape=(7, 7, 3))
    model.layers[1].gamma.assign([1 + 2**-13] * 8)  # lost in half precision
    _, graph = assert_parity(model, tmp_path, tolerance=5e-3)
    kept = [onnx.numpy_helper.to_array(t) for t in graph.graph.initializer]
    assert any(a.dtype == np.float32 and np.array_equal(a, [1 + 2**-13] * 8) for a in kept)
    assert any(a.dtype == np.float16 and a.shape == (8, 3, 3, 3) for a in kept)


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_pure_float16(options, tmp_path):
    half = {"dtype": "float16"}
    image = tf_keras.Input((7, 7, 3), **half)
    x = layers.Conv2D(8, 3, **half)(image)
    norm = GN(4, **half, **options)
    model = randomize(tf_keras.Model(image, layers.Conv2D(2, 1, **half)(norm(x))))
    traced, graph = export(model)
    (sample,) = samples(model, 3)
    (got,) = run(graph, traced, [sample.astype("float16")], tmp_path)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, model(sample.astype("float16")), atol=2e-2)
    gamma, beta = (None if w is None else w.numpy() for w in (norm.gamma, norm.beta))
    inner = tf_keras.Model(image, x)(sample.astype("float16")).numpy().astype("float64")
    normal = oracle.group_norm(inner, 4, gamma, beta, norm.epsilon).astype("float16")
    np.testing.assert_allclose(got, model.layers[-1](normal), atol=1e-2)


def test_floatx_of_16_bits(tmp_path):
    tf_keras.backend.set_floatx("float16")
    try:
        model = randomize(tf_keras.Sequential([tf_keras.Input((4, 6)), GN(3)]))
        traced, graph = export(model)
        x = samples(model, 3)[0].astype("float16")
        (got,) = run(graph, traced, [x], tmp_path)
        np.testing.assert_allclose(got, model(x), atol=2e-2)
    finally:
        tf_keras.backend.set_floatx("float32")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_types_without_portable_form_are_refused_by_layer(dtype):
    inputs = tf_keras.Input((4, 4, 6), dtype=dtype)
    inner = tf_keras.Sequential([GN(2, dtype=dtype, name="gn")], name="block")
    with pytest.raises(ExportError, match=rf"^block/gn: .*{dtype}"):
        trace(tf_keras.Model(inputs, inner(inputs)))
    assert GN.call is STOCK_CALL


def test_operation_without_onnx_form_is_named_with_its_layer():
    odd = layers.Lambda(lambda x: tf.math.betainc(x, x, x), name="odd")
    with pytest.raises(ExportError, match=r"odd/.*Betainc"):
        trace(sequential(GN(2), odd, shape=(4,)))


def test_failing_trace_says_why_and_restores_groupnorm():
    built = False

    class Failing(layers.Layer):
        def call(self, x):
            if built:
                raise RuntimeError("no graph for me")
            return x

    inputs = tf_keras.Input((4,))
    model = tf_keras.Model(inputs, Failing(name="failing")(GN(2)(inputs)))
    built = True
    with pytest.raises(ExportError, match=r"^failing: .*no graph for me$"):
        trace(model)
    assert GN.call is STOCK_CALL


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (AssertionError(), "AssertionError"),
        (KeyError("width"), "KeyError: 'width'"),
        (ValueError("too many"), "too many"),
    ],
)
def test_message_of_a_failing_trace_is_the_innermost(raised, line):
    class Failing(layers.Layer):
        ready = False

        def call(self, x):
            if self.ready:
                raise raised
            return x

    failing = Failing()
    inputs = tf_keras.Input((4,))
    inner = tf_keras.Sequential([failing])
    model = tf_keras.Model(inputs, inner(inputs))
    failing.ready = True
    with pytest.raises(ExportError) as caught:
        trace(model)
    assert caught.value.message.endswith(line)
    assert "in user code" not in str(caught.value)


def test_message_without_the_name_of_an_error_is_found():
    text = """in user code:

    File "/home/x/model.py", line 3, in serve  *
        result = model(x)

    ValueError: Exception encountered when calling layer 'gn' (type GroupNormalization).

    Expected half got float

    Call arguments received by layer 'gn' (type GroupNormalization):
      • inputs=tf.Tensor(shape=(None, 4), dtype=float16)
"""
    assert reason(ValueError(text)) == "Expected half got float"


def test_message_of_tf2onnx_says_why_and_holds_none_of_its_internals():
    inputs = tf_keras.Input((3,), dtype="int64")
    model = tf_keras.Model(inputs, layers.IntegerLookup(vocabulary=[3, 5])(inputs))
    with pytest.raises(ExportError, match=r"LookupTableFindV2.: .*table") as caught:
        trace(model)
    assert "fct=" not in str(caught.value)


def test_sparse_input_is_refused_by_name():
    inputs = tf_keras.Input((4,), sparse=True, name="words")
    with pytest.raises(ExportError, match="'words' is sparse"):
        trace(tf_keras.Model(inputs, layers.Dense(2)(inputs)))


def test_another_thread_sees_stock_groupnorm_meanwhile():
    tracing, done = threading.Event(), threading.Event()
    built = False

    class Slow(layers.Layer):
        def call(self, x):
            if built:
                tracing.set()
                done.wait(30)
            return x

    inputs = tf_keras.Input((4, 6))
    model = randomize(tf_keras.Model(inputs, GN(2)(Slow()(inputs))))
    built = True
    other = randomize(tf_keras.Sequential([tf_keras.Input((4, 6)), GN(3, epsilon=0.2)]), seed=5)
    (x,) = samples(other, 3)
    results = []
    exporting = threading.Thread(target=lambda: results.append(trace(model)))
    exporting.start()
    try:
        assert tracing.wait(30)
        assert GN.call is not STOCK_CALL
        layer = other.layers[0]
        expected = oracle.group_norm(x, 3, layer.gamma.numpy(), layer.beta.numpy(), 0.2)
        np.testing.assert_allclose(other(x), expected, atol=2e-5)
    finally:
        done.set()
        exporting.join()
    assert GN.call is STOCK_CALL
    assert len(results[0].groupnorms) == 1


def test_model_and_logging_stay_as_they_were():
    model = sequential(layers.Conv2D(4, 3), GN(2), shape=(6, 6, 3))
    before, config = model.get_weights(), model.to_json()
    loggers = [logging.getLogger("tf2onnx"), tf.get_logger()]
    state = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    first, second = trace(model), trace(model)
    assert [(log.level, log.propagate, log.handlers) for log in loggers] == state
    assert model.to_json() == config
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    one, two = (build(t.graph, t.arrays).SerializeToString() for t in (first, second))
    assert one == two


_EXPORT = """
import sys
import tf_keras
from tf_keras import layers
from layerswap.keras_graph.bridge import trace
from layerswap.onnx_graph.build import assemble
from layerswap.onnx_graph.files import write
for _ in range(int(sys.argv[2])):  # moves the counters that names come from
    layers.Dense(2)(tf_keras.Input((2,)))
    trace(tf_keras.Sequential([tf_keras.Input((2,), name="a"), layers.ReLU(name="b")]))
inputs = tf_keras.Input((None, 8, 3), name="image")
ones = tf_keras.initializers.RandomNormal(seed=1)
x = inputs
for i in range(3):
    y = layers.Conv2D(8, 3, padding="same", kernel_initializer=ones, name=f"conv{i}")(x)
    y = layers.GroupNormalization(4, name=f"gn{i}", gamma_initializer=ones)(y)
    y = layers.BatchNormalization(name=f"bn{i}")(layers.ReLU(name=f"relu{i}")(y))
    x = y if i == 0 else layers.Concatenate(name=f"cat{i}")([x, y])
lstm = layers.GlobalAveragePooling2D(name="pool")(x)
model = tf_keras.Model(inputs, [x, lstm], name="model")
traced = trace(model)
write(*assemble(traced.graph, traced.arrays, {"b": "2", "a": "1"}), sys.argv[1])
"""


def test_equal_bytes_in_every_process(tmp_path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _EXPORT, str(path), str(seed)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        for seed, path in enumerate(paths)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert paths[0].read_bytes() == paths[1].read_bytes()


_LOOPS = """
import hashlib
import sys
sys.path.insert(0, sys.argv[1])
import tensorflow as tf
import tf_keras
from tf_keras import layers
from built import build
from layerswap.keras_graph.bridge import trace

class Branch(layers.Layer):
    def build(self, shape):
        self.norm = layers.GroupNormalization(2, name="norm")

    def call(self, x):
        mean = lambda: tf.reduce_mean(x, 1, keepdims=True) + x
        return tf.cond(tf.reduce_sum(x) > 0, lambda: self.norm(x), mean)

class Loop(layers.Layer):
    def call(self, x):
        k, q = tf.nn.relu(x), x * 2.0
        body = lambda i, a, b: (i + 1, a * k + b + 0.5, b * 0.5 + q - a)
        return tf.add_n(tf.while_loop(lambda i, a, b: i < 5, body, [0, x, x + 1])[1:])

one = tf_keras.initializers.Constant(0.5)
own = dict(name="own", kernel_initializer=one, recurrent_initializer=one)
masked = lambda layer: lambda x: layer(layers.Masking(name="mask")(x))
cells = [layers.LSTMCell(3, **{**own, "name": "a"}), layers.GRUCell(4, **own)]
made = {
    "rnn": lambda: layers.SimpleRNN(4, **own),
    "gru": lambda: masked(layers.GRU(4, **own)),
    "lstm": lambda: masked(layers.LSTM(4, return_sequences=True, **own)),
    "both": lambda: masked(layers.Bidirectional(layers.LSTM(4, **own), name="both")),
    "cells": lambda: layers.RNN(cells, name="cells"),
    "convolution": lambda: layers.ConvLSTM2D(3, 3, **own),
    "branch": lambda: Branch(name="branch"),
    "loop": lambda: Loop(name="loop"),
}
for kind, make in made.items():
    inputs = tf_keras.Input((3, 6, 6, 2) if kind == "convolution" else (6, 8), name="image")
    model = tf_keras.Model(inputs, make()(inputs), name="model")
    for _ in range(int(sys.argv[2])):
        traced = trace(model)
        graph = build(traced.graph, traced.arrays)
        print(kind, hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest())
"""


def test_equal_bytes_of_loops_and_branches():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _LOOPS, os.path.dirname(build.__code__.co_filename), times],
            env={**os.environ, "PYTHONHASHSEED": seed, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, times in (("1", "3"), ("2", "2"))
    ]
    lines = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [len(found) for found in lines] == [24, 16]
    assert len(set(lines[0] + lines[1])) == 8
