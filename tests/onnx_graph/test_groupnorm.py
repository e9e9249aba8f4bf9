"""GroupNorm nodes become standard operators that compute what the definition says."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import oracle
from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.groupnorm import PROFILES, expand
from layerswap.onnx_graph.runtimes import open_runtime

RNG = np.random.default_rng(3)


def model_of(shape, groups, gamma, beta, *, known=None, count=1, epsilon=0.03):
    """`count` GroupNorm nodes in a row over `shape`, of which None axes are dynamic."""
    channels = len(gamma)
    attributes = {"groups": groups, "channels": channels, "epsilon": epsilon, "path": "block/gn"}
    if known is not None:
        attributes["shape"] = known
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [
        helper.make_node("GroupNorm", [a, "g", "b"], [b], domain="layerswap", **attributes)
        for a, b in itertools.pairwise(names)
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    graph = helper.make_graph(
        nodes,
        "g",
        values[:1],
        values[1:],
        [onnx.numpy_helper.from_array(gamma, "g"), onnx.numpy_helper.from_array(beta, "b")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("layerswap", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    return model


def expanded(model, **options):
    light, constants = graphs.lighten(model)
    expand(light, constants, **options)
    complete = graphs.complete(light, constants)
    del complete.opset_import[1:]
    onnx.checker.check_model(complete, full_check=True)
    return complete


def affine(channels):
    return [RNG.normal(1, 0.3, channels).astype("float32") for _ in range(2)]


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("spatial", [(), (5,), (4, 5), (2, 3, 4), (1, 1)])
def test_equals_the_definition_at_any_rank_and_batch(spatial, groups, runtime, tmp_path):
    gamma, beta = affine(12)
    known = [-1, 12, *spatial]
    model = expanded(model_of([None, 12, *spatial], groups, gamma, beta, known=known))
    onnx.save(model, tmp_path / "m.onnx")
    assert len(model.graph.node) == 4
    for batch in (1, 3):
        x = RNG.normal(2, 3, (batch, 12, *spatial)).astype("float32")
        got = open_runtime(runtime).run(tmp_path / "m.onnx", {"x": x})["y"]
        expected = oracle.group_norm(x, groups, gamma, beta, 0.03, axis=1)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("known", "nodes"),
    [([-1, 6, -1, 5], 4), ([-1, 6, 4, -1], 4), ([-1, 6, -1, -1], 5), (None, 5), ([2, 6, 4, 5], 4)],
)
def test_shape_is_read_at_run_time_only_where_needed(known, nodes, tmp_path):
    gamma, beta = affine(6)
    model = expanded(model_of([None, 6, None, None], 2, gamma, beta, known=known))
    assert len(model.graph.node) == nodes
    onnx.save(model, tmp_path / "m.onnx")
    x = RNG.normal(size=(2, 6, 4, 5)).astype("float32")
    got = open_runtime("onnxruntime").run(tmp_path / "m.onnx", {"x": x})["y"]
    expected = oracle.group_norm(x, 2, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_constants_are_shared_and_the_layer_is_noted():
    gamma, beta = affine(8)
    model = expanded(model_of([None, 8, 3], 4, gamma, beta, known=[-1, 8, 3], count=3))
    assert len(model.graph.node) == 12
    # γ, β; ones and zeros for 4 groups and 8 channels; two shapes.
    assert len(model.graph.initializer) == 2 + 4 + 2
    assert [n.doc_string for n in model.graph.node][3::4] == ["block/gn"] * 3


def test_epsilon_and_a_large_mean_survive(tmp_path):
    gamma, beta = affine(4)
    model = expanded(model_of([None, 4, 64], 2, gamma, beta, known=[-1, 4, 64], epsilon=1e-7))
    (instance,) = (n for n in model.graph.node if n.op_type == "InstanceNormalization")
    assert graphs.attribute(instance, "epsilon") == pytest.approx(1e-7)
    onnx.save(model, tmp_path / "m.onnx")
    x = RNG.normal(1e3, 1, (1, 4, 64)).astype("float32")
    got = open_runtime("onnxruntime").run(tmp_path / "m.onnx", {"x": x})["y"]
    expected = oracle.group_norm(x, 2, gamma, beta, 1e-7, axis=1)
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_nodes_in_branches_are_replaced(tmp_path):
    gamma, beta = affine(4)
    inner = model_of([2, 4, 3], 2, gamma, beta, known=[2, 4, 3])
    body = helper.make_graph(inner.graph.node, "then", [], [inner.graph.output[0]])
    body.node[0].output[0] = body.output[0].name = "inside"
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, [2, 4, 3])],
    )
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other)
    del inner.graph.node[:]
    inner.graph.node.append(choice)
    inner.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    model = expanded(inner)
    onnx.save(model, tmp_path / "m.onnx")
    x = RNG.normal(size=(2, 4, 3)).astype("float32")
    run = open_runtime("onnxruntime").run
    expected = oracle.group_norm(x, 2, gamma, beta, 0.03, axis=1)
    path = tmp_path / "m.onnx"
    np.testing.assert_allclose(run(path, {"x": x, "yes": np.array(True)})["y"], expected, atol=1e-5)
    np.testing.assert_array_equal(run(path, {"x": x, "yes": np.array(False)})["y"], x)


def test_second_run_changes_nothing():
    gamma, beta = affine(4)
    once = expanded(model_of([None, 4, 3], 2, gamma, beta, known=[-1, 4, 3]))
    assert expanded(once) == once


def test_unknown_profile_and_indivisible_channels_are_refused():
    gamma, beta = affine(4)
    with pytest.raises(
        ExportError, match=f"unknown profile 'fast'; there is {', '.join(PROFILES)}"
    ):
        expanded(model_of([None, 4, 3], 2, gamma, beta), profile="fast")
    with pytest.raises(ExportError, match=r"^block/gn: 4 channels don't divide into 3 groups"):
        expanded(model_of([None, 4, 3], 3, gamma, beta))
