"""Calibration on samples against NumPy: least squares on activations that are recorded in the test.

What a layer is given and puts out is noted by a `call` of its own, without the package's lockstep;
both models run on all samples in one batch.
"""

import contextlib
import math
import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import oracle
import zoo
from layerswap.errors import LayerswapError, TransferError, UnsupportedModelError, UsageError
from layerswap.keras_graph import calibrating
from layerswap.keras_graph.running import pack_inputs
from layerswap.keras_graph.sampling import inputs_of, read_samples
from layerswap.keras_graph.walk import find_layers
from zoo.axes import under
from zoo.registry import bn, on
from zoo.truth import batchnorms, values

STOCK = vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]
COUNT = 40
EPSILON = 1e-2


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No thread, no changed class, no setting of TensorFlow's."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert (vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]) == STOCK
    assert not tf.config.functions_run_eagerly()


def draw(model, count=COUNT, seed=3):
    """Samples by name, float32, with a mean and a scale of their own."""
    rng = np.random.default_rng(seed)
    return {
        entry.name: rng.normal(0.3, 1.0, (count, *(5 if n is None else n for n in entry.shape[1:])))
        * rng.uniform(0.5, 2.0, (count, *[1] * (len(entry.shape) - 1)))
        for entry in inputs_of(model)
    }


def call(model, batch):
    tensors = [tf.convert_to_tensor(array) for array in batch.values()]
    return [np.asarray(t) for t in tf.nest.flatten(model(*pack_inputs(model, tensors)))]


def found(model):
    return {each.path: each.layer for each in find_layers(model)}


@contextlib.contextmanager
def recording(model, paths):
    """Within the block layers note their (input, output) in each call, in float64."""
    calls = {path: [] for path in paths}
    marked = [(path, layer) for path, layer in found(model).items() if path in calls]

    def note(path, stock):
        def call(inputs, *args, **kwargs):
            output = stock(inputs, *args, **kwargs)
            calls[path].append(tuple(np.asarray(t).astype(np.float64) for t in (inputs, output)))
            return output

        return call

    tf.config.run_functions_eagerly(True)
    for path, layer in marked:
        vars(layer)["call"] = note(path, layer.call)
    try:
        yield calls
    finally:
        tf.config.run_functions_eagerly(False)
        for _, layer in marked:
            del vars(layer)["call"]


def record(model, paths, batches):
    """(input, output) of each layer, a list of calls; several batches are joined."""
    each = []
    for batch in batches:
        with recording(model, paths) as calls:
            call(model, batch)
        each.append(calls)
    return {
        path: [
            tuple(np.concatenate(parts) for parts in zip(*call_parts, strict=True))
            for call_parts in zip(*(calls[path] for calls in each), strict=True)
        ]
        for path in paths
    }


def joined(batches, model):
    """All in one batch, unless the model fixes its size."""
    if inputs_of(model)[0].shape[0] is not None:
        return batches
    return [{name: np.concatenate([b[name] for b in batches]) for name in batches[0]}]


def flat(array, axis):
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def pairs(inputs_of_gn, outputs_of_bn, groups, epsilon, axis):
    """z and t of all calls, of shape (values, C)."""
    z = [oracle.group_norm(x, groups, None, None, epsilon, axis=axis) for x, _ in inputs_of_gn]
    return (
        np.concatenate([flat(each, axis) for each in z]),
        np.concatenate([flat(t, axis) for _, t in outputs_of_bn]),
    )


def regression(z, t):
    gamma, beta = np.empty(z.shape[1]), np.empty(z.shape[1])
    for c in range(z.shape[1]):
        rows = np.stack([z[:, c], np.ones(len(z))], axis=1)
        (gamma[c], beta[c]), *_ = np.linalg.lstsq(rows, t[:, c], rcond=None)
    return gamma, beta


def share(z, t, gamma, beta):
    """Σ(GN − BN)² by the variance of BN."""
    return ((gamma * z + beta - t) ** 2).mean(0).sum() / t.var(0).sum()


