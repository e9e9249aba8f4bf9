"""The assertions for users' tests: what passes, what fails, and what they say then."""

import re

import numpy as np
import pytest
import tf_keras
from tf_keras import layers

import layerswap as ls
from layerswap.errors import LoadError, PolicyError, UsageError
from layerswap.grouping import auto_groups
from layerswap.testing import (
    assert_groups,
    assert_no_batchnorm,
    assert_parity,
    assert_same_graph,
)


class Mine(layers.Layer):
    def call(self, inputs):
        return inputs


class Stats(layers.Layer):
    """Looks like BatchNormalization."""

    def build(self, shape):
        self.mean = self.add_weight("moving_mean", (shape[-1],), trainable=False)

    def call(self, inputs):
        return inputs - self.mean


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sequential(*stack):
    return tf_keras.Sequential([layers.Input((4, 4, 32)), *stack], name="model")


def groupnorms():
    return sequential(
        layers.GroupNormalization(8, name="first"),
        layers.Conv2D(48, 1, name="conv"),
        layers.GroupNormalization(auto_groups(48), name="second"),
    )


def saved(model, path="m.keras"):
    model.save(path)
    return path


def message(assertion, *arguments, **fields):
    with pytest.raises(AssertionError) as caught:
        assertion(*arguments, **fields)
    return str(caught.value)


# --- no BatchNormalization ------------------------------------------------------------------


def test_none_is_left(digits_onnx):
    assert_no_batchnorm(digits_onnx)
    assert_no_batchnorm(str(digits_onnx))
    assert_no_batchnorm(groupnorms())
    assert_no_batchnorm(saved(groupnorms()))


@pytest.mark.parametrize("form", [lambda model: model, saved], ids=["model", "file"])
def test_each_that_is_left_is_named(form):
    kept = [layers.BatchNormalization(name="a"), layers.BatchNormalization(name="b")]
    text = message(assert_no_batchnorm, form(sequential(*kept)))
    assert re.search("LS101 batchnorm-left\n  error: a: .*\n  error: b: .*\n  hint: ", text)


def test_what_can_t_be_seen_fails_and_loading_decides():
    path = saved(sequential(Mine(name="mine")))
    assert "  undetermined: mine: " in message(assert_no_batchnorm, path)
    assert_no_batchnorm(path, load=True, custom_objects={"Mine": Mine})
    assert_no_batchnorm(path, ignore=["LS002"])
    path = saved(sequential(Stats(name="stats")), "stats.keras")
    text = message(assert_no_batchnorm, path, load=True, custom_objects={"Stats": Stats})
    assert "LS103 batchnorm-lookalike\n  undetermined: stats: " in text


def test_a_live_model_is_looked_into():
    assert_no_batchnorm(sequential(Mine()))
    assert "stats" in message(assert_no_batchnorm, sequential(Stats(name="stats")))


def test_what_isn_t_a_model_is_no_failed_assertion():
    with pytest.raises(LoadError):
        assert_no_batchnorm("absent.keras")
    with pytest.raises(UsageError, match="about files"):
        assert_no_batchnorm(groupnorms(), load=True)


# --- groups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda model: model, saved], ids=["model", "file"])
def test_groups_as_they_are(form):
    model = form(groupnorms())
    assert_groups(model, {"first": 8, "second": "auto"})
    assert_groups(model, {"f*": 8})
    assert_groups(model, {"first": 8, "**": auto_groups(48)})
    assert_groups(form(sequential(layers.GroupNormalization(-1, name="each"))), -1)


def test_groups_of_an_exported_file(digits, digits_onnx):
    assert_groups(digits_onnx, "auto")
    assert ls.convert(digits, "two.onnx", groups=2).ok
    assert_groups("two.onnx", 2)
    text = message(assert_groups, "two.onnx", "auto")
    wrong = [s.site.path for s in ls.plan(digits).swaps if s.groups != 2]
    assert text.count("  error: ") == len(wrong) > 0


def test_other_groups_are_told_with_layer_numbers_and_remedy():
    text = message(assert_groups, saved(groupnorms()), 8)
    assert "m.keras: LS202 groups-differ" in text
    assert f"  error: second: has {auto_groups(48)} groups over 48 channels, not 8\n" in text
    assert "first" not in text
    assert "  hint: " in text
    text = message(assert_groups, groupnorms(), "auto")
    assert f"first: has 8 groups over 32 channels, not {auto_groups(32)} (auto)" in text


def test_a_glob_without_a_layer_fails():
    text = message(assert_groups, groupnorms(), {"first": 8, "sceond": 3})
    assert "no GroupNormalization matches 'sceond'\n  there is: first, second" in text
    assert "none at all" in message(assert_groups, sequential(layers.Conv2D(1, 1)), 8)


def test_what_can_t_be_seen_may_hold_groups():
    path = saved(sequential(Mine(name="mine"), layers.GroupNormalization(8)))
    assert "LS002" in message(assert_groups, path, 8)
    assert_groups(path, 8, ignore=["LS002"])


def test_an_unknown_number_fails():
    path = saved(tf_keras.Sequential([layers.GroupNormalization(8, name="first")]))
    assert_groups(path, 8)
    assert "doesn't say how many channels" in message(assert_groups, path, "auto")


@pytest.mark.parametrize("groups", [0, "atuo", 2.5, {"first": "atuo"}])
def test_what_are_no_groups_is_an_error(groups):
    with pytest.raises(PolicyError):
        assert_groups("absent.keras", groups)


# --- parity and graphs ----------------------------------------------------------------------


def test_parity(digits_onnx):
    assert_parity(digits_onnx)
    assert_parity(digits_onnx, f"{digits_onnx}.ref.npz", runtime="reference")
    text = message(assert_parity, digits_onnx, runtime="reference", absolute=0.0, relative=0.0)
    numbers = ls.verify(digits_onnx, runtime="reference")
    assert "  error: reference: reference DIFFERS from the Keras model at batch size" in text
    assert f"largest difference {numbers.max_absolute:.3g}, " in text
    assert "  hint: " in text


def test_another_file_s_reference_is_no_parity(digits_onnx):
    digits_onnx.write_bytes(digits_onnx.read_bytes() + b"\x9a\x01\x00")
    assert "SHA-256 differs" in message(assert_parity, digits_onnx)


def test_the_same_graph(digits, digits_onnx, tmp_path):
    assert ls.convert(digits, "again.onnx").ok
    assert_same_graph(digits_onnx, "again.onnx")
    assert ls.convert(digits, "two.onnx", groups=2).ok
    text = message(assert_same_graph, digits_onnx, "two.onnx")
    assert re.search("LS9.. .*\n  error: ", text)


def test_other_weights_are_another_model():
    model = groupnorms()
    first = saved(model)
    model.get_layer("first").gamma.assign(np.full(32, 2.0))
    assert "first" in message(assert_same_graph, first, saved(model, "other.keras"))
