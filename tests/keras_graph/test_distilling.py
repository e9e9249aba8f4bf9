"""Distillation: γ and β alone are trained, without labels, and nothing gets worse."""

import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import zoo
from layerswap.comparison import probabilities
from layerswap.errors import TransferError
from layerswap.keras_graph import distilling
from layerswap.keras_graph.running import pack_inputs
from layerswap.keras_graph.sampling import inputs_of, read_samples
from zoo.registry import bn, on
from zoo.truth import values

COUNT = 40
STOCK = vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert (vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]) == STOCK
    assert not tf.config.functions_run_eagerly()


def draw(model, count=COUNT, seed=3):
    rng = np.random.default_rng(seed)
    return {
        entry.name: rng.normal(size=(count, *(5 if n is None else n for n in entry.shape[1:])))
        for entry in inputs_of(model)
    }


def answers(model, batches):
    """Outputs in float64, of all batches together."""
    each = []
    for batch in batches:
        tensors = [tf.convert_to_tensor(array) for array in batch.values()]
        outputs = tf.nest.flatten(model(*pack_inputs(model, tensors)))
        each.append([np.asarray(t).astype(np.float64) for t in outputs])
    return [np.concatenate(parts) for parts in zip(*each, strict=True)]


def output_error(before, after):
    """Shares of the variance of each output about the mean of its features, averaged."""
    ratios = []
    for b, a in zip(before, after, strict=True):
        features = tuple(range(b.ndim - 1))
        spread = b - b.mean(axis=features, keepdims=True)
        ratios.append(((b - a) ** 2).sum() / (spread**2).sum())
    return sum(ratios) / len(ratios)


def held_out_error(model, converted, samples):
    held_out = read_samples(model, samples).held_out
    return output_error(answers(model, held_out), answers(converted.model, held_out))


def others(model):
    """All weights but γ and β of GroupNormalization."""
    norms = [m for m in model.submodules if isinstance(m, layers.GroupNormalization)]
    trained = {id(v) for norm in norms for v in (norm.gamma, norm.beta)}
    return [np.asarray(v).tobytes() for v in model.weights if id(v) not in trained]


def affine(model):
    norms = [m for m in model.submodules if isinstance(m, layers.GroupNormalization)]
    return [np.asarray(v).tobytes() for norm in norms for v in (norm.gamma, norm.beta)]


class Siamese:
    """Two models in one, with a shared layer between: what a layer-wise fit leaves to be gained."""

    def __init__(self):
        tf_keras.utils.set_random_seed(1)
        norm = bn(name="shared")
        x = inputs = layers.Input((4, 16), name="x")
        for _ in range(2):
            x = tf.nn.relu(norm(layers.Dense(16)(x)))
        x = layers.Dense(6)(bn(name="stays")(x))
        self.model = tf_keras.Model(inputs, x)
        zoo.randomize(self.model)
        self.samples = draw(self.model)
        self.before = values(self.model)
        self.fields = {"groups": 4, "exclude": "stays", "samples": self.samples}
        self.calibrated = ls.swap(self.model, **self.fields)
        self.stages = []
        self.distilled = ls.swap(
            self.model,
            distill=16,
            progress=lambda *args: self.stages.append(args),
            **self.fields,
        )


@pytest.fixture(scope="module")
def done():
    return Siamese()


def test_the_outputs_come_nearer_on_held_out_samples(done):
    before, after = done.calibrated.calibration, done.distilled.calibration
    assert before.distilled is None
    assert 0 < after.distilled <= 16
    assert after.error < before.error
    error = held_out_error(done.model, done.distilled, done.samples)
    assert after.error == pytest.approx(error, rel=1e-3)
    assert after.error_calibrated == before.error_calibrated
    assert after.error_match == before.error_match
    assert after.layers == before.layers
    held_out = read_samples(done.model, done.samples).held_out
    (truth,), (got,) = (answers(m, held_out) for m in (done.model, done.distilled.model))
    drift = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert after.drift.relative_error == pytest.approx(drift, rel=1e-3)
    assert after.drift_match == before.drift_match


def test_only_gamma_and_beta_change(done):
    """A BatchNormalization that stays keeps its γ, β and statistics, too."""
    assert affine(done.distilled.model) != affine(done.calibrated.model)
    assert others(done.distilled.model) == others(done.calibrated.model)
    assert len(others(done.distilled.model)) == len(done.distilled.model.weights) - 2
    stays = [m.get_layer("stays").get_weights() for m in (done.model, done.distilled.model)]
    for old, new in zip(*stays, strict=True):
        np.testing.assert_array_equal(old, new)
    assert done.distilled.plan == done.calibrated.plan  # nor does epsilon
    assert values(done.model) == done.before


