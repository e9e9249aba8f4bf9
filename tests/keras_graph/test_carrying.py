"""What a swap has to carry, or refuse, of models that have a history."""

import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import layerswap as ls
import zoo
from layerswap.errors import ExportError, PolicyError, UnsupportedModelError, UsageError
from zoo.truth import assert_close, truth


def trained(optimizer="adam", name="rank_2", steps=3, **kwargs):
    model = zoo.build(name)
    model.compile(optimizer, "mse", **kwargs)
    x = np.asarray(zoo.sample(model, 4))
    for _ in range(steps):
        model.train_on_batch(x, np.zeros((4, *model.output_shape[1:]), np.float32))
    return model


def refusals(model, **fields):
    return {r.site.path: r.code for r in ls.plan(model, **fields).refusals}


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_model_fitted_compiled_again_and_swapped_twice(eagerly):
    model = trained(run_eagerly=eagerly)
    model.predict(zoo.sample(model), verbose=0)
    model.compile("sgd", "mse", run_eagerly=eagerly)
    x = np.asarray(zoo.sample(model))
    model.fit(x, np.zeros((3, 3)), verbose=0)
    first = ls.swap(model, exclude="**")
    second = ls.swap(first.model)
    assert_close(second.model(x), truth(model, x))
    second.model.fit(x, np.zeros((3, 3)), verbose=0)


def test_the_flags_by_which_a_compiled_model_trains_are_carried():
    model = trained()
    model.trainable = False  # after compiling: fit goes on training, as a GAN's discriminator
    converted = ls.swap(model).model
    before = [np.asarray(v) for v in converted.weights]
    x = np.asarray(zoo.sample(model, 4))
    converted.train_on_batch(x, np.ones((4, 3), np.float32))
    assert any(not np.array_equal(a, b) for a, b in zip(before, converted.weights, strict=True))


def test_names_of_metrics_of_several_outputs_are_kept():
    inputs = layers.Input((8,))
    x = layers.BatchNormalization()(layers.Dense(16)(inputs))
    heads = [layers.Dense(2, name="d")(x), layers.Dense(2, name="e")(x)]
    model = tf_keras.Model(inputs, heads)
    metrics = {"d": tf_keras.metrics.MeanSquaredError(name="m"), "e": "mae"}
    model.compile("sgd", "mse", metrics=metrics)
    data = np.ones((4, 8)), {"d": np.ones((4, 2)), "e": np.ones((4, 2))}
    names = set(model.fit(*data, verbose=0).history)
    assert set(ls.swap(model).model.fit(*data, verbose=0).history) == names


def test_state_that_an_optimizer_holds_beside_its_slots_is_carried():
    model = trained(tf_keras.optimizers.Nadam())
    assert float(model.optimizer._u_product) < 0.9
    assert float(ls.swap(model).model.optimizer._u_product) == float(model.optimizer._u_product)


def test_the_scale_of_a_loss_is_carried():
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(
        tf_keras.optimizers.SGD(), initial_scale=64, dynamic_growth_steps=2
    )
    model = trained(optimizer)
    assert float(optimizer.loss_scale) == 128
    assert float(ls.swap(model).model.optimizer.loss_scale) == 128


def test_what_is_excluded_from_weight_decay_stays_so():
    optimizer = tf_keras.optimizers.AdamW()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    converted = ls.swap(trained(optimizer)).model
    bias = next(v for v in converted.trainable_variables if "bias" in v.name)
    kernel = next(v for v in converted.trainable_variables if "kernel" in v.name)
    assert not converted.optimizer._use_weight_decay(bias)
    assert converted.optimizer._use_weight_decay(kernel)


class Schedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1


def test_an_optimizer_that_can_t_be_made_anew_is_refused_before_anything_changes():
    model = trained(tf_keras.optimizers.Adam(Schedule()))
    for inplace in (False, True):
        with pytest.raises(UnsupportedModelError, match="compile the result"):
            ls.swap(model, inplace=inplace)
    assert len(ls.plan(model).swaps) == 1


