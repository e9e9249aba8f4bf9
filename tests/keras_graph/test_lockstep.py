"""Models side by side: every batch of every side pauses at every watched layer, in order."""

import contextlib
import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import zoo
from layerswap.errors import LoadError, TransferError
from layerswap.keras_graph.lockstep import Lockstep, Side
from zoo.registry import bn, on

STOCK = vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert (vars(BatchNormalizationBase)["call"], vars(layers.GroupNormalization)["call"]) == STOCK


def batches(count=3, size=2, shape=(4, 16)):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(size, *shape)).astype("float32") for _ in range(count)]


def twins(names=("a", "b", "c")):
    """A BN model, and one with GroupNormalization in the same places."""
    rng = np.random.default_rng(1)
    models = []
    for make in (bn, lambda name: layers.GroupNormalization(4, name=name)):
        model = on((4, 16), [x for n in names for x in (layers.Dense(16), make(name=n))])
        models.append(model)
    kernels = [rng.normal(size=(16, 16)) / 4 for _ in names]
    for model in models:
        zoo.randomize(model)
        for dense, kernel in zip(model.layers[1::2], kernels, strict=True):
            dense.kernel.assign(kernel)
    return models


@pytest.fixture(scope="module")
def pair():
    return twins()


def side(model, given, names=("a", "b", "c")):
    runs = [lambda batch=batch: np.asarray(model(batch, training=False)) for batch in given]
    return Side(runs, {name: model.get_layer(name) for name in names})


def until(model, name, output):
    """The part of a model up to a layer's output, or to its input."""
    layer = model.get_layer(name)
    return tf_keras.Model(model.input, layer.output if output else layer.input)


def test_each_layer_is_visited_in_order_with_the_tensors_of_all_batches_of_both_sides(pair):
    before, after = pair
    given = batches()
    visits = []
    with Lockstep(side(before, given), side(after, given)) as steps:
        for path, (outputs, inputs) in steps:
            visits.append(path)
            for part, tensors in (
                (until(before, path, True), outputs),
                (until(after, path, False), inputs),
            ):
                for batch, tensor in zip(given, tensors, strict=True):
                    np.testing.assert_allclose(tensor, part(batch), rtol=1e-5, atol=1e-5)
    assert visits == ["a", "b", "c"]


def test_the_results_are_those_of_plain_calls(pair):
    before, after = pair
    given = batches(4)
    with Lockstep(side(before, given), side(after, given[:2])) as steps:
        assert steps.results == []
        for _ in steps:
            pass
    results = steps.results
    assert [len(each) for each in results] == [4, 2]
    for model, answers in zip((before, after), results, strict=True):
        for batch, answer in zip(given, answers, strict=False):
            np.testing.assert_array_equal(answer, model(batch, training=False))


def test_a_layer_changed_at_its_visit_computes_with_the_change_at_once():
    _, model = twins()
    (batch,) = given = batches(1)
    with Lockstep(side(model, given)) as steps:
        for path, _ in steps:
            layer = model.get_layer(path)
            layer.gamma.assign(layer.gamma * 3.0)
            layer.epsilon = 0.5
    np.testing.assert_array_equal(steps.results[0][0], model(batch, training=False))
    _, untouched = twins()
    assert np.abs(steps.results[0][0] - np.asarray(untouched(batch))).max() > 0.5


def test_a_reply_stands_for_what_the_layer_would_compute_at_that_step_alone(pair):
    before, after = pair
    given = batches(2)
    replies = [np.full((2, 4, 16), value, "float32") for value in (1.0, 2.0)]
    with Lockstep(side(before, given), side(after, given)) as steps:
        for path, (_, inputs) in steps:
            if path == "a":
                steps.reply(1, [tf.constant(reply) for reply in replies])
            if path == "b":  # a Dense layer further on
                kernel, bias = after.layers[3].get_weights()
                for entering, reply in zip(inputs, replies, strict=True):
                    np.testing.assert_allclose(entering, reply @ kernel + bias, rtol=1e-4)
    rest = tf_keras.Sequential(after.layers[3:])
    for result, reply in zip(steps.results[1], replies, strict=True):
        np.testing.assert_allclose(result, rest(reply), rtol=1e-4, atol=1e-4)
    for result, batch in zip(steps.results[0], given, strict=True):
        np.testing.assert_array_equal(result, before(batch, training=False))