def test_the_same_samples_give_the_same_model_whatever_their_labels(done):
    x = next(iter(done.samples.values()))
    labelled = ((row, "no label at all") for row in x)
    again = ls.swap(done.model, distill=16, **{**done.fields, "samples": labelled})
    assert affine(again.model) == affine(done.distilled.model)
    assert again.calibration == done.distilled.calibration


def test_each_step_is_told(done):
    steps = [args for args in done.stages if args[0] == "distill"]
    assert steps == [("distill", i, 16) for i in range(len(steps))]
    assert done.distilled.calibration.distilled <= len(steps) <= 16


def test_predictions_are_made_with_the_distilled_values(done):
    x = next(iter(done.samples.values())).astype("float32")
    predicted = done.distilled.model.predict(x, verbose=0)
    np.testing.assert_allclose(predicted, np.asarray(done.distilled.model(x)), rtol=1e-4, atol=1e-5)
    assert np.abs(predicted - np.asarray(done.calibrated.model(x))).max() > 1e-3


# Never worse.


@pytest.mark.parametrize("rate", [1e4, float("nan")])
def test_steps_that_lead_nowhere_are_taken_back_bit_for_bit(done, monkeypatch, rate):
    monkeypatch.setattr(distilling, "LEARNING_RATE", rate)
    converted = ls.swap(done.model, distill=5, **done.fields)
    assert converted.calibration.distilled == 0
    assert affine(converted.model) == affine(done.calibrated.model)
    expected = done.calibrated.calibration
    assert converted.calibration.error == expected.error
    assert converted.calibration.drift == expected.drift


def test_it_ends_when_nothing_is_gained_any_more(done, monkeypatch):
    monkeypatch.setattr(distilling, "LEARNING_RATE", 1e4)
    monkeypatch.setattr(distilling, "LOOKS", 1000)
    steps = []
    ls.swap(done.model, distill=1000, progress=lambda *args: steps.append(args), **done.fields)
    taken = [args for args in steps if args[0] == "distill"]
    assert len(taken) == distilling.PATIENCE + 1


@pytest.mark.parametrize("steps", [1, 7])
def test_any_number_of_steps_is_no_worse_than_none(done, steps):
    converted = ls.swap(done.model, distill=steps, **done.fields)
    assert converted.calibration.distilled <= steps
    error = held_out_error(done.model, converted, done.samples)
    assert error <= done.calibrated.calibration.error * (1 + 1e-6)
    assert converted.calibration.error == pytest.approx(error, rel=1e-3)


def test_samples_to_fit_with_that_mislead_make_nothing_worse(monkeypatch):
    """What is held out is of another kind than what is trained on."""
    model = zoo.build("only_layer")
    rng = np.random.default_rng(0)
    (entry,) = inputs_of(model)
    count = 32
    samples = rng.normal(size=(count, 8, 16))
    held_out = read_samples(model, np.arange(count)[:, None, None] * np.ones((1, 8, 16))).held_out
    chosen = np.concatenate([batch[entry.name][:, 0, 0] for batch in held_out]).astype(int)
    samples[chosen] = 30.0 * np.abs(samples[chosen]) + 50.0
    before = ls.swap(model, samples=samples)
    after = ls.swap(model, samples=samples, distill=30)
    assert after.calibration.error <= before.calibration.error
    assert held_out_error(model, after, samples) <= before.calibration.error * (1 + 1e-4)


def test_a_model_that_answers_huge_values_keeps_its_gamma_and_beta():
    """Squared they are infinite in float32, and so is every gradient."""
    model = on((4, 16), [bn(name="norm"), layers.Lambda(lambda x: x * 1e25)])
    zoo.randomize(model)
    samples = draw(model)
    before = ls.swap(model, samples=samples)
    after = ls.swap(model, samples=samples, distill=8)
    assert after.calibration.error <= before.calibration.error
    for name in ("gamma", "beta"):
        old, new = (getattr(c.model.get_layer("norm"), name).numpy() for c in (before, after))
        np.testing.assert_allclose(new, old, rtol=1e-5)


