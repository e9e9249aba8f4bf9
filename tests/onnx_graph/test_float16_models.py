"""Keras models in float16, against Keras: in ONNX Runtime, and in true float16 arithmetic.

ONNX Runtime computes float16 on a CPU in float32 for the most part; onnx's own evaluator does
not.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import tf_keras
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from tf_keras import layers

from built import build
from layerswap.errors import ExportError
from layerswap.keras_graph.bridge import trace
from layerswap.onnx_graph.opsets import newest_opset

RNG = np.random.default_rng(0)
IMAGE = (16, 16, 3)
OLD = onnx.__version__ < "1.17"  # its evaluator can't resize by scales


def normal(*shape, scale=1.0, mean=0.0):
    return RNG.normal(mean, scale, size=shape).astype(np.float32)


def halved(model, opset=18):
    traced = trace(model, opset=min(opset, 18))
    return build(traced.graph, traced.arrays, opset=opset, float16=True)


def size(model, **options):
    traced = trace(model)
    return build(traced.graph, traced.arrays, **options).ByteSize()


def names(tensors):
    return [tensor.name for tensor in tensors]


def assert_same(model, *arrays, opset=18, exact=False):
    """Both runtimes against Keras; the graph."""
    graph = halved(model, opset)
    expected = model(arrays if len(arrays) > 1 else arrays[0], training=False)
    expected = [np.asarray(y) for y in tf.nest.flatten(expected)]
    feeds = dict(zip(names(graph.graph.input), arrays, strict=True))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    runs = [session.run(None, feeds)]
    if not (any(nodes(graph, "Resize")) and OLD):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            runs.append(ReferenceEvaluator(graph).run(None, feeds))
    for results in runs:
        for got, want in zip(results, expected, strict=True):
            assert got.dtype == want.dtype
            assert np.isfinite(want).all()
            atol = 0 if exact else 1e-2 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    one_cast_each(graph)
    return graph


def one_cast_each(model):
    """No tensor is cast twice to one type, and none there and back."""
    casts = {(n.input[0], n.attribute[0].i): n.output[0] for n in nodes(model, "Cast")}
    assert len(casts) == len(list(nodes(model, "Cast")))
    kinds = types(model)
    made = {out: source for (source, _), out in casts.items()}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    for out, source in made.items():
        if kinds.get(out) in floats and source in made:
            assert kinds[made[source]] not in floats


def nodes(model, op_type):
    return (n for n in model.graph.node if n.op_type == op_type)


def types(model):
    known = onnx.shape_inference.infer_shapes(model).graph
    values = (*known.value_info, *known.output, *known.input)
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    return kinds | {t.name: t.data_type for t in known.initializer}


def kinds_of(model, op_type):
    known = types(model)
    return {known[n.output[0]] for n in nodes(model, op_type)}


HALF, FULL = {TensorProto.FLOAT16}, {TensorProto.FLOAT}


def functional(shape, build_output, **options):
    inputs = tf_keras.Input(shape, **options)
    return tf_keras.Model(inputs, build_output(inputs))


def norm(**options):
    return layers.GroupNormalization(4, **options)


def residual(inputs):
    x = layers.Conv2D(32, 3, padding="same")(inputs)
    for _ in range(2):
        y = layers.Activation("swish")(norm()(x))
        y = layers.Conv2D(32, 3, padding="same", activation="swish")(y)
        gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
        gate = layers.Conv2D(8, 1, activation="relu")(gate)
        gate = layers.Conv2D(32, 1, activation="sigmoid")(gate)
        x = layers.Add()([x, layers.Multiply()([y, gate])])
    return layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def mobile(inputs):
    x = layers.ReLU(6.0)(layers.Conv2D(16, 3, strides=2, padding="same")(inputs))
    for stride in (1, 2):
        x = layers.DepthwiseConv2D(3, strides=stride, padding="same")(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(32, 1)(x)))
    return layers.Dense(10)(layers.Flatten()(layers.MaxPool2D()(x)))


def decoder(inputs):
    x = layers.Conv2D(8, 3, padding="same")(inputs)
    y = layers.UpSampling2D(interpolation="bilinear")(x)
    z = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(x)
    x = layers.Concatenate()([y, z, layers.UpSampling2D()(x)])
    return layers.SeparableConv2D(4, 3, padding="same", activation="tanh")(x)


def transformer(inputs):
    x = layers.Dense(32)(inputs)
    x = x + layers.MultiHeadAttention(2, 16)(x, x, use_causal_mask=True)
    y = layers.LayerNormalization()(x)
    return x + layers.Dense(32)(layers.Dense(64, activation=tf.nn.silu)(y))


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize("make", [residual, mobile, decoder], ids=lambda f: f.__name__)
def test_convolutional_networks(make, opset):
    model = functional(IMAGE, make)
    if opset > newest_opset():
        pytest.skip("onnxruntime doesn't know the opset")
    graph = assert_same(model, normal(2, *IMAGE), opset=opset)
    for op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Clip", "Resize", "Concat"):
        assert kinds_of(graph, op_type) <= HALF | {TensorProto.INT64, TensorProto.INT32}
    assert kinds_of(graph, "Sigmoid") <= HALF


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_attention_with_a_mask(opset):
    if opset > newest_opset():
        pytest.skip("onnxruntime doesn't know the opset")
    graph = assert_same(functional((6, 16), transformer), normal(2, 6, 16), opset=opset)
    assert kinds_of(graph, "MatMul") == HALF
    assert kinds_of(graph, "Softmax") == FULL


def test_a_convolutional_file_becomes_half_as_large():
    model = functional((16, 16, 3), lambda x: layers.Conv2D(64, 9)(layers.Conv2D(64, 3)(x)))
    assert size(model, float16=True) < 0.52 * size(model)
    model = functional((7,), layers.Embedding(5_000, 16), dtype="int32")
    assert size(model, float16=True) < 0.52 * size(model)


def resnet(inputs, normalised):
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for _ in range(3):
        y = layers.Conv2D(16, 3, padding="same")(x)
        y = layers.ReLU()(norm()(y) if normalised else layers.BatchNormalization()(y))
        y = layers.Conv2D(16, 3, padding="same")(y)
        y = norm()(y) if normalised else layers.BatchNormalization()(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    return x


def test_only_group_normalisation_leaves_float16():
    plain = halved(functional(IMAGE, lambda x: resnet(x, False)))
    assert len(list(nodes(plain, "Conv"))) == 7
    assert len(list(nodes(plain, "Cast"))) == 2  # the input's and the output's
    traced = trace(functional(IMAGE, lambda x: resnet(x, True)))
    graph = build(traced.graph, traced.arrays, float16=True)
    assert kinds_of(graph, "Conv") == HALF
    assert kinds_of(graph, "Relu") >= HALF
    assert Counter(n.op_type for n in graph.graph.node)["Cast"] == 2 + 2 * 6


@pytest.mark.parametrize(
    "scale", [0, 1e-5, 1, 300, 1e5], ids=["zero", "tiny", "usual", "large", "huge"]
)
def test_normalisation_by_arithmetic(scale):
    x = normal(3, 300, scale=scale)
    graph = assert_same(functional((300,), lambda t: layers.UnitNormalization()(t)), x)
    assert not list(nodes(graph, "Cast"))

    def standardised(t):
        mean = tf.reduce_mean(t, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(t - mean), axis=-1, keepdims=True)
        return (t - mean) / tf.sqrt(variance + 1e-9)

    assert_same(functional((300,), standardised), x)


@pytest.mark.parametrize("gain", [1e-4, 1, 300])
def test_normalisation_of_what_a_convolution_makes(gain):
    """The input is float16 here, and large enough that its square isn't."""
    start = tf_keras.initializers.RandomNormal(stddev=gain, seed=1)

    def unit(t):
        t = layers.Dense(64, kernel_initializer=start)(t)
        hand = t - tf.reduce_mean(t, -1, keepdims=True)
        hand = hand / tf.sqrt(tf.reduce_mean(hand * hand, -1, keepdims=True) + 1e-9)
        shifted = tf.reshape(t, (-1, 64)) * t
        length = tf.sqrt(tf.reduce_sum(shifted, -1, keepdims=True) + 1e-12)
        return [layers.UnitNormalization()(t), layers.LayerNormalization()(t), hand, t / length]

    assert_same(functional((32,), unit), normal(4, 32))