def test_only_watched_layers_stop_a_run(pair):
    before, after = pair
    given = batches()
    names = ("b",)
    with Lockstep(side(before, given, names), side(after, given, names)) as steps:
        assert [path for path, _ in steps] == ["b"]


def test_without_a_watched_layer_the_runs_go_straight_to_the_end(pair):
    before, _ = pair
    given = batches()
    with Lockstep(side(before, given, ())) as steps:
        assert list(steps) == []
    assert len(steps.results[0]) == 3


def test_a_shared_layer_is_visited_at_each_of_its_calls():
    model = zoo.build("shared_layer")
    given = batches(2, shape=(8, 8, 3))
    runs = [lambda batch=batch: model(batch) for batch in given]
    with Lockstep(Side(runs, {"norm": model.get_layer("shared")})) as steps:
        visits = [(path, [t.shape[0] for t in tensors[0]]) for path, tensors in steps]
    assert visits == [("norm", [2, 2])] * 2


@pytest.mark.parametrize("name", ["nested", "subclass", "graph_function_as_attribute", "cell"])
def test_layers_are_met_wherever_they_live(name):
    model = zoo.build(name)
    norms = [x for x in model.submodules if isinstance(x, BatchNormalizationBase)]
    x = zoo.sample(model)
    expected = np.asarray(model(x, training=False))
    tf.config.run_functions_eagerly(True)
    try:
        watched = {str(i): norm for i, norm in enumerate(norms)}
        with Lockstep(Side([lambda: np.asarray(model(x, training=False))], watched)) as steps:
            visits = [path for path, _ in steps]
    finally:
        tf.config.run_functions_eagerly(False)
    assert set(visits) == set(watched)
    # Keras calls a cell once more than there are steps: to see what it puts out.
    assert len(visits) == (5 if name == "cell" else len(norms))
    np.testing.assert_allclose(steps.results[0][0], expected, rtol=1e-5, atol=1e-6)


def test_a_call_that_keras_left_on_a_layer_steps_aside():
    model, _ = twins(("a",))
    norm = model.get_layer("a")
    own = norm.call
    norm.call = own
    (batch,) = given = batches(1)
    with Lockstep(side(model, given, ("a",))) as steps:
        assert [path for path, _ in steps] == ["a"]
    assert vars(norm)["call"] is own
    del norm.call
    np.testing.assert_array_equal(steps.results[0][0], model(batch))