def test_a_model_that_answers_infinities_is_no_reason_to_fail():
    model = on((4, 16), [bn(name="norm"), layers.Lambda(lambda x: tf.exp(x * 1e4))])
    zoo.randomize(model)
    after = ls.swap(model, samples=draw(model), distill=3)
    assert after.calibration.distilled == 0
    for array in after.model.get_weights():
        assert np.isfinite(array).all()


# What models there are.


def test_a_softmax_is_distilled_on_what_it_was_computed_from():
    """The answers are sure: squared differences of probabilities would show next to nothing."""
    steps = [layers.Dense(16), bn(name="norm"), layers.Flatten(), layers.Dense(4), layers.Softmax()]
    model = on((4, 16), steps)
    zoo.randomize(model)
    model.layers[-2].kernel.assign(model.layers[-2].kernel * 4.0)
    samples = draw(model)
    before, after = (ls.swap(model, samples=samples, distill=n, groups=4) for n in (0, 30))
    held_out = read_samples(model, samples).held_out
    truth = answers(model, held_out)
    assert after.calibration.error <= before.calibration.error
    for converted in (before, after):
        error = output_error(
            [logits(p) for p in truth], [logits(p) for p in answers(converted.model, held_out)]
        )
        assert converted.calibration.error == pytest.approx(error, rel=2e-2)


def logits(probabilities):
    logs = np.log(np.maximum(probabilities, 1e-6))
    return logs - logs.mean(-1, keepdims=True)


def softmax(rng, *shape):
    exp = np.exp(rng.normal(size=shape))
    return (exp / exp.sum(-1, keepdims=True)).astype("float32")


def test_probabilities_are_told_from_other_outputs():
    rng = np.random.default_rng(0)
    outputs = {
        "softmax": softmax(rng, 5, 4),
        "map": softmax(rng, 5, 3, 3, 2),
        "half": softmax(rng, 5, 4).astype("float16"),
        "scores": rng.normal(size=(5, 4)).astype("float32"),
        "sigmoid": rng.uniform(size=(5, 4)).astype("float32"),
        "one": np.ones((5, 1), "float32"),
        "vector": np.ones(5, "float32"),
        "classes": np.eye(4, dtype="int32")[[0, 1, 2, 3, 0]],
        "negative": np.tile(np.float32([2.0, -1.0]), (5, 1)),
        "nothing": np.full((5, 4), np.nan, "float32"),
        "words": np.full((5, 2), b"word", dtype=object),
    }
    assert probabilities([outputs]) <= {"softmax", "map", "half"}
    assert probabilities([outputs]) >= {"softmax", "map"}
    # One batch in which they aren't is enough.
    other = {**outputs, "softmax": outputs["softmax"] * 2}
    assert "softmax" not in probabilities([outputs, other])
    assert "map" in probabilities([outputs, other])


def test_integer_inputs_are_taken_as_they_are():
    """An Embedding can't be asked for half of one word and half of another."""
    inputs = layers.Input((6,), dtype="int32", name="words")
    x = layers.Dense(16)(bn(name="norm")(layers.Embedding(9, 16)(inputs)))
    model = tf_keras.Model(inputs, x)
    zoo.randomize(model)
    table = np.random.default_rng(1).normal(size=(9, 16))
    model.layers[1].embeddings.assign(table)
    samples = np.random.default_rng(0).integers(0, 9, (COUNT, 6))
    before, after = (ls.swap(model, samples=samples, distill=n, groups=4) for n in (0, 10))
    assert after.calibration.error <= before.calibration.error
    assert others(after.model) == others(before.model)


@pytest.mark.parametrize("dtype", ["float32", "int32", "string"])
def test_inputs_of_several_kinds_are_drawn_together(dtype):
    """Which sample goes with which shows in the batches that the model is called with."""
    first = layers.Input((3,), name="first")
    second = layers.Input((1,), dtype=dtype, name="second")
    number = tf.strings.to_number(second) if dtype == "string" else tf.cast(second, "float32")
    seen = []

    class Watching(layers.Layer):
        def call(self, inputs):
            a, b = inputs
            tf.py_function(lambda x, y: seen.append((x.numpy(), y.numpy())), [a, b], [])
            return a + b

    x = Watching()([first, number])
    model = tf_keras.Model([first, second], bn(name="norm")(layers.Dense(16)(x)))
    zoo.randomize(model)
    column = np.arange(COUNT)[:, None]
    samples = {
        "first": np.repeat(column, 3, axis=1).astype("float32"),
        "second": column.astype(str) if dtype == "string" else column.astype(dtype),
    }
    seen.clear()
    ls.swap(model, samples=samples, distill=3, self_check=False)
    assert len(seen) > 6
    for a, b in seen:
        np.testing.assert_allclose(a, np.repeat(b, 3, axis=1), rtol=1e-5, atol=1e-4)
    drawn = np.concatenate([b[:, 0] for _, b in seen])
    assert (np.abs(drawn - np.round(drawn)) > 1e-3).any() == (dtype == "float32")


