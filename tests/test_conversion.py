"""The swap as a whole: what is carried, refused, saved and kept out of the original.

That every model of the zoo computes the right thing is in `test_zoo.py`.
"""

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import oracle
import zoo
from layerswap.errors import (
    ExportError,
    IndivisibleChannelsError,
    LayerswapError,
    PolicyError,
    UnsupportedModelError,
    UsageError,
)
from zoo.truth import assert_close, truth, values

SAVED = {"keras": "m.keras", "h5": "m.h5", "savedmodel": "m"}


def batchnorms(model):
    return [m for m in model.submodules if isinstance(m, BatchNormalizationBase)]


def groupnorms(model):
    return [m for m in model.submodules if isinstance(m, layers.GroupNormalization)]


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(
    "name", ["nested_used_twice", "residual", "several_inputs_and_outputs", "dictionaries"]
)
def test_files_reload_with_plain_keras(name, kind, tmp_path):
    model = zoo.build(name)
    model.compile("adam", "mse")
    converted = ls.swap(model)
    artifact = ls.export(converted, tmp_path / SAVED[kind])
    assert artifact.parity.ok
    again = tf_keras.models.load_model(artifact.path)
    x = zoo.sample(model)
    assert_close(again(x), converted.model(x), 1e-6)
    assert batchnorms(again) == []


def test_what_the_source_couldn_t_be_saved_as_either_is_refused(tmp_path):
    model = zoo.build("nested")  # has layers of one name in one branch, which .h5 can't tell apart
    for one in (model, ls.swap(model)):
        with pytest.raises(ExportError, match="name already exists"):
            ls.export(one, tmp_path / "m.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SAVED.values())
@pytest.mark.parametrize("verify", [True, False])
def test_a_constructor_that_brings_batchnorm_back_is_refused(path, verify, tmp_path):
    model = custom(Holder(), (32,))
    converted = ls.swap(model)
    with pytest.raises(ExportError, match=r"Holder creates BatchNormalization(.|\n)*ONNX"):
        ls.export(converted, tmp_path / path, verify=verify)
    assert list(tmp_path.iterdir()) == []
    assert ls.export(converted, tmp_path / "m.onnx").parity.ok


def test_a_constructor_that_makes_groupnorm_is_fine(tmp_path):
    class Block(layers.Layer):
        def __init__(self, norm="batch", **kwargs):
            super().__init__(**kwargs)
            stock = layers.BatchNormalization(), layers.GroupNormalization(2, axis=1, epsilon=0.5)
            self.norm = stock[norm != "batch"]

        def call(self, x, training=None):
            return self.norm(x, training=training)

        def get_config(self):
            return {**super().get_config(), "norm": "group"}

    converted = ls.swap(custom(Block(), (32,)), groups=2, epsilon=0.5)
    assert ls.export(converted, tmp_path / "m.keras").parity.ok


def test_a_second_swap_changes_nothing():
    first = ls.swap(zoo.build("residual"))
    second = ls.swap(first.model)
    assert second.plan.decisions == ()
    assert values(second.model) == values(first.model)


@pytest.mark.parametrize("name", ["residual", "shared_layer", "nested", "time_distributed_model"])
def test_in_place_turns_the_given_model(name):
    model, reference = zoo.build(name), zoo.build(name)
    x = zoo.sample(model)
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)  # leaves a traced function behind
    converted = ls.swap(model, inplace=True)
    assert converted.model is model
    assert converted.source is None
    expected = ls.swap(reference).model(x)
    assert_close(model(x), expected, 1e-6)
    assert_close(model.predict(x, verbose=0), expected, 1e-5)


