"""The affine form against the float64 oracle, and the signature against the model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import oracle
from built import build
from layerswap.errors import ExportError
from layerswap.keras_graph import storage
from layerswap.keras_graph.bridge import trace
from layerswap.keras_graph.serving import affine_group_norm, serving_signature
from layerswap.keras_graph.tracing import groupnorm_call

SHAPES = [
    ((12,), -1),
    ((12,), 1),
    ((7, 12), -1),
    ((12, 7), 1),
    ((4, 3, 12), -1),
    ((12, 4, 3), 1),
    ((12, 4, 3), -3),
    ((2, 3, 4, 12), 4),
    ((12, 2, 3, 4), 1),
]


def group_norm(shape, groups, axis=-1, seed=0, **options):
    """A built GroupNormalization with random weights."""
    layer = tf_keras.layers.GroupNormalization(groups, axis=axis, epsilon=0.03, **options)
    layer.build((None, *shape))
    generator = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(generator.normal(size=weight.shape) + 0.5)
    return layer


def truth(layer, x):
    """What the oracle says about the layer."""
    gamma, beta = (None if w is None else w.numpy() for w in (layer.gamma, layer.beta))
    return oracle.group_norm(x, layer.groups, gamma, beta, layer.epsilon, layer.axis)


def samples(*shape, mean=3.0, std=2.0, seed=1):
    return (np.random.default_rng(seed).normal(size=shape) * std + mean).astype(np.float32)


def with_open_axes(layer, x):
    """Runs the affine form on a graph in which all axes but the channels are open."""
    axis = layer.axis % x.ndim
    shape = [size if i == axis else None for i, size in enumerate(x.shape)]
    spec = tf.TensorSpec(shape, x.dtype)
    return tf.function(lambda t: affine_group_norm(layer, t), input_signature=[spec])(x).numpy()


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("groups", [1, 3, -1])
def test_affine_form_is_group_norm(shape, axis, groups):
    layer, x = group_norm(shape, groups, axis), samples(5, *shape)
    expected = truth(layer, x)
    np.testing.assert_allclose(with_open_axes(layer, x), expected, atol=1e-5)
    np.testing.assert_allclose(affine_group_norm(layer, tf.constant(x)), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}])
def test_without_scale_or_center(options):
    layer, x = group_norm((4, 12), 3, **options), samples(5, 4, 12)
    np.testing.assert_allclose(affine_group_norm(layer, tf.constant(x)), truth(layer, x), atol=1e-5)


def test_without_scale_and_center():
    layer, x = group_norm((4, 12), 4, scale=False, center=False), samples(5, 4, 12)
    np.testing.assert_allclose(affine_group_norm(layer, tf.constant(x)), truth(layer, x), atol=1e-5)


def test_groups_of_minus_one_that_no_build_resolved():
    layer, x = group_norm((4, 12), -1), samples(5, 4, 12)
    layer.groups = -1
    np.testing.assert_allclose(affine_group_norm(layer, tf.constant(x)), truth(layer, x), atol=1e-5)


def test_no_samples():
    layer = group_norm((4, 12), 3)
    assert with_open_axes(layer, samples(0, 4, 12)).shape == (0, 4, 12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_of_16_bit_inputs_are_float32(dtype):
    """With std 300 the variance leaves float16's range, and the stock layer gives NaN."""
    layer = group_norm((64, 12), 3, dtype=f"mixed_{dtype}")
    x = tf.cast(samples(2, 64, 12, mean=100.0, std=300.0), dtype)
    y = affine_group_norm(layer, x)
    assert y.dtype == x.dtype
    error = np.abs(tf.cast(y, tf.float32) - truth(layer, tf.cast(x, tf.float32).numpy())).max()
    assert error < (0.01 if dtype == "float16" else 0.08)


def test_float64_stays_float64():
    layer = group_norm((4, 12), 3, dtype="float64")
    x = samples(5, 4, 12).astype(np.float64)
    y = affine_group_norm(layer, tf.constant(x))
    assert y.dtype == tf.float64
    np.testing.assert_allclose(y, truth(layer, x), atol=1e-12)