@pytest.mark.parametrize("name", ["mixed_float16", "double_precision", "graph_function"])
def test_models_of_many_kinds_are_distilled(name):
    model = zoo.build(name)
    samples = draw(model, 24)
    before, after = (ls.swap(model, samples=samples, distill=n) for n in (0, 3))
    assert after.calibration.error <= before.calibration.error
    assert after.calibration.error == pytest.approx(
        held_out_error(model, after, samples), rel=5e-2 if name == "mixed_float16" else 1e-3
    )
    assert others(after.model) == others(before.model)


def test_batches_of_a_fixed_size_are_kept_to():
    given = layers.Input(batch_shape=(4, 6, 16), name="x")
    model = tf_keras.Model(given, tf.reshape(bn(name="norm")(layers.Dense(16)(given)), (4, 96)))
    zoo.randomize(model)
    converted = ls.swap(model, samples=draw(model, 32), distill=3)
    assert converted.calibration.error <= converted.calibration.error_match


def test_samples_of_different_shapes_are_taken_batch_by_batch():
    model = zoo.build("dynamic_shape")
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(4, 5 + i % 2, 5, 3)) for i in range(8)]
    calibration = ls.swap(model, samples=iter(samples), distill=4).calibration
    assert calibration.error <= min(calibration.error_match, calibration.error_calibrated)
    assert (calibration.samples, calibration.held_out) == (24, 8)


def test_constraints_hold_after_every_step(monkeypatch):
    monkeypatch.setattr(distilling, "LEARNING_RATE", 2.0)  # enough to go below zero
    norm = bn(name="norm", gamma_constraint="non_neg")
    model = on((4, 16), [layers.Dense(16), norm, layers.Dense(4)])
    zoo.randomize(model)
    norm.gamma.assign(np.linspace(0.0, 2.0, 16))
    lowest = []

    class Watch:
        def __call__(self, name, *_):
            if name == "distill":
                lowest.append(float(np.min(target[0].gamma)))

    target = []
    stock = distilling.distill

    def watched(work, *args):
        target.append(work.pairs["norm"].after)
        return stock(work, *args)

    monkeypatch.setattr(distilling, "distill", watched)
    after = ls.swap(model, samples=draw(model), distill=10, groups=4, progress=Watch())
    assert len(lowest) > 3
    assert min(lowest) >= 0.0
    assert float(np.min(after.model.get_layer("norm").gamma)) >= 0.0


def test_a_frozen_layer_is_distilled_and_stays_frozen():
    model = zoo.build("only_layer")
    model.get_layer("norm").trainable = False
    converted = ls.swap(model, samples=draw(model), distill=4, groups=4)
    assert converted.calibration.error <= converted.calibration.error_match
    assert not converted.model.get_layer("norm").trainable
    assert converted.model.trainable_weights == []


class Eager(layers.Layer):
    """Has no graph when it is told so."""

    broken = False

    def call(self, x):
        if self.broken and not tf.executing_eagerly():
            raise NotImplementedError("only line by line")
        return x


def test_a_model_that_can_not_be_differentiated_is_told():
    layer = Eager()
    model = on((4, 16), [bn(name="norm"), layer])
    zoo.randomize(model)

    def progress(stage, *_):
        Eager.broken = stage == "distill"

    try:
        with pytest.raises(TransferError, match="can't be distilled: only line by line") as caught:
            ls.swap(model, samples=draw(model), distill=3, progress=progress)
    finally:
        Eager.broken = False
    assert "distill at 0" in caught.value.hint


def test_a_model_without_an_output_that_can_be_compared_is_told():
    inputs = layers.Input((4, 16))
    model = tf_keras.Model(inputs, tf.argmax(bn(name="norm")(inputs), -1))
    zoo.randomize(model)
    with pytest.raises(TransferError, match="can't be distilled"):
        ls.swap(model, samples=draw(model), distill=3)


def test_calibrate_distills_too(done):
    again = ls.calibrate(done.calibrated, done.samples, distill=16)
    assert affine(again.model) == affine(done.distilled.model)
    assert again.calibration == done.distilled.calibration