def assert_fitted(model, converted, samples, free, seen_by=None, tolerance=2e-4):
    """Every layer's γ, β and errors are those of NumPy's regression.

    Args:
        free: the data-free swap.
        seen_by: of which model the inputs are; the converted one unless a layer is shared.
    """
    given = read_samples(model, samples)
    swaps = {swap.site.path: swap for swap in converted.plan.swaps}
    fits = converted.calibration.layers
    paths = [fit.path for fit in fits]
    parts = [joined(batches, model) for batches in (given.fit, given.held_out)]
    before = [record(model, paths, part) for part in parts]
    after = [record(seen_by or converted.model, paths, part) for part in parts]
    for fit in fits:
        layer, swap = found(converted.model)[fit.path], swaps[fit.path]
        assert fit.fit == "calibrated"
        assert fit.epsilon == layer.epsilon == swap.config["epsilon"]
        assert fit.groups == layer.groups
        facts = (fit.groups, fit.epsilon, swap.config["axis"])
        z, t = pairs(after[0][fit.path], before[0][fit.path], *facts)
        u, s = pairs(after[1][fit.path], before[1][fit.path], *facts)
        gamma, beta = regression(z, t)
        got = [np.asarray(v).astype(np.float64) for v in (layer.gamma, layer.beta)]
        # The package adds a millionth to the variance of z.
        allowed = (tolerance + 1.1e-6 / z.var(0)) * (np.abs(gamma).max() + np.abs(beta).max())
        assert (np.abs(got[0] - gamma) <= allowed).all()
        assert (np.abs(got[1] - beta) <= allowed).all()
        assert fit.error == pytest.approx(share(u, s, gamma, beta), rel=20 * tolerance, abs=1e-7)
        old = found(free.model)[fit.path]
        if old.epsilon == fit.epsilon:
            expected = share(u, s, np.asarray(old.gamma), np.asarray(old.beta))
            assert fit.error_match == pytest.approx(expected, rel=20 * tolerance)
        assert fit.error <= fit.error_match


def output_error(before, after):
    """Shares of the variance of each output about the mean of its features, averaged."""
    ratios = []
    for b, a in zip(before, after, strict=True):
        features = tuple(range(b.ndim - 1))
        spread = b - b.mean(axis=features, keepdims=True)
        ratios.append(((b - a) ** 2).sum() / (spread**2).sum())
    return sum(ratios) / len(ratios)


def answers(model, batches):
    """Outputs in float64, of all batches together."""
    each = [call(model, batch) for batch in batches]
    return [np.concatenate(parts).astype(np.float64) for parts in zip(*each, strict=True)]


def assert_errors(model, converted, free, samples, rel=1e-3):
    """The errors of the outputs are those of the definition."""
    held_out = read_samples(model, samples).held_out
    truth = answers(model, held_out)
    calibration = converted.calibration
    assert calibration.error_match == pytest.approx(
        output_error(truth, answers(free.model, held_out)), rel=rel
    )
    assert calibration.error == pytest.approx(
        output_error(truth, answers(converted.model, held_out)), rel=rel
    )
    assert calibration.error == min(calibration.error_calibrated, calibration.error_match)
    assert calibration.kept == (calibration.error_calibrated < calibration.error_match)


# A chain of three layers, with statistics that its data nearly has.


def chain():
    tf_keras.utils.set_random_seed(5)
    x = inputs = layers.Input((6, 6, 3), name="image")
    for name in "abc":
        x = layers.Conv2D(8, 3, padding="same", name=f"conv_{name}")(x)
        x = tf.nn.relu(bn(name=name)(x))
    return tf_keras.Model(inputs, layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x)))


def converge(model, paths, batch, rng):
    """Gives the layers all but the statistics of a batch, one after the other, random γ and β."""
    for path in paths:
        norm = found(model)[path]
        norm.gamma.assign(rng.normal(1.0, 0.3, norm.gamma.shape))
        norm.beta.assign(rng.normal(0.0, 0.3, norm.beta.shape))
        x = flat(record(model, [path], [batch])[path][0][0], -1)
        norm.moving_mean.assign(x.mean(0) + rng.normal(0.0, 0.3, x.shape[1]) * x.std(0))
        norm.moving_variance.assign(x.var(0) * rng.uniform(0.6, 1.6, x.shape[1]))


class Chain:
    """The chain, its samples, and the swaps of it that several tests look at."""

    def __init__(self):
        self.model = chain()
        self.samples = np.random.default_rng(0).normal(0.3, 1.0, (48, 6, 6, 3))
        batch = {"image": self.samples.astype("float32")}
        converge(self.model, "abc", batch, np.random.default_rng(1))
        self.model.predict(batch["image"], verbose=0)
        self.before = values(self.model), call(self.model, batch)
        self.batch = batch
        self.fields = {"groups": 4, "epsilon": EPSILON}
        self.free = ls.swap(self.model, **self.fields)
        self.stages = []
        self.converted = ls.swap(
            self.model,
            samples=self.samples,
            progress=lambda *args: self.stages.append(args),
            **self.fields,
        )


@pytest.fixture(scope="module")
def done():
    return Chain()