def test_a_normalised_dot_product():
    a, b = tf_keras.Input((40,)), tf_keras.Input((40,))
    model = tf_keras.Model([a, b], layers.Dot(1, normalize=True)([a, b]))
    for scale in (1e-5, 1, 1e4):
        assert_same(model, normal(3, 40, scale=scale), normal(3, 40, scale=scale))


def test_products_of_squares_stay_float32():
    """As in generalised divisive normalisation."""

    def divisive(t):
        t = layers.Conv2D(8, 1, kernel_initializer=tf_keras.initializers.Constant(100.0))(t)
        weights = layers.Conv2D(8, 1, kernel_initializer="ones", bias_initializer="ones")
        return t / tf.sqrt(weights(t * t))

    assert_same(functional(IMAGE, divisive), np.abs(normal(2, *IMAGE, scale=3)))


def test_products_of_sums_stay_float32():
    def pooled(t):
        return layers.Dense(4, kernel_initializer="ones")(tf.reduce_sum(t, (1, 2)))

    x = np.abs(normal(2, *IMAGE, scale=300))
    assert x.sum((1, 2)).max() > np.finfo(np.float16).max / 2
    assert_same(functional(IMAGE, pooled), 3 * x)

    def swish_by_hand(t):
        t = layers.Dense(16)(t)
        return layers.Dense(4)(t / (1 + tf.exp(-t)))

    graph = assert_same(functional((8,), swish_by_hand), normal(2, 8))
    assert kinds_of(graph, "Gemm") | kinds_of(graph, "MatMul") == HALF


