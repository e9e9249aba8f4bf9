"""Models that can't be swapped: each layer has its reason, and nothing is changed."""

import pytest
import tensorflow as tf
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
import zoo
from layerswap.errors import IndivisibleChannelsError, UnsupportedModelError
from zoo.truth import assert_close, reachable, truth, values


def picture(model):
    layers = [(layer.name, type(layer), layer.trainable) for layer in model._flatten_layers()]
    norms = [id(layer) for layer in reachable(model, BatchNormalizationBase)]
    return layers, norms, values(model) if model.built else None


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_each_layer_is_refused_for_its_reason(name):
    _, fields, codes = zoo.REFUSED[name]
    model = zoo.build(name)
    before = picture(model)

    plan = ls.plan(model, **fields)

    assert {d.site.path: getattr(d, "code", None) for d in plan.decisions} == codes
    assert picture(model) == before
    for inplace in (False, True):
        with pytest.raises((UnsupportedModelError, IndivisibleChannelsError)) as caught:
            ls.swap(model, **fields, inplace=inplace)
        for refusal in plan.refusals:
            assert refusal.site.path in str(caught.value)
            assert refusal.reason
        assert picture(model) == before
    assert not tf.config.functions_run_eagerly()


def test_a_compile_of_one_s_own_is_refused_before_anything_is_changed():
    model = zoo.subclassed.two_optimizers()
    before = picture(model)
    assert ls.plan(model).ok
    for inplace in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"compile\(\) of its own"):
            ls.swap(model, inplace=inplace)
        assert picture(model) == before


@pytest.mark.parametrize("name", zoo.IN_PLACE)
def test_what_can_t_be_copied_is_swapped_in_place(name):
    model = zoo.build(name)
    x = zoo.sample(model)
    before, expected = picture(model), truth(model, x)
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        ls.swap(model)
    assert picture(model) == before
    assert_close(ls.swap(model, inplace=True).model(x, training=False), expected)
    assert reachable(model, BatchNormalizationBase) == []