def test_each_layer_of_a_chain_is_regressed_on_what_the_layers_before_it_make(done):
    assert done.converted.calibration.kept
    assert [fit.path for fit in done.converted.calibration.layers] == ["a", "b", "c"]
    assert_fitted(done.model, done.converted, done.samples, done.free)
    # The data-free inputs of the later layers would have given something else.
    given = joined(read_samples(done.model, done.samples).fit, done.model)
    inputs, outputs = (record(m, "c", given)["c"] for m in (done.free.model, done.model))
    gamma, _ = regression(*pairs(inputs, outputs, 4, EPSILON, -1))
    layer = found(done.converted.model)["c"]
    assert np.abs(np.asarray(layer.gamma) - gamma).max() > 20 * 2e-4 * np.abs(gamma).max()


def test_the_errors_are_those_of_the_outputs_on_held_out_samples(done):
    assert_errors(done.model, done.converted, done.free, done.samples)
    calibration = done.converted.calibration
    assert (calibration.samples, calibration.held_out) == (36, 12)
    assert calibration.distilled is None
    held_out = read_samples(done.model, done.samples).held_out
    (truth,), (got,) = (answers(m, held_out) for m in (done.model, done.converted.model))
    assert calibration.drift.samples == 12
    distance = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert calibration.drift.relative_error == pytest.approx(distance, rel=1e-3)
    agreement = (got.argmax(1) == truth.argmax(1)).mean()
    assert calibration.drift.argmax_agreement == pytest.approx(agreement)


def test_what_a_layer_says_of_its_statistics_and_spread_is_that_of_its_input(done):
    given = joined(read_samples(done.model, done.samples).fit, done.model)
    before = record(done.model, "abc", given)
    after = record(done.converted.model, "abc", given)
    for fit in done.converted.calibration.layers:
        norm, x = found(done.model)[fit.path], before[fit.path][0][0]
        mean, variance = (
            np.asarray(v, np.float64) for v in (norm.moving_mean, norm.moving_variance)
        )
        normal = (flat(x, -1) - mean) / np.sqrt(variance)
        rms = np.sqrt((normal.mean(0) ** 2).mean())
        assert fit.source_mean == pytest.approx(rms, rel=1e-3, abs=1e-5)
        assert fit.source_variance == pytest.approx(np.median(normal.var(0)), rel=1e-3)
        groups = after[fit.path][0][0].reshape(len(x), -1, 4, 2)
        spread = groups.var(axis=(1, 3))
        assert fit.spread == pytest.approx((spread.std(0) / spread.mean(0)).mean(), rel=1e-3)
    assert [f.code for f in done.converted.findings] == ["few-samples"]


def test_the_source_is_untouched_bit_for_bit(done):
    weights, outputs = done.before
    assert done.converted.source is done.model
    assert values(done.model) == weights
    np.testing.assert_array_equal(call(done.model, done.batch), outputs)
    prediction = done.model.predict(done.batch["image"], verbose=0)
    np.testing.assert_allclose(prediction, outputs[0], rtol=1e-5, atol=1e-6)


def test_all_other_weights_are_the_sources_bits(done):
    for name in ("conv_a", "conv_b", "conv_c", "head"):
        pair = [m.get_layer(name).get_weights() for m in (done.model, done.converted.model)]
        for old, new in zip(*pair, strict=True):
            np.testing.assert_array_equal(old, new)


def test_predictions_are_made_with_the_new_values(done):
    """The source had predicted before: nothing of its traced functions is left."""
    model, x = done.converted.model, done.batch["image"]
    predicted = model.predict(x, verbose=0)
    np.testing.assert_allclose(predicted, call(model, done.batch)[0], rtol=1e-5, atol=1e-6)
    assert np.abs(predicted - call(done.free.model, done.batch)[0]).max() > 1e-2


def test_the_result_is_saved_and_read_again(done, tmp_path):
    done.converted.model.save(tmp_path / "model.keras")
    again = tf_keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(call(again, done.batch), call(done.converted.model, done.batch))


def test_calibrating_what_was_swapped_already_is_the_same_and_leaves_it_alone(done):
    before = values(done.free.model)
    again = ls.calibrate(done.free, done.samples)
    assert values(again.model) == values(done.converted.model)
    assert again.calibration == done.converted.calibration
    assert again.plan == done.converted.plan
    assert again.source is done.model
    assert values(done.free.model) == before
    # And once more, from the calibrated one.
    once_more = ls.calibrate(again, done.samples)
    assert values(once_more.model) == values(again.model)