def functional():
    """Two inputs, two outputs, open spatial axes, a shared layer and dropout."""
    image = tf_keras.Input((None, None, 3), name="image")
    extra = tf_keras.Input((4,), name="extra")
    x = tf_keras.layers.Conv2D(8, 3, name="conv")(image)
    x = tf_keras.layers.GroupNormalization(2, name="norm")(x)
    x = tf_keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = tf_keras.layers.Dropout(0.5, name="drop")(x)
    shared = tf_keras.layers.GroupNormalization(4, name="shared")
    scores = tf_keras.layers.Dense(3, name="scores")(shared(shared(x)))
    side = tf_keras.layers.Dense(2, name="side")(extra)
    return tf_keras.Model({"b": image, "a": extra}, {"z": scores, "y": side})


def test_signature_has_the_names_of_the_model_and_open_axes():
    signature = serving_signature(functional())
    (specs, keywords) = signature.structured_input_signature
    assert {spec.name: spec.shape.as_list() for spec in specs} == {
        "image": [None, None, None, 3],
        "extra": [None, 4],
    }
    assert keywords == {}
    assert set(signature.structured_outputs) == {"scores", "side"}


def test_signature_computes_the_model():
    model = functional()
    for weight in model.weights:
        weight.assign(np.random.default_rng(weight.shape[0]).normal(size=weight.shape))
    signature = serving_signature(model)
    for batch, size in ((1, 5), (3, 9)):
        image, extra = samples(batch, size, size, 3), samples(batch, 4)
        expected = model({"b": image, "a": extra}, training=False)
        got = signature(tf.constant(extra), tf.constant(image))
        np.testing.assert_allclose(got["scores"], expected["z"], atol=1e-5)
        np.testing.assert_allclose(got["side"], expected["y"], atol=1e-5)


def test_signature_uses_the_affine_form_and_the_own_variables():
    model = functional()
    signature = serving_signature(model)
    operations = {operation.type for operation in signature.graph.get_operations()}
    assert "Tile" in operations
    assert "OnesLike" not in operations
    assert {id(v.handle) for v in signature.variables} == {id(v.handle) for v in model.variables}


def test_the_stock_layer_is_back_afterwards():
    model, x = functional(), samples(2, 5, 5, 8)
    layer = model.get_layer("norm")
    serving_signature(model)
    traced = tf.function(lambda t: layer(t)).get_concrete_function(tf.TensorSpec(x.shape))
    assert any(operation.type == "Reshape" for operation in traced.graph.get_operations())
    assert not any(operation.type == "Tile" for operation in traced.graph.get_operations())


def test_a_batch_that_the_model_fixes_stays_fixed():
    x = tf_keras.Input((6,), batch_size=4, name="x")
    shaped = tf_keras.layers.Lambda(lambda t: tf.reshape(t, (4, 3, 2)))(x)
    model = tf_keras.Model(x, tf_keras.layers.GroupNormalization(2)(shaped))
    signature = serving_signature(model)
    ((spec,), _) = signature.structured_input_signature
    assert spec.shape.as_list() == [4, 6]
    values = tf.constant(samples(4, 6))
    (got,) = signature(values).values()
    np.testing.assert_allclose(got, model(values), atol=1e-5)


def test_a_batch_that_the_model_does_not_need_is_opened():
    x = tf_keras.Input((6,), batch_size=4, name="x")
    model = tf_keras.Model(x, tf_keras.layers.GroupNormalization(2)(x))
    assert serving_signature(model)(tf.constant(samples(7, 6)))


def test_the_batch_of_a_first_call_stays_open():
    model = tf_keras.Sequential([layers.Dense(4), layers.GroupNormalization(2)])
    model(samples(2, 5))
    ((spec,), _) = serving_signature(model).structured_input_signature
    assert spec.shape.as_list() == [None, 5]


