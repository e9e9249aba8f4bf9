"""The self-check catches what a broken swap would leave."""

import numpy as np
import pytest
import tf_keras
from tf_keras import layers

import layerswap as ls
import oracle
import zoo
from layerswap.errors import TransferError
from layerswap.keras_graph.selfcheck import check_swap
from layerswap.moments import normalize_groups


def swapped():
    converted = ls.swap(zoo.build("residual"), self_check=False)
    return converted.model, converted.plan


def test_a_right_swap_passes():
    check_swap(*swapped())


def test_a_batchnorm_left_in_a_list_is_found():
    model, plan = swapped()
    model.extra = [layers.BatchNormalization(name="left")]
    with pytest.raises(TransferError, match="left: BatchNormalization is left"):
        check_swap(model, plan)


@pytest.mark.parametrize(("field", "value"), [("groups", 1), ("epsilon", 0.5), ("axis", 1)])
def test_another_configuration_is_found(field, value):
    model, plan = swapped()
    setattr(model.get_layer("a"), field, value)
    with pytest.raises(TransferError, match=f"a: has .*'{field}': {value}"):
        check_swap(model, plan)


def test_another_computation_is_found():
    model, plan = swapped()
    layer = model.get_layer("a")
    stock = layer.call
    layer.call = lambda x, mask=None: stock(x) + 0.01
    with pytest.raises(TransferError, match=r"a: its output is 0\.01 off"):
        check_swap(model, plan)


def test_dependence_on_the_batch_is_found():
    model, plan = swapped()
    layer = model.get_layer("a")
    stock = layer.call
    layer.call = lambda x, mask=None: stock(x) + (0.0 if x.shape[0] > 1 else 0.01)
    with pytest.raises(TransferError, match=r"a: the output of a sample alone is 0\.01 off"):
        check_swap(model, plan)


def test_nan_is_found():
    model, plan = swapped()
    model.get_layer("a").gamma.assign(np.full(32, np.nan))
    with pytest.raises(TransferError, match="nan off"):
        check_swap(model, plan)


def test_another_class_is_found():
    model, plan = swapped()

    class Mine(layers.GroupNormalization):
        pass

    model.get_layer("a").__class__ = Mine
    with pytest.raises(TransferError, match="a: is a Mine"):
        check_swap(model, plan)


def test_it_leaves_no_trace_on_the_model():
    model, plan = swapped()
    layer = model.get_layer("a")
    before = {k: v for k, v in vars(layer).items() if "spec" in k or "nodes" in k}
    check_swap(model, plan)
    assert {k: vars(layer)[k] for k in before} == before


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((2, 12), 1, 3), ((2, 5, 12), 2, 4), ((2, 12, 5), 1, 12), ((2, 3, 4, 6), 3, 1)],
)
def test_its_arithmetic_is_that_of_the_oracle(shape, axis, groups):
    x = np.random.default_rng(0).normal(size=shape)
    expected = oracle.group_norm(x, groups, None, None, 0.03, axis=axis)
    np.testing.assert_allclose(normalize_groups(x, groups, 0.03, axis), expected, rtol=1e-10)


def test_every_policy_passes_it():
    model = zoo.build("sequential")
    for fields in ({"groups": -1}, {"weights": "reset", "center": False}, {"weights": "copy"}):
        ls.swap(model, **fields)
    tf_keras.backend.clear_session()