def test_compile_configuration_and_optimizer_state_are_carried():
    model = zoo.build("residual")
    metrics = ["mae", tf_keras.metrics.MeanSquaredError(name="mine")]
    model.compile(tf_keras.optimizers.Adam(3e-3), "mse", metrics=metrics, loss_weights=[0.5])
    x, y = np.asarray(zoo.sample(model, 8)), np.zeros((8, 5), np.float32)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    before = values(model)
    slots = [np.asarray(v) for v in model.optimizer.variables]

    converted = ls.swap(model).model

    assert converted.optimizer is not model.optimizer
    assert converted.optimizer.get_config() == model.optimizer.get_config()
    assert int(converted.optimizer.iterations) == int(model.optimizer.iterations) == 4
    # `fit` made the old slots, below the optimizer's name: Adam/m/conv2d/kernel:0
    kept = {v.name: np.asarray(v) for v in converted.optimizer.variables}
    for variable in model.optimizer.variables:
        name = variable.name.removeprefix("Adam/")
        if "kernel" in name:
            assert kept[name].any()
            np.testing.assert_array_equal(kept[name], np.asarray(variable))
        elif "gamma" in name:
            assert not kept[name].any()
    assert converted.loss == model.loss
    converted.fit(x, y, batch_size=4, verbose=0)
    assert [m.name for m in converted.metrics] == [m.name for m in model.metrics]
    assert not set(map(id, converted.metrics)) & set(map(id, model.metrics))
    assert values(model) == before
    after = [np.asarray(v) for v in model.optimizer.variables]
    assert all(np.array_equal(a, b) for a, b in zip(after, slots, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "legacy", "scaled"])
def test_other_optimizers_are_carried(optimizer):
    made = {
        "sgd": lambda: tf_keras.optimizers.SGD(0.1, momentum=0.9),
        "legacy": lambda: tf_keras.optimizers.legacy.Adam(0.01),
        "scaled": lambda: tf_keras.mixed_precision.LossScaleOptimizer(tf_keras.optimizers.Adam()),
    }[optimizer]()
    model = zoo.build("rank_2")
    model.compile(made, "mse")
    x, y = np.asarray(zoo.sample(model, 4)), np.zeros((4, 3), np.float32)
    model.fit(x, y, verbose=0)
    converted = ls.swap(model).model
    assert int(converted.optimizer.iterations) == 1
    assert type(converted.optimizer) is type(made)
    converted.fit(x, y, verbose=0)


