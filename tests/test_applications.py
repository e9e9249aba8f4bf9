"""Swaps the models of tf_keras.applications: the smallest always, all with `-m applications`."""

import pytest

import applications
import layerswap as ls

SMALLEST = ("MobileNet", "MobileNetV2", "MobileNetV3Small", "RegNetX002")
SMALL = 10e6  # parameters: below, the files are proven, too


def test_there_are_64():
    assert len(applications.names()) == 64


@pytest.mark.parametrize("name", SMALLEST)
def test_small(name):
    model, converted = swap(name)
    planned = {swap.site.path: swap.channels for swap in converted.plan.swaps}
    assert planned == {
        layer.name: layer.moving_mean.shape[0] for layer in applications.batchnorms(model)
    }


@pytest.mark.applications
@pytest.mark.parametrize("name", applications.names())
def test_all(name, tmp_path):
    model, converted = swap(name)
    if model.count_params() < SMALL:
        assert applications.keras_parity(converted, tmp_path) == 0
    artifact = ls.export(converted, tmp_path / "model.onnx", verify=False)
    assert applications.onnx_parity(converted.model, artifact.path) < 1e-4


def swap(name):
    model = applications.build(name)
    weights = model.get_weights()
    assert not ls.plan(model, groups="auto").refusals
    converted = ls.swap(model, groups="auto")
    assert len(converted.plan.swaps) == len(applications.batchnorms(model))
    applications.check_swap(model, weights, converted.model)
    return model, converted