def test_progress_names_each_stage_with_how_much_is_done(done):
    names = list(dict.fromkeys(args[0] for args in done.stages))
    assert names == ["plan", "read samples", "swap", "calibrate"]
    counts = [args[1:] for args in done.stages if args[0] == "calibrate"]
    assert counts == [(0, 3), (1, 3), (2, 3)]


def test_what_stood_in_the_way_of_the_samples_does_not_matter(done):
    """A dict, a stream with labels in batches: the same samples give the same result."""
    wanted = values(done.converted.model)
    x = done.samples
    stream = ((x[i : i + 7], np.full(7, np.nan)) for i in range(0, 48, 7))
    for samples in ({"image": x}, stream):
        assert values(ls.swap(done.model, samples=samples, **done.fields).model) == wanted


# An epsilon that is left to the fit.


def test_an_open_epsilon_is_one_of_several_and_the_plan_says_which():
    model = zoo.build("graph_function")
    samples = draw(model)
    model.predict(next(iter(samples.values())), verbose=0)
    free = ls.swap(model, groups=4, adaptive_k=1.0)
    converted = ls.swap(model, groups=4, adaptive_k=1.0, samples=samples)
    (old,), (new,) = free.plan.swaps, converted.plan.swaps
    (fit,) = converted.calibration.layers
    layer = found(converted.model)[fit.path]
    assert new.config == {**old.config, "epsilon": layer.epsilon}
    assert layer.epsilon == fit.epsilon != old.config["epsilon"]
    ratio = fit.epsilon / old.config["epsilon"]
    assert any(math.isclose(ratio, factor) for factor in (0.1, 0.3, 3, 10, 30, 100))
    assert_fitted(model, converted, samples, free)
    # No trace with another epsilon is left in the model's own graph function.
    x = next(iter(samples.values())).astype("float32")
    gamma, beta = np.asarray(layer.gamma), np.asarray(layer.beta)
    truth = oracle.group_norm(x, 4, gamma, beta, fit.epsilon)
    for got in (converted.model(x), converted.model.predict(x, verbose=0)):
        np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-4)


# Wherever the layers live.


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("rank_2", 2e-4),
        ("rank_3", 2e-4),
        ("rank_5", 2e-4),
        ("channels_first", 2e-4),
        ("mixed_float16", 2e-2),
        ("without_scale_or_center", 2e-4),
        ("nested", 2e-4),
        ("time_distributed", 2e-4),
        ("subclass", 2e-4),
        ("graph_function_as_attribute", 2e-4),
        ("called_straight", 2e-4),
        ("several_arguments", 2e-4),
        ("cell_derived_from_stock", 2e-4),
        ("fixed_batch", 2e-4),
    ],
)
def test_layers_are_fitted_wherever_they_live(name, tolerance):
    model = zoo.build(name)
    samples = draw(model)
    fields = {"epsilon": EPSILON, "on_indivisible": "nearest", "groups": 4}
    weights = values(model)
    free = ls.swap(model, **fields)
    converted = ls.swap(model, samples=samples, **fields)
    assert converted.calibration.kept
    assert len(converted.calibration.layers) == len(batchnorms(model))
    assert_fitted(model, converted, samples, free, tolerance=tolerance)
    assert_errors(model, converted, free, samples, rel=50 * tolerance)
    assert values(model) == weights


def test_two_inputs_and_two_outputs_by_name():
    model = zoo.build("several_inputs_and_outputs")
    samples = draw(model)
    fields = {"epsilon": EPSILON, "groups": 4}
    free = ls.swap(model, **fields)
    converted = ls.swap(model, samples=dict(reversed(samples.items())), **fields)
    assert_fitted(model, converted, samples, free)
    assert_errors(model, converted, free, samples)  # the mean of both outputs


@pytest.mark.parametrize("name", ["shared_layer", "wrapped_cell"])
def test_calls_of_a_shared_layer_are_pooled_as_the_data_free_model_makes_them(name):
    model = zoo.build(name)
    samples = draw(model)
    fields = {"epsilon": EPSILON, "groups": 4}
    free = ls.swap(model, **fields)
    stages = []
    converted = ls.swap(
        model, samples=samples, progress=lambda stage, *_: stages.append(stage), **fields
    )
    assert "calibrate shared layers" in stages
    assert converted.calibration.kept
    assert_fitted(model, converted, samples, free, seen_by=free.model)