def test_a_compile_of_one_s_own_is_refused_before_anything_changes():
    class Own(tf_keras.Model):
        def compile(self, extra, **kwargs):
            super().compile(**kwargs)
            self.extra = extra

    inputs = layers.Input((32,))
    model = Own(inputs, layers.BatchNormalization()(inputs))
    assert ls.swap(model).plan.ok
    model.compile(1, optimizer="sgd", loss="mse")
    with pytest.raises(UnsupportedModelError, match=r"compile\(\) of its own"):
        ls.swap(model, inplace=True)
    assert len(ls.plan(model).swaps) == 1


def test_a_loss_that_captured_the_original_s_variables_needs_inplace():
    model = zoo.build("rank_2")
    dense = model.layers[0]
    model.add_loss(lambda: tf.reduce_sum(dense.kernel**2))
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        ls.swap(model)
    assert ls.swap(model, inplace=True).plan.ok


class Twice:
    """A mixin that comes before Keras's class."""

    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training)


class Mixed(Twice, layers.BatchNormalization):
    pass


class Helped(layers.BatchNormalization):
    def helper(self):
        return 3


def test_a_mixin_that_overrides_call_is_seen_and_a_helper_is_harmless():
    inputs = layers.Input((32,))
    x = Helped(name="helped")(Mixed(name="mixed")(inputs))
    assert refusals(tf_keras.Model(inputs, x)) == {"mixed": "overridden-call"}


def test_training_fixed_to_true_is_refused():
    inputs = layers.Input((32,))
    x = layers.BatchNormalization(name="by_name")(inputs, training=True)
    x = layers.BatchNormalization(name="by_position")(x, True)
    x = layers.BatchNormalization(name="never")(x, training=False)
    model = tf_keras.Model(inputs, x)
    assert refusals(model) == {"by_name": "training-fixed", "by_position": "training-fixed"}


def test_a_mask_on_a_wrapped_batchnorm_is_refused():
    inputs = layers.Input((6, 8))
    x = layers.TimeDistributed(layers.BatchNormalization(), name="td")(layers.Masking()(inputs))
    assert refusals(tf_keras.Model(inputs, x)) == {"td/layer": "masked"}


def test_weights_shared_between_batchnorms_are_refused():
    inputs = layers.Input((32,))
    one, two = layers.BatchNormalization(name="one"), layers.BatchNormalization(name="two")
    model = tf_keras.Model(inputs, two(one(inputs)))
    two._trainable_weights[0] = two.gamma = one.gamma
    assert refusals(model) == {"one": "tied-weights", "two": "tied-weights"}


@pytest.mark.parametrize(
    ("variance", "mean", "code"),
    [(-0.5, 0.0, "negative-variance"), (1.0, 1e30, "overflow")],
)
def test_statistics_out_of_all_proportion_are_refused(variance, mean, code):
    model = zoo.build("rank_2")
    norm = model.layers[1]
    norm.moving_variance.assign(np.full(32, variance))
    norm.moving_mean.assign(np.linspace(-mean, mean, 32))
    assert set(refusals(model).values()) == {code}


def test_a_regularizer_that_is_a_function_stays_one():
    def mine(weight):
        return 0.5 * tf.reduce_sum(tf.abs(weight))

    model = tf_keras.Sequential(
        [layers.Input((32,)), layers.BatchNormalization(gamma_regularizer=mine)]
    )
    converted = ls.swap(model).model
    (loss,) = converted.losses
    assert float(loss) == pytest.approx(0.5 * float(np.abs(converted.layers[0].gamma).sum()))


