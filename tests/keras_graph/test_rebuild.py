"""The change itself: all or nothing, with names that files rely on, and proven afterwards."""

import pytest
import tf_keras
from tf_keras import layers
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import zoo
from layerswap.errors import PolicyError, TransferError
from layerswap.keras_graph import rebuild


def batchnorms(model):
    return [m for m in model.submodules if isinstance(m, BatchNormalizationBase)]


def test_variables_keep_the_scope_of_the_layer():
    model = zoo.build("nested")
    before = {v.name for v in model.weights if "/moving_" not in v.name}
    assert {v.name for v in ls.swap(model).model.weights} == before


def test_a_value_that_keras_refuses_late_changes_nothing():
    model = zoo.build("residual")
    overrides = {"b": {"gamma_initializer": "no_such"}}
    with pytest.raises(PolicyError, match="no_such"):
        ls.swap(model, weights="reset", overrides=overrides, inplace=True)
    assert len(batchnorms(model)) == 2


def test_a_swap_checks_itself(monkeypatch):
    monkeypatch.setattr(rebuild, "_turn", lambda found, new: None)
    assert len(batchnorms(ls.swap(zoo.build("residual"), self_check=False).model)) == 2
    with pytest.raises(TransferError, match=r"a: BatchNormalization is left\n.*b: Batch"):
        ls.swap(zoo.build("residual"))


class Deep(layers.Layer):
    """Hides a layer deeper than the walk goes."""

    def __init__(self):
        super().__init__()
        hidden = layers.BatchNormalization(name="hidden")
        for _ in range(12):
            hidden = [hidden]
        self.hidden = hidden

    def call(self, x):
        return x


def test_what_keras_tracks_and_no_attribute_leads_to_is_refused():
    model = tf_keras.Sequential([layers.Input((4,)), Deep()])
    assert [(r.site.path, r.code) for r in ls.plan(model).refusals] == [("hidden", "unreached")]