class Pair(tf_keras.Model):
    """Takes two tensors by position."""

    def __init__(self):
        super().__init__()
        self.norm = layers.GroupNormalization(2)

    def call(self, x, y):
        return self.norm(x) * y


def test_two_tensors_by_position():
    model, x, y = Pair(), tf.constant(samples(3, 4)), tf.constant(samples(3, 4, seed=2))
    expected = model(x, y)
    signature = serving_signature(model)
    assert [spec.name for spec in signature.structured_input_signature[0]] == ["input_1", "input_2"]
    np.testing.assert_allclose(signature(x, y)["output_1"], expected, atol=1e-5)


class Compiled(layers.Layer):
    """Holds a GroupNormalization in a `tf.function`, which keeps what it traces."""

    def __init__(self):
        super().__init__(name="compiled")
        self.norm = layers.GroupNormalization(2, epsilon=0.05, name="norm")

    def call(self, x):
        return self.function(x)

    @tf.function
    def function(self, x):
        return tf.cond(tf.reduce_sum(x) > -1e9, lambda: self.norm(x), lambda: x)


def operations(function):
    """The operations of each traced form, bodies of branches included."""
    found = []
    for concrete in function._list_all_concrete_functions():
        definition = concrete.graph.as_graph_def()
        nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
        found.append(sorted(node.op for node in nodes))
    return sorted(found)