@pytest.mark.parametrize(
    "fields",
    [
        {"gamma_regularizer": "nope"},
        {"gamma_initializer": "orthogonal", "weights": "reset"},
        {"gamma_regularizer": {"class_name": "OrthogonalRegularizer", "config": {}}},
        {"beta_initializer": {"class_name": "Zeros", "config": {"bad": 1}}, "weights": "reset"},
    ],
)
def test_parts_that_keras_refuses_are_named_before_anything_changes(fields):
    model = zoo.build("rank_2")
    with pytest.raises(PolicyError, match="Check the initializers"):
        ls.swap(model, inplace=True, **fields)
    assert len(ls.plan(model).swaps) == 1


def test_a_graph_or_a_strategy_is_refused():
    model = zoo.build("rank_2")
    with tf.Graph().as_default(), pytest.raises(UsageError, match="inside of a TensorFlow graph"):
        ls.swap(model)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        distributed = zoo.build("rank_2")
        with pytest.raises(UnsupportedModelError, match="MirroredStrategy"):
            ls.swap(model)
    with pytest.raises(UnsupportedModelError, match="MirroredStrategy"):
        ls.swap(distributed)


def test_layers_made_while_another_thread_exports_are_stock(tmp_path):
    from layerswap.keras_graph import tracing

    made = []
    with tracing.groupnorm_call(lambda layer, x: x):
        maker = threading.Thread(target=lambda: made.append(layers.GroupNormalization(2)))
        maker.start()
        maker.join()
    (layer,) = made
    assert not layer._expects_training_arg
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    assert layer(x).shape == (2, 8)


def test_integer_outputs_and_text_inputs(tmp_path):
    inputs = layers.Input((32,))
    x = layers.Lambda(lambda t: tf.argmax(t, -1))(layers.BatchNormalization()(inputs))
    model = tf_keras.Model(inputs, x)
    artifact = ls.export(ls.swap(model), tmp_path / "m.onnx")
    assert artifact.parity.ok
    assert artifact.drift is None
    words = layers.Input((1,), dtype="string")
    hashed = layers.Hashing(8)(words)
    with pytest.raises(ExportError, match="an input is text"):
        ls.export(tf_keras.Model(words, hashed), tmp_path / "text.onnx")


def test_a_model_that_answers_nan_is_named_as_the_cause(tmp_path):
    inputs = layers.Input((32,))
    model = tf_keras.Model(inputs, tf.math.log(-tf.abs(layers.BatchNormalization()(inputs))))
    with pytest.raises(ExportError, match="Keras model itself answers NaN"):
        ls.export(ls.swap(model), tmp_path / "m.onnx")
    artifact = ls.export(ls.swap(model), tmp_path / "m.onnx", verify=False)
    assert artifact.reference is None


def test_the_serving_signature_is_part_of_the_proof(tmp_path, monkeypatch):
    from layerswap.errors import ParityError
    from layerswap.keras_graph import serving

    right = serving.affine_group_norm
    monkeypatch.setattr(serving, "affine_group_norm", lambda layer, x: right(layer, x) + 0.1)
    with pytest.raises(ParityError, match="serving_default does not reproduce"):
        ls.export(ls.swap(zoo.build("residual")), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_as_a_mapping_and_back():
    model = zoo.build("rank_2")
    assert ls.plan(model, {"groups": 4}).swaps[0].groups == 4
    policy = ls.Policy(channels_per_group=np.int64(4), epsilon=np.float32(0.5))
    assert ls.Policy(**policy.to_plain()) == policy
    constant = ls.plan(model, gamma_initializer=tf_keras.initializers.Constant(np.ones(2)))
    assert '"value": [' in constant.to_json().replace("\n", "")
    with pytest.raises(PolicyError, match=r"layerswap\.Policy"):
        ls.plan(model, 3)


def test_one_outlier_leaves_the_other_channels_alive():
    model = zoo.build("rank_2")
    variance = np.ones(32)
    variance[3] = 1e10
    model.layers[1].moving_variance.assign(variance)
    assert "dead-channels" not in {note.code for note in ls.plan(model).notes}