def test_a_shared_layer_beside_others_is_settled_before_them():
    norm = bn(name="shared")
    inputs = layers.Input((4, 16), name="x")
    x = norm(layers.Dense(16)(norm(inputs)))
    model = tf_keras.Model(inputs, layers.Dense(3)(bn(name="later")(layers.Dense(16)(x))))
    zoo.randomize(model)
    samples = draw(model)
    fields = {"epsilon": EPSILON, "groups": 4}
    converted = ls.swap(model, samples=samples, **fields)
    assert converted.calibration.kept
    given = joined(read_samples(model, samples).fit, model)
    # The shared layer sees what the data-free model makes, the other what is there in the end.
    free = ls.swap(model, **fields)
    for path, seen_by in (("shared", free.model), ("later", converted.model)):
        z, t = pairs(
            record(seen_by, [path], given)[path], record(model, [path], given)[path], 4, EPSILON, -1
        )
        gamma, beta = regression(z, t)
        layer = found(converted.model)[path]
        np.testing.assert_allclose(layer.gamma, gamma, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(layer.beta, beta, rtol=1e-3, atol=1e-3)


# What isn't fitted.


def test_excluded_layers_stay_and_layers_with_other_weights_are_left_alone(done):
    fields = {
        "groups": 4,
        "epsilon": EPSILON,
        "exclude": "b",
        "overrides": {"a": {"weights": "copy"}},
    }
    free = ls.swap(done.model, **fields)
    converted = ls.swap(done.model, samples=done.samples, **fields)
    assert [fit.path for fit in converted.calibration.layers] == ["c"]
    for name, kind in (("a", layers.GroupNormalization), ("b", layers.BatchNormalization)):
        old, new = (each.model.get_layer(name) for each in (free, converted))
        assert type(new) is kind
        for one, other in zip(old.get_weights(), new.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        assert new.epsilon == old.epsilon
    assert converted.calibration.kept
    assert_fitted(done.model, converted, done.samples, free)


def test_layers_that_are_reset_are_left_alone(done):
    fields = {"groups": 4, "overrides": {name: {"weights": "reset"} for name in "ab"}}
    converted = ls.swap(done.model, samples=done.samples, **fields)
    assert [fit.path for fit in converted.calibration.layers] == ["c"]
    for name in "ab":
        np.testing.assert_array_equal(converted.model.get_layer(name).gamma, np.ones(8))
        np.testing.assert_array_equal(converted.model.get_layer(name).beta, np.zeros(8))


@pytest.mark.parametrize("fields", [{"weights": "reset"}, {"weights": "copy"}, {"exclude": "**"}])
def test_samples_without_a_layer_to_fit_are_refused(done, fields):
    with pytest.raises(UsageError, match="nothing to fit"):
        ls.swap(done.model, samples=done.samples, **fields)


def held_by_a_constraint():
    """One channel moves less than the group's mean, and so against it once that is taken away."""
    share_of = np.array([1.0, 1.0, 1.0, 0.2])
    inputs = layers.Input((4,), name="x")
    norm = layers.BatchNormalization(name="norm", epsilon=1e-3, gamma_constraint="non_neg")
    model = tf_keras.Model(inputs, norm(inputs))
    norm.moving_variance.assign(share_of**2)
    return model, np.random.default_rng(0).normal(size=(COUNT, 1)) * share_of


def test_a_fit_that_would_violate_a_constraint_is_not_taken_and_noted():
    model, samples = held_by_a_constraint()
    free, converted = ls.swap(model, groups=1), ls.swap(model, groups=1, samples=samples)
    (fit,) = converted.calibration.layers
    assert fit.fit == "match"
    assert fit.error == fit.error_match
    assert "gamma_constraint NonNeg" in fit.note
    assert fit.epsilon == free.plan.swaps[0].config["epsilon"]
    assert converted.plan.swaps == free.plan.swaps
    assert values(converted.model) == values(free.model)
    refused = [f for f in converted.findings if f.code == "fit-refused"]
    assert [(f.where, f.message) for f in refused] == [("norm", fit.note)]
    # Without the constraint it would have been taken.
    unbound = ls.swap(model, groups=1, samples=samples, gamma_constraint=None)
    assert unbound.calibration.layers[0].fit == "calibrated"
    assert float(np.min(unbound.model.get_layer("norm").gamma)) < 0


@pytest.fixture(scope="module")
def reverted():
    """A cell whose steps, fitted together, go off further than they did."""
    model = zoo.build("cell")
    samples = draw(model)
    return ls.swap(model), ls.swap(model, samples=samples), model, samples


def test_a_calibration_that_makes_the_outputs_worse_is_taken_back_as_a_whole(reverted):
    free, converted, model, samples = reverted
    calibration = converted.calibration
    assert calibration.error_calibrated > calibration.error_match
    assert not calibration.kept
    assert_errors(model, converted, free, samples)
    assert calibration.drift == calibration.drift_match
    assert values(converted.model) == values(free.model)
    (old,), (new,) = free.plan.swaps, converted.plan.swaps
    assert new.config == old.config
    assert found(converted.model)[new.site.path].epsilon == old.config["epsilon"]
    dropped = [f for f in converted.findings if f.code == "calibration-dropped"]
    assert len(dropped) == 1
    assert f"{calibration.error_calibrated:.3g}" in dropped[0].message


def test_models_whose_calls_depend_on_the_batch_are_refused():
    model = zoo.build("control_flow")  # maps over the samples
    weights = values(model)
    with pytest.raises(TransferError, match="differently from batch to batch"):
        ls.swap(model, samples=draw(model))
    assert values(model) == weights


def test_a_recurrent_layer_that_keeps_its_state_is_refused():
    model = zoo.build("state_kept_between_batches")
    with pytest.raises(UnsupportedModelError) as caught:
        ls.swap(model, samples=draw(model))
    assert caught.value.where == "rnn"
    assert "keeps its state from batch to batch" in str(caught.value)
    assert "stateful=False" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill": 5}, "distill needs samples"),
        ({"distill": -1, "samples": []}, "distill must be a whole number of at least 0, not -1"),
        ({"distill": 1.5, "samples": []}, "distill must be a whole number of at least 0, not 1.5"),
        ({"distill": True, "samples": []}, "distill must be .* not True"),
        ({"distill": None, "samples": []}, "distill must be .* not None"),
        ({"max_samples": 7, "samples": []}, "max_samples must be .* at least 8, not 7"),
        ({"max_samples": "all", "samples": []}, "max_samples must be .* not 'all'"),
        ({"max_samples": None, "samples": []}, "max_samples must be .* not None"),
    ],
)
def test_wrong_options_are_refused_before_anything_else(done, fields, message):
    with pytest.raises(UsageError, match=message):
        ls.swap(done.model, **fields)