@pytest.mark.parametrize("call_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"serving_only": True}])
def test_functions_inside_the_model_keep_the_stock_form(options, call_first, tmp_path):
    """Exported or not, the same is cached, predicted, and exported to ONNX."""
    x = samples(3, 4, 6)
    twins = []
    for exported in (True, False):
        inputs = tf_keras.Input((4, 6), name="x")
        inner = Compiled()
        model = tf_keras.Model(inputs, inner(inputs), name="model")
        inner.norm.gamma.assign(np.linspace(0.5, 2, 6))
        if call_first:
            model(x)
        if exported:
            storage.save(model, tmp_path / "saved", "savedmodel", **options)
        answers = model(x), model.predict(x, verbose=0)
        assert all("Tile" not in kinds for kinds in operations(inner.function))
        kept = {tuple(kinds) for kinds in operations(inner.function)}
        traced = trace(model)
        onnx_bytes = build(traced.graph, traced.arrays).SerializeToString(deterministic=True)
        twins.append((*answers, kept, onnx_bytes))
    (called, predicted, kept, graph), (called2, predicted2, kept2, graph2) = twins
    np.testing.assert_array_equal(called, called2)
    np.testing.assert_array_equal(predicted, predicted2)
    assert kept >= kept2
    assert graph == graph2


def test_a_function_that_the_export_is_the_first_to_trace_keeps_the_stock_form():
    """A subclassed model, called on three samples, is exported with an open batch."""

    class Outer(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Compiled()

        def call(self, x):
            return self.inner(x)

    model = Outer()
    model(samples(3, 4, 6))
    before = operations(model.inner.function)
    serving_signature(model)
    after = operations(model.inner.function)
    assert len(after) > len(before)
    assert all("Tile" not in kinds for kinds in after)


def test_branches_of_the_model_itself_have_the_affine_form():
    class Branch(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = layers.GroupNormalization(2)

        def call(self, x):
            return tf.cond(tf.reduce_sum(x) > -1e9, lambda: self.norm(x), lambda: x)

    inputs = tf_keras.Input((4, 6))
    definition = serving_signature(tf_keras.Model(inputs, Branch()(inputs))).graph.as_graph_def()
    assert "Tile" in {n.op for f in definition.library.function for n in f.node_def}


class Subclassed(tf_keras.Model):
    """No names, no `training` argument, dropout inside."""

    def __init__(self):
        super().__init__()
        self.dense = tf_keras.layers.Dense(4)
        self.drop = tf_keras.layers.Dropout(0.9)
        self.norm = tf_keras.layers.GroupNormalization(2)

    def call(self, x):
        if tf.reduce_sum(x) > 1e9:  # only autograph makes this work in a graph
            x = x * 0.0
        return self.norm(self.drop(self.dense(x)))


def test_a_subclassed_model():
    model, x = Subclassed(), tf.constant(samples(3, 5))
    expected = model(x)
    got = serving_signature(model)(x)
    np.testing.assert_allclose(got["output_1"], expected, atol=1e-5)


def test_a_subclassed_model_that_was_never_called():
    with pytest.raises(ExportError, match="isn't known"):
        serving_signature(Subclassed())


def test_an_input_that_is_not_dense():
    x = tf_keras.Input((4,), sparse=True, name="x")
    model = tf_keras.Model(x, tf_keras.layers.Dense(2)(x))
    with pytest.raises(ExportError, match="SparseTensorSpec"):
        serving_signature(model)


def test_lite_runs_it_with_any_batch():
    """LiteRT converts the stock layer, too, but fails on BROADCAST_TO when running it."""
    x = tf_keras.Input((6, 8), name="x")
    layer = tf_keras.layers.GroupNormalization(2)
    model = tf_keras.Model(x, layer(x))
    signature = serving_signature(model)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([signature], model)
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    values = samples(3, 6, 8)
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, values.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, values)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(got, truth(layer, values), atol=1e-5)


def test_a_replacement_acts_in_its_own_thread_alone():
    layer = layers.GroupNormalization(1)
    x = tf.constant([[1.0, 2.0]])
    expected = layer(x).numpy()
    with groupnorm_call(lambda layer, inputs: inputs * 0), ThreadPoolExecutor(1) as other:
        assert not layer(x).numpy().any()
        np.testing.assert_array_equal(other.submit(layer, x).result(), expected)
    np.testing.assert_array_equal(layer(x), expected)


def test_nothing_leaks_when_the_block_fails():
    stock = layers.GroupNormalization.call
    with pytest.raises(ZeroDivisionError), groupnorm_call(lambda layer, inputs: 1 / 0):
        layers.GroupNormalization(1)(tf.constant([[1.0, 2.0]]))
    assert layers.GroupNormalization.call is stock


HARD = {
    "normal": (0.0, 1.0),
    "mean 1e3": (1e3, 1.0),
    "mean 1e4": (1e4, 1.0),
    "constant": (1234.567, 0.0),
    "tiny": (0.0, 1e-8),
    "large": (0.0, 1e15),
}


@pytest.mark.parametrize("kind", [*HARD, "channels apart"])
@pytest.mark.parametrize("groups", [1, 4, -1])
def test_hard_inputs_are_as_exact_as_float32_allows(kind, groups):
    """y = x·A + (β − m·A) cancels: the error grows with max|x| over the deviation.

    Rounding of x·A and of m·A, each half an ulp of max|x|·A, and the mean's own error, which a sum
    of n terms in a tree bounds by log₂ n ulps; A = γ/√(v + ε) is at most γ/√ε.
    """
    generator = np.random.default_rng(0)
    mean, deviation = HARD.get(kind, (0.0, 1.0))
    x = (mean + deviation * generator.standard_normal((2, 8, 8, 12))).astype(np.float32)
    if kind == "channels apart":
        x += np.linspace(-100, 100, 12, dtype=np.float32)
    layer = group_norm((8, 8, 12), groups)
    gamma, beta = (np.asarray(v, np.float64) for v in (layer.gamma, layer.beta))
    count = 12 if groups == -1 else groups
    expected = oracle.group_norm(x.astype(np.float64), count, gamma, beta, 0.03, axis=3)
    got = affine_group_norm(layer, tf.constant(x)).numpy()
    size = 64 * 12 // count
    grouped = x.astype(np.float64).reshape(2, 64, count, -1)
    slope = 1 / np.sqrt(grouped.var(axis=(1, 3)).min() + 0.03)
    ulps = 2 + np.log2(size)
    bound = ulps * np.finfo(np.float32).eps * (np.abs(x).max() * slope + 4) * np.abs(gamma).max()
    assert np.abs(got - expected).max() <= bound