def test_other_threads_predict_as_ever_while_the_runs_pause(pair):
    before, after = pair
    given = batches()
    expected = [np.asarray(model(given[0], training=False)) for model in (before, after)]
    answers = []

    def predict():
        answers.append([np.asarray(m(given[0], training=False)) for m in (before, after)])

    with Lockstep(side(before, given), side(after, given)) as steps:
        for _ in steps:
            predict()  # in this thread, which runs the steps
            thread = threading.Thread(target=predict)
            thread.start()
            thread.join()
    assert len(answers) == 6
    for answer in answers:
        for got, wanted in zip(answer, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


# Ends.


def test_leaving_the_block_early_ends_every_run(pair):
    before, after = pair
    given = batches()
    count = threading.active_count()
    with Lockstep(side(before, given), side(after, given)) as steps:
        for path, _ in steps:
            assert threading.active_count() == count + 6
            if path == "b":
                break
    assert threading.active_count() == count
    assert steps.results == []
    for model in (before, after):
        model(given[0])  # nothing pauses here


def test_a_lockstep_that_is_never_iterated_starts_nothing(pair):
    before, _ = pair
    count = threading.active_count()
    with Lockstep(side(before, batches())):
        assert threading.active_count() == count


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_whatever_the_consumer_raises_the_runs_end(error, pair):
    before, after = pair
    given = batches()

    def consume():
        with Lockstep(side(before, given), side(after, given)) as steps:
            for path, _ in steps:
                if path == "b":
                    raise error

    with pytest.raises(error):
        consume()


class Failing(layers.Layer):
    """Raises when it is given a batch of ones."""

    error = ValueError("these are ones")

    def call(self, x):
        if tf.executing_eagerly() and bool((np.asarray(x) == 1.0).all()):
            raise self.error
        return x


def failing(error):
    """A model with a layer between two norms that raises at the second of three batches."""
    layer = Failing(name="failing")
    layer.error = error
    inputs = layers.Input((4, 16))
    x = layer(inputs) + bn(name="a")(inputs)
    model = tf_keras.Model(inputs, bn(name="b")(x))
    given = batches()
    given[1] = np.ones_like(given[1])
    return side(model, given, ("a", "b"))


def test_what_a_model_raises_becomes_one_error_with_the_reason():
    with (
        pytest.raises(TransferError) as caught,
        Lockstep(failing(ValueError("these are ones"))) as steps,
    ):
        list(steps)
    assert str(caught.value).startswith("the model fails on the samples: these are ones\n")
    assert "trained on" in caught.value.hint
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_interruptions_in_a_model_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, Lockstep(failing(error)) as steps:
        list(steps)
    assert caught.value is error


def test_errors_of_the_package_pass_unchanged(pair):
    error = LoadError("ours")

    def run():
        raise error

    before, _ = pair
    watched = side(before, []).layers
    with (
        pytest.raises(LoadError) as caught,
        Lockstep(Side([*side(before, batches()).runs, run], watched)) as steps,
    ):
        list(steps)
    assert caught.value is error


class Choosing(tf_keras.Model):
    """Calls its layers by what it is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = bn(name="a"), bn(name="b")

    def build(self, shape):
        self.a.build(shape)
        self.b.build(shape)

    def call(self, x, training=None):
        x = self.a(x)
        return self.b(x) if float(tf.reduce_mean(x)) > 0 else x


def test_models_that_call_their_layers_differently_from_batch_to_batch_are_refused():
    model = Choosing()
    model.build((None, 4, 16))
    model.a.moving_mean.assign(np.zeros(16))
    given = [np.full((2, 4, 16), value, "float32") for value in (1.0, -1.0)]
    runs = [lambda batch=batch: model(batch) for batch in given]
    watched = {"path/a": model.a, "path/b": model.b}
    visits = []
    with pytest.raises(TransferError) as caught, Lockstep(Side(runs, watched)) as steps:
        visits += (path for path, _ in steps)
    assert visits == ["path/a"]
    assert "differently from batch to batch" in str(caught.value)
    assert "path/b or to the end" in str(caught.value)
    assert "without samples" in caught.value.hint


def test_sides_that_come_to_different_layers_are_refused(pair):
    before, after = pair
    given = batches(1)
    other = Side(side(after, given).runs, {"a": after.get_layer("b"), "b": after.get_layer("a")})
    with (
        pytest.raises(TransferError, match="a or to b"),
        Lockstep(side(before, given), other) as steps,
    ):
        list(steps)


def test_a_cleanup_in_the_models_code_runs_when_its_run_is_given_up():
    cleaned = []

    class Careful(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = bn(name="norm")

        def call(self, x):
            try:
                return self.norm(x)
            finally:
                if tf.executing_eagerly():
                    cleaned.append(True)

    layer = Careful()
    model = on((4, 16), layer)
    runs = [lambda batch=batch: model(batch) for batch in batches()]
    with Lockstep(Side(runs, {"norm": layer.norm})) as steps:
        next(iter(steps))
        assert cleaned == []
    assert len(cleaned) == 3


def test_a_model_that_swallows_every_exception_is_ended_all_the_same():
    class Swallowing(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = bn(name="norm")

        def call(self, x):
            for _ in range(3):
                with contextlib.suppress(BaseException):
                    x = self.norm(x)
            return x

    layer = Swallowing()
    model = on((4, 16), layer)
    runs = [lambda batch=batch: model(batch) for batch in batches()]
    with Lockstep(Side(runs, {"norm": layer.norm})) as steps:
        next(iter(steps))


def test_calls_on_symbolic_tensors_are_not_visited():
    """A Sequential without an Input calls its layers symbolically when the batch size changes."""
    model = tf_keras.Sequential([layers.Dense(16), bn(name="norm")])
    model(np.ones((2, 16), "float32"))
    given = batches(2, size=5, shape=(16,))
    runs = [lambda batch=batch: np.asarray(model(batch)) for batch in given]
    with Lockstep(Side(runs, {"norm": model.layers[1]})) as steps:
        visits = [[t.shape[0] for t in tensors[0]] for _, tensors in steps]
    assert visits == [[5, 5]]