def test_a_matched_model_trains():
    model = zoo.build("residual")
    model.compile("adam", "mse")
    converted = ls.swap(model).model
    x, y = np.asarray(zoo.sample(model, 4)), np.ones((4, 5), np.float32)
    history = converted.fit(x, y, batch_size=2, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


def test_every_field_reaches_the_layer():
    model = zoo.build("sequential")
    converted = ls.swap(
        model,
        groups=8,
        epsilon=0.25,
        weights="reset",
        gamma_initializer=tf_keras.initializers.Constant(0.5),
        beta_initializer="ones",
        gamma_regularizer=tf_keras.regularizers.L2(0.1),
        beta_regularizer="l1",
        gamma_constraint="non_neg",
        beta_constraint={"class_name": "MaxNorm", "config": {"max_value": 100.0}},
    )
    (layer,) = groupnorms(converted.model)
    assert (layer.groups, layer.epsilon, layer.axis) == (8, 0.25, 3)
    assert isinstance(layer.gamma_regularizer, tf_keras.regularizers.L2)
    assert isinstance(layer.beta_regularizer, tf_keras.regularizers.L1)
    assert isinstance(layer.gamma_constraint, tf_keras.constraints.NonNeg)
    assert isinstance(layer.beta_constraint, tf_keras.constraints.MaxNorm)
    np.testing.assert_array_equal(layer.gamma, 0.5)
    np.testing.assert_array_equal(layer.beta, 1.0)
    assert len(converted.model.losses) == 2
    assert [path.rpartition("/")[2] for path in converted.transfer.fresh] == ["gamma", "beta"]


def test_center_and_scale_off():
    (layer,) = groupnorms(
        ls.swap(zoo.build("sequential"), weights="reset", center=False, scale=False).model
    )
    assert layer.weights == []


def test_include_exclude_and_overrides():
    model = zoo.build("nested")
    x = zoo.sample(model)
    converted = ls.swap(model, exclude="middle/**", overrides={"norm": {"groups": 4}})
    assert [s.site.path for s in converted.plan.swaps] == ["norm"]
    assert len(batchnorms(converted.model)) == 2
    (layer,) = groupnorms(converted.model)
    assert layer.groups == 4
    assert np.isfinite(converted.model(x)).all()


def test_paths_of_nested_layers():
    plan = ls.plan(zoo.build("nested"))
    assert [d.site.path for d in plan.decisions] == [
        "middle/inner/norm",
        "middle/norm",
        "norm",
    ]


def test_calls_are_counted():
    assert [d.site.calls for d in ls.plan(zoo.build("shared_layer")).decisions] == [2]
    assert [d.site.calls for d in ls.plan(zoo.build("nested_used_twice")).decisions] == [2]


def test_indivisible_layers_are_all_listed_and_nothing_is_changed():
    model = zoo.build("depthwise")
    before = values(model)
    with pytest.raises(IndivisibleChannelsError) as caught:
        ls.swap(model, groups=5, inplace=True)
    assert "dw_bn" in str(caught.value)
    assert "1, 2, 3, 4, 6, 8, 12, 24" in str(caught.value)
    assert values(model) == before
    assert len(batchnorms(model)) == 2


def test_a_name_that_keras_doesn_t_know_changes_nothing():
    model = zoo.build("sequential")
    with pytest.raises(PolicyError, match="batch_normalization"):
        ls.swap(model, weights="reset", gamma_initializer="no_such", inplace=True)
    assert len(batchnorms(model)) == 1


class Holder(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bns = [layers.BatchNormalization(), {"deep": layers.BatchNormalization()}]

    def call(self, x, training=None):
        return self.bns[1]["deep"](self.bns[0](x, training=training), training=training)


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.holder = Holder()
        self.head = tf_keras.Sequential([layers.Dense(4), layers.BatchNormalization(name="norm")])

    def call(self, x, training=None):
        return self.head(self.holder(x, training=training), training=training)


class Doubling(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


def refusal_codes(model, **fields):
    plan = ls.plan(model, **fields)
    with pytest.raises(UnsupportedModelError) as caught:
        ls.swap(model, **fields)
    for refusal in plan.refusals:
        assert refusal.site.path in str(caught.value)
    return {refusal.site.path: refusal.code for refusal in plan.refusals}


class Positional(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(x, training)


class Failing(Positional):
    def call(self, x, training=None):
        raise RuntimeError("no graph for this")


class Masking(layers.Layer):
    """Makes a mask inside, where no graph records it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masking, self.norm = layers.Masking(), layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.masking(x), training=training)


def test_batchnorm_in_custom_code_is_swapped():
    model, x = Subclassed(), tf.constant(np.random.default_rng(0).normal(size=(4, 32)), tf.float32)
    model(x)
    zoo.randomize(model)
    before, expected = values(model), truth(model, x)
    converted = ls.swap(model)
    assert [swap.site.path for swap in converted.plan.swaps] == [
        "holder/bns[0]",
        "holder/bns[1][deep]",
        "head/norm",
    ]
    assert values(model) == before
    assert batchnorms(converted.model) == []
    assert_close(converted.model(x), expected)
    assert_close(converted.model.predict(x, verbose=0), expected)


def custom(layer, shape=(4, 8)):
    inputs = layers.Input(shape)
    return tf_keras.Model(inputs, layer(inputs))


def test_calls_that_groupnorm_can_t_take_are_refused():
    assert refusal_codes(custom(Positional(name="own"))) == {"own/norm": "positional-argument"}
    assert refusal_codes(custom(Masking(name="own"))) == {"own/norm": "masked"}


def test_code_that_can_t_be_traced_is_refused():
    model = custom(Positional(name="own"))
    model.layers[1].call = Failing.call.__get__(model.layers[1])
    (refusal,) = ls.plan(model).refusals
    assert refusal.code == "untraceable"
    assert "no graph for this" in refusal.reason


class Hiding(layers.Layer):
    """Gets at a BatchNormalization in a way that no attribute shows."""

    def call(self, x):
        return by_a_helper(x)


def by_a_helper(x):
    return HIDDEN[0](x)


HIDDEN = []


def test_a_batchnorm_that_only_a_helper_function_knows_is_refused():
    HIDDEN[:] = [layers.BatchNormalization(name="hidden")]
    model = custom(Hiding(name="own"))
    assert refusal_codes(model) == {"own/hidden": "unreached"}


def test_code_that_can_t_be_seen_is_warned_of():
    inputs = layers.Input((4, 8))
    model = tf_keras.Model(inputs, layers.BatchNormalization()(Positional(name="own")(inputs)))
    model.layers[1].norm = layers.Identity()
    model.layers[1].call = Failing.call.__get__(model.layers[1])
    (warning,) = ls.plan(model).findings
    assert (warning.code, warning.where) == ("unseen-code", "own")
    assert "no graph for this" in warning.message


def test_a_mask_that_ends_before_batchnorm_is_no_obstacle():
    inner = tf_keras.Sequential(
        [layers.Input((5, 16)), layers.Conv1D(16, 1), layers.BatchNormalization(name="norm")]
    )
    inputs = layers.Input((5,))
    model = tf_keras.Model(inputs, inner(layers.Embedding(7, 16, mask_zero=True)(inputs)))
    zoo.randomize(model)
    x = tf.constant([[1.0, 2, 0, 0, 3]])
    assert_close(ls.swap(model).model(x), truth(model, x))


def test_a_layer_held_by_a_function_needs_inplace():
    norm = layers.BatchNormalization()
    inputs = layers.Input((4, 32))
    norm(inputs)
    model = tf_keras.Model(inputs, layers.Lambda(lambda x: norm(x))(inputs))
    zoo.randomize_layer(norm)
    x = zoo.sample(model)
    expected = truth(model, x)
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        ls.swap(model)
    assert_close(ls.swap(model, inplace=True).model(x), expected)
    assert isinstance(norm, layers.GroupNormalization)


def test_a_batchnorm_in_a_recurrent_cell_is_swapped():
    inputs = layers.Input((5, 4))
    model = tf_keras.Model(inputs, layers.RNN(NormCell())(inputs))
    zoo.randomize(model)
    x = zoo.sample(model)
    expected = truth(model, x)
    assert_close(ls.swap(model).model(x), expected)


class NormCell(layers.Layer):
    state_size = output_size = 16

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(16), layers.BatchNormalization()

    def call(self, x, states, training=None):
        h = self.norm(self.dense(x) + states[0], training=training)
        return h, [h]


def test_what_has_no_counterpart_is_refused():
    inputs = layers.Input((4, 8))
    x = layers.BatchNormalization(name="two_axes", axis=[1, 2])(inputs)
    x = layers.BatchNormalization(name="renorm", renorm=True)(x)
    x = Doubling(name="overridden")(x)
    x = layers.Masking()(x)
    x = layers.BatchNormalization(name="masked")(x)
    assert refusal_codes(tf_keras.Model(inputs, x)) == {
        "two_axes": "multiple-axes",
        "renorm": "renorm",
        "overridden": "overridden-call",
        "masked": "masked",
    }


def test_an_unbuilt_model_is_refused():
    model = tf_keras.Sequential([layers.Dense(4), layers.BatchNormalization(name="norm")])
    assert refusal_codes(model) == {"norm": "unbuilt"}


def test_nonfinite_weights_are_warned_of_and_refused():
    model = zoo.build("residual")
    model.get_layer("b").moving_variance.assign(np.full(32, np.nan))
    plan = ls.plan(model)
    assert "nonfinite-weights" in {finding.code for finding in plan.findings}
    assert refusal_codes(model) == {"b": "nonfinite-weights"}
    assert ls.swap(model, exclude="b").plan.ok


def test_a_model_without_batchnorm():
    model = tf_keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    assert ls.plan(model).decisions == ()
    assert ls.plan(model).ok
    assert values(ls.swap(model).model) == values(model)


def test_a_model_that_can_t_be_copied_names_the_way_out():
    model = zoo.build("rank_2")
    model.generator = (i for i in range(3))
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        ls.swap(model)
    assert batchnorms(ls.swap(model, inplace=True).model) == []


@pytest.mark.parametrize("thing", [3, None, object(), layers.Dense(3)])
def test_what_isn_t_a_model(thing):
    with pytest.raises(UsageError, match="not a tf_keras model"):
        ls.plan(thing)


def test_a_policy_and_fields_exclude_each_other():
    with pytest.raises(PolicyError, match="not both: groups"):
        ls.plan(zoo.build("rank_2"), ls.Policy(), groups=4)


def test_weights_and_names_of_deep_models_are_carried():
    stack = [layers.Input((4,))]
    for _ in range(150):
        stack += [layers.Dense(4), layers.BatchNormalization()]
    model = tf_keras.Sequential(stack)
    converted = ls.swap(model)
    assert len(converted.plan.swaps) == 150
    assert len(converted.transfer.copied) == 300


def test_errors_share_one_base():
    for kind in (PolicyError, UnsupportedModelError, UsageError):
        assert issubclass(kind, LayerswapError)


def under(policy, name, **kwargs):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        return zoo.build(name, **kwargs)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_16_bit_models_get_statistics_in_float32(policy):
    model = under(policy, "sequential")
    norm = model.layers[1]
    norm.moving_mean.assign(np.full(32, 100.0))
    norm.moving_variance.assign(np.full(32, 300.0**2))
    converted = ls.swap(model)
    layer = converted.model.layers[1]
    assert layer.dtype_policy.name == "float32"
    assert converted.model.output.dtype == model.output.dtype
    assert [n.code for n in converted.plan.notes] == ["float32-statistics"]
    x = np.random.default_rng(0).normal(100, 300, (2, 6, 6, 32))
    x = tf.cast(x, norm.compute_dtype)
    exact = np.asarray(tf.cast(x, tf.float64))
    gamma, beta = (np.asarray(v, np.float64) for v in (layer.gamma, layer.beta))
    expected = oracle.group_norm(exact, layer.groups, gamma, beta, layer.epsilon)
    error = np.abs(np.asarray(layer(x), np.float64) - expected).max()
    normal = (exact - 100) / np.sqrt(300.0**2 + norm.epsilon)
    normal = normal * np.asarray(norm.gamma) + np.asarray(norm.beta)
    assert error <= np.abs(np.asarray(tf.cast(norm(x), tf.float64)) - normal).max()
    assert_close(converted.model(zoo.sample(model)), truth(model, zoo.sample(model)), 5e-2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_16_bit_models_whose_operators_want_that_type_are_warned_of_in_numbers(policy):
    model = under(policy, "residual")  # the first goes into tf.nn.relu
    converted = ls.swap(model)
    assert converted.model.get_layer("a").dtype_policy.name == policy
    assert converted.model.get_layer("b").dtype_policy.name == "float32"
    (warning,) = [n for n in converted.plan.notes if n.code == "sixteen-bit"]
    assert warning.where == "a"
    assert re.search(r"its error is [\d.e+-]+, BatchNormalization's was [\d.e+-]+", warning.message)
    x = zoo.sample(model)
    assert converted.model(x).dtype == model(x).dtype
    assert_close(converted.model(x), truth(model, x), 0.1)


def test_losses_of_the_copy_are_its_own():
    model = zoo.build("losses_in_the_graph")
    converted = ls.swap(model).model
    x = zoo.sample(model)
    model(x)
    before = [float(loss) for loss in model.losses]
    converted(x)
    assert len(converted.losses) == len(before) == 4
    assert float(converted.losses[0]) == pytest.approx(before[0])  # the convolution's kernel
    converted.layers[1].kernel.assign(converted.layers[1].kernel * 0.0)
    converted(x)
    assert float(converted.losses[0]) == 0.0
    model(x)
    assert [float(loss) for loss in model.losses] == before


def test_a_model_with_text_inputs(tmp_path):
    inputs = layers.Input((4,), dtype="string")
    lookup = layers.StringLookup(vocabulary=["0", "1", "2"])
    x = layers.BatchNormalization()(layers.Embedding(5, 16)(lookup(inputs)))
    model = tf_keras.Model(inputs, x)
    zoo.randomize(model)
    converted = ls.swap(model)
    words = tf.constant([["0", "2", "x", "1"]])
    assert_close(converted.model(words), truth(model, words))
    assert ls.export(converted, tmp_path / "m.keras").parity.ok


def test_a_training_step_of_one_s_own_survives():
    model = zoo.build("own_train_step")
    model.compile("sgd", "mse")
    converted = ls.swap(model).model
    x = np.asarray(zoo.sample(model, 2))
    assert converted.fit(x, np.zeros((2, 6, 6, 16)), verbose=0).history["own"] == [1.0]


def test_tied_weights_stay_tied():
    converted = ls.swap(zoo.build("tied_weights")).model
    assert converted.layers[1].kernel is converted.layers[3].kernel