def test_max_samples_is_the_most_that_is_taken(done):
    calibration = ls.swap(done.model, samples=done.samples, max_samples=16).calibration
    assert (calibration.samples, calibration.held_out) == (12, 4)


def test_what_was_swapped_in_place_can_not_be_calibrated_any_more():
    model = zoo.build("only_layer")
    converted = ls.swap(model, inplace=True)
    with pytest.raises(UsageError, match="in place can't be calibrated") as caught:
        ls.calibrate(converted, draw(model))
    assert "samples" in caught.value.hint


def test_calibrating_needs_samples(done):
    with pytest.raises(UsageError, match="needs samples"):
        ls.calibrate(done.free, None)
    with pytest.raises(UsageError, match="input 'image' takes"):
        ls.calibrate(done.free, np.zeros((20, 3)))


# In place.


@pytest.mark.parametrize("name", ["residual", "nested_used_twice", "string_lookup"])
def test_in_place_gives_the_same_as_a_copy(name):
    model = zoo.build(name)
    samples = draw(model)
    if name == "string_lookup":
        words = np.random.default_rng(0).choice(["0", "1", "cat", "dog"], (COUNT, 4))
        samples = dict.fromkeys(samples, words)
    copied = ls.swap(model, samples=samples)
    converted = ls.swap(model, samples=samples, inplace=True)
    assert converted.model is model
    assert converted.source is None
    assert converted.plan == copied.plan
    assert converted.calibration == copied.calibration
    assert [bits for _, bits in values(model)] == [bits for _, bits in values(copied.model)]
    held_out = read_samples(copied.source if copied.source is not model else copied.model, samples)
    for batch in held_out.held_out:
        for one, other in zip(call(model, batch), call(copied.model, batch), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_in_place_layers_that_keras_does_not_track_get_the_calibrated_values():
    model = zoo.build("plain_objects")
    samples = draw(model)
    copied = ls.swap(model, samples=samples)
    x = np.ones((2, 4, 16), "float32")
    expected = np.asarray(copied.model(x))
    ls.swap(model, samples=samples, inplace=True)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_in_place_predictions_change_though_the_model_had_predicted_before():
    model = zoo.build("residual")
    samples = draw(model)
    x = next(iter(samples.values())).astype("float32")
    old = model.predict(x, verbose=0)
    ls.swap(model, samples=samples, inplace=True)
    predicted = model.predict(x, verbose=0)
    np.testing.assert_allclose(predicted, np.asarray(model(x)), rtol=1e-5, atol=1e-6)
    assert np.abs(predicted - old).max() > 1e-3


# All or nothing.


class Stop(Exception):
    """Raised by a progress callback."""


@pytest.mark.parametrize(
    ("error", "stage", "number"),
    [
        (KeyboardInterrupt, "read samples", 0),
        (KeyboardInterrupt, "calibrate shared layers", 1),
        (KeyboardInterrupt, "calibrate", 2),
        (Stop, "calibrate", 1),
        (KeyboardInterrupt, "distill", 1),
    ],
)
def test_interrupted_at_any_stage_nothing_has_changed(error, stage, number):
    norm = bn(name="shared")
    inputs = layers.Input((4, 16))
    model = tf_keras.Model(inputs, bn(name="later")(norm(norm(inputs))))
    zoo.randomize(model)
    weights, x = values(model), np.ones((2, 4, 16), "float32")
    output = np.asarray(model(x))

    def progress(name, done=0, total=0):
        if (name, done) == (stage, number):
            raise error

    with pytest.raises(error):
        ls.swap(model, samples=draw(model, 16), distill=3, inplace=True, progress=progress)
    assert values(model) == weights
    assert len(batchnorms(model)) == 2
    np.testing.assert_array_equal(model(x), output)


def test_graph_functions_go_on_running_eagerly_where_they_did():
    model = zoo.build("only_layer")
    tf.config.run_functions_eagerly(True)
    try:
        ls.swap(model, samples=draw(model))
        assert tf.config.functions_run_eagerly()
    finally:
        tf.config.run_functions_eagerly(False)


class Refusing(layers.Layer):
    """Works on symbolic tensors and on small values."""

    def call(self, x):
        if tf.executing_eagerly() and float(tf.reduce_max(tf.abs(x))) > 1e3:
            raise ValueError("values out of range")
        return x


def test_a_model_that_fails_on_the_samples_is_told_and_left_alone():
    model = on((4, 16), [bn(name="first"), Refusing(), bn(name="second")])
    zoo.randomize(model)
    weights = values(model)
    samples = draw(model)
    next(iter(samples.values()))[17] *= 1e6
    with pytest.raises(TransferError, match="fails on the samples: values out of range"):
        ls.swap(model, samples=samples, inplace=True)
    assert values(model) == weights
    assert len(batchnorms(model)) == 2


def test_samples_that_do_not_fit_leave_the_model_alone():
    model = zoo.build("only_layer")
    weights = values(model)
    for samples in (
        np.zeros((20, 3)),
        np.full((20, 8, 16), np.nan),
        np.zeros((3, 8, 16)),
        "none.npy",
    ):
        with pytest.raises(LayerswapError):
            ls.swap(model, samples=samples, inplace=True)
    assert values(model) == weights
    assert len(batchnorms(model)) == 1


def test_convert_calibrates_on_the_way(tmp_path):
    model = zoo.build("only_layer")
    samples = draw(model)
    report = ls.convert(model, tmp_path / "model.keras", samples=samples)
    expected = ls.swap(model, samples=samples)
    assert report.calibration == expected.calibration
    assert report.plan == expected.plan
    assert "few-samples" in [f.code for f in report.findings]
    again = tf_keras.models.load_model(tmp_path / "model.keras")
    batch = {"x": np.ones((2, 8, 16), "float32")}
    np.testing.assert_array_equal(call(again, batch), call(expected.model, batch))


@pytest.mark.parametrize("name", ["subclass_of_everything", "subclass_with_losses"])
def test_a_sequential_that_builds_itself_anew_for_the_samples(name):
    model = zoo.build(name)
    assert ls.swap(model, samples=draw(model)).calibration.kept


def test_layers_whose_calibration_was_taken_back_say_what_they_are(reverted):
    _, converted, _, _ = reverted
    (fit,) = converted.calibration.layers
    assert fit.epsilon == found(converted.model)[fit.path].epsilon
    assert fit.fit == "match"
    assert fit.error == fit.error_match


def test_outputs_that_are_text_are_passed_over():
    inputs = layers.Input((16,), name="x")
    text = layers.Input((1,), dtype="string", name="text")
    lowered = tf.strings.lower(text)
    model = tf_keras.Model([inputs, text], [bn(name="norm")(inputs), lowered])
    zoo.randomize(model)
    x = np.random.default_rng(0).normal(size=(COUNT, 16))
    words = np.full((COUNT, 1), "Word")
    assert ls.swap(model, samples={"x": x, "text": words}).calibration.kept


class Late(tf_keras.Model):
    """Its attributes aren't in the order of its calls."""

    def __init__(self):
        super().__init__()
        self.late, self.early = bn(name="late"), bn(name="early")

    def call(self, x, training=None):
        return self.late(self.early(x, training=training), training=training)


def test_the_first_layer_is_the_one_that_is_called_first():
    model = Late()
    model(np.ones((2, 4, 16), "float32"))
    model.late.moving_mean.assign(np.full(16, 30.0))
    samples = np.random.default_rng(0).normal(size=(64, 4, 16))
    findings = ls.swap(model, samples=samples).findings
    assert ("unconverged-statistics", "late") in [(f.code, f.where) for f in findings]


def test_a_gamma_next_to_nothing_says_nothing_of_the_statistics_in_16_bits():
    model = under("mixed_float16", lambda: on((6, 16), [bn(name="norm"), layers.Dense(16)]))
    norm, gamma = model.get_layer("norm"), np.ones(16)
    gamma[3] = 1e-6
    norm.gamma.assign(gamma)
    norm.beta.assign(np.full(16, 0.3))
    samples = np.random.default_rng(0).normal(size=(64, 6, 16))
    (fit,) = ls.swap(model, samples=samples).calibration.layers
    assert fit.source_mean < 0.2


def test_graph_functions_run_eagerly_until_the_last_calibration_ends():
    """As two threads come and go: the first one leaves while the other is at work."""
    try:
        first, second = (calibrating._eager_functions() for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert tf.config.functions_run_eagerly()
        second.__exit__(None, None, None)
        assert not tf.config.functions_run_eagerly()
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("spatial", [(40,), (3, 400)])
def test_a_moving_mean_that_is_far_off_costs_no_accuracy(spatial):
    """As after too short a training: values around 1000, and a moving mean of 0."""
    model = on((*spatial, 16), bn(name="norm", momentum=0.999))
    model.get_layer("norm").gamma.assign(np.linspace(0.5, 2.0, 16))
    rng = np.random.default_rng(0)
    samples = 1e3 + rng.normal(size=(COUNT, *spatial, 16)) * rng.uniform(0.5, 2.0, 16)
    samples = samples.astype("float32")
    fields = {"groups": 2, "epsilon": EPSILON}
    free = ls.swap(model, **fields)
    converted = ls.swap(model, samples=samples, **fields)
    assert_fitted(model, converted, samples, free, tolerance=2e-3)


def test_a_model_that_can_not_be_copied_is_not_told_to_be_swapped_in_place():
    model = zoo.build("function_as_attribute")
    with pytest.raises(UnsupportedModelError, match="can't be copied") as caught:
        ls.swap(model, samples=draw(model), inplace=True)
    assert "inplace=True" not in caught.value.hint


def test_a_model_without_an_output_to_compare_keeps_what_its_layers_gained():
    """Only whole numbers come out: whether the calibration helps shows at the layers alone."""
    inputs = layers.Input((4, 16), name="x")
    model = tf_keras.Model(inputs, tf.argmax(bn(name="norm")(inputs), -1))
    zoo.randomize(model)
    converted = ls.swap(model, samples=draw(model), groups=4, epsilon=EPSILON)
    (fit,) = converted.calibration.layers
    assert fit.fit == "calibrated"
    assert "calibration-dropped" not in [f.code for f in converted.findings]


class Counting(layers.Layer):
    """Its state changes in every call."""

    def build(self, shape):
        self.calls = self.add_weight("calls", (), "int32", "zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x


def test_state_that_calls_change_is_put_back():
    model = on((4, 16), [Counting(name="count"), bn(name="norm"), layers.Dense(3)])
    zoo.randomize(model)
    model.get_layer("count").calls.assign(7)
    converted = ls.swap(model, samples=draw(model), distill=2)
    for each in (model, converted.model):
        assert int(each.get_layer("count").calls) == 7


def test_a_layer_whose_gamma_is_zero_is_not_wrong():
    model = on((4, 16), bn(name="norm"))
    norm = model.get_layer("norm")
    norm.gamma.assign(np.zeros(16))
    norm.beta.assign(np.linspace(0.1, 1.3, 16))
    converted = ls.swap(model, samples=draw(model))
    (fit,) = converted.calibration.layers
    assert fit.error < 1e-3
    assert "high-drift" not in {f.code for f in converted.findings}


def test_what_the_samples_do_not_reach_is_said():
    class Branching(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.spare = bn(name="used"), bn(name="spare")

        def call(self, x):
            if x.shape[0] == 2:
                self.spare(x)
            return self.used(x)

    model = Branching()
    model(np.ones((2, 4, 16), "float32"))
    converted = ls.swap(model, samples=np.random.default_rng(0).normal(size=(40, 4, 16)))
    found_codes = {f.where for f in converted.findings if f.code == "not-calibrated"}
    assert found_codes == {"spare"}
    assert [fit.path for fit in converted.calibration.layers] == ["used"]