def test_weights_that_float16_loses():
    x = normal(2, 32)
    for scale in (1e-8, 1e-5, 1e5):
        start = tf_keras.initializers.RandomNormal(stddev=scale, seed=1)
        dense = layers.Dense(8, kernel_initializer=start, use_bias=False)
        graph = assert_same(functional((32,), dense), x)
        assert {t.data_type for t in graph.graph.initializer} == FULL
    table = layers.Embedding(50, 8, embeddings_initializer=tf_keras.initializers.Constant(1e-8))
    assert_same(functional((3,), table, dtype="int32"), np.array([[1, 2, 49]], np.int32))


def test_single_weights_may_vanish():
    start = np.ones((4, 8), np.float32)
    start[1] = 1e-20
    dense = layers.Dense(8, kernel_initializer=tf_keras.initializers.Constant(start))
    graph = assert_same(functional((4,), dense), normal(2, 4))
    assert kinds_of(graph, "Gemm") | kinds_of(graph, "MatMul") == HALF


def test_indices_in_a_float32_input():
    x = np.array([[4001, 1], [4003, 1], [2049, 5]], np.float32)
    graph = assert_same(
        functional((2,), lambda i: layers.Embedding(5_000, 4)(tf.reshape(i[:, 0:1], (-1,)))), x
    )
    assert kinds_of(graph, "Gather") == HALF


def test_numbers_in_a_table_keep_their_digits():
    """Float16 has no 2049."""
    ids = tf_keras.initializers.Constant(np.arange(5_000, dtype=np.float32).reshape(-1, 1))

    def looked_up(i):
        return tf.cast(layers.Embedding(5_000, 1, embeddings_initializer=ids)(i), tf.int32)

    assert_same(functional((1,), looked_up, dtype="int32"), np.array([[2049]], "i4"), exact=True)


def test_large_constants_stay_float32():
    x = normal(2, 8, 8, 3, scale=1e3, mean=1e5)

    def normalised(t):
        return layers.Conv2D(4, 3)(layers.Normalization(mean=1e5, variance=1e6)(t))

    graph = assert_same(functional((8, 8, 3), normalised), x)
    assert kinds_of(graph, "Conv") == HALF
    capped = functional((8,), lambda t: layers.Dense(3)(layers.ReLU(max_value=1e6)(t)))
    assert_same(capped, normal(2, 8))

    def scaled(t):
        t = layers.Conv2D(4, 3)(layers.Rescaling(500.0)(t))
        t = layers.Rescaling(500.0)(t)
        t = t - tf.reduce_mean(t, (1, 2), keepdims=True)
        return t / (tf.math.reduce_std(t, (1, 2), keepdims=True) + 1e-6)

    assert_same(functional((8, 8, 3), scaled), normal(2, 8, 8, 3))


@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_recurrent_layers_stay_float32(layer):
    def net(t):
        return layers.Dense(4)(layer(8)(t))

    graph = assert_same(functional((7, 16), net), normal(2, 7, 16))
    assert kinds_of(graph, layer.__name__) == FULL


def test_outputs_that_are_used_on_and_outputs_that_are_inputs():
    def several(t):
        a = layers.Conv2D(8, 3, padding="same")(t)
        b = layers.ReLU()(a)
        return [t, a, b, norm()(b), layers.Conv2D(4, 1)(b), tf.reduce_mean(a, (1, 2))]

    assert_same(functional(IMAGE, several), normal(2, *IMAGE))


def test_a_model_in_float64_is_refused_and_one_without_weights_is_not():
    double = layers.Dense(3, dtype="float64", name="d")
    with pytest.raises(ExportError, match="computes in float64") as caught:
        halved(functional((4,), double, dtype="float64"))
    assert "float32" in caught.value.hint
    graph = assert_same(functional((4,), lambda t: t * 2), normal(2, 4), exact=True)
    assert not list(nodes(graph, "Cast"))
