"""Graphs in newer operator sets than tf2onnx writes."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.opsets import newest_opset, raise_opset

GRAPH = """<ir_version: 8, opset_import: ["": 18, "layerswap": 1]>
g (float[N,4,6] x, bool p) => (float[N,M] y) {
  a = layerswap.GroupNorm<groups = 2>(x, gamma, beta)
  b = ReduceMax<keepdims = 0>(a, axes)
  y = If(p) <
    then_branch = t () => (float[N,M] u) { u = ReduceMax<keepdims = 1>(b, axes) },
    else_branch = e () => (float[N,M] v) { v = Mul(b, b) }
  >
}"""


def light():
    model = parser.parse_model(GRAPH)
    constants = {
        "gamma": np.ones(4, np.float32),
        "beta": np.zeros(4, np.float32),
        "axes": np.array([1], np.int64),
    }
    return model, constants


def test_newest_is_at_least_what_tf2onnx_writes_and_at_most_what_onnx_knows():
    assert 18 <= newest_opset() <= onnx.defs.onnx_opset_version()


def test_without_onnxruntime_the_newest_is_onnx_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert newest_opset() == onnx.defs.onnx_opset_version()


def test_an_opset_that_onnxruntime_refuses_is_not_the_newest(monkeypatch):
    import onnxruntime

    stock = onnxruntime.InferenceSession

    def session(content, *args, **options):
        if onnx.load_from_string(content).opset_import[0].version > 20:
            raise RuntimeError("under development")
        return stock(content, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert newest_opset() == 20


def test_an_older_or_equal_opset_changes_nothing():
    model, constants = light()
    before = model.SerializeToString()
    raise_opset(model, constants, 18)
    raise_opset(model, constants, 0)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("opset", range(19, onnx.defs.onnx_opset_version() + 1))
def test_nodes_of_other_domains_and_of_branches_survive(opset):
    model, constants = light()
    raise_opset(model, constants, opset)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == {"": opset, "layerswap": 1}
    assert sorted(constants) == ["axes", "beta", "gamma"]
    assert not model.graph.initializer
    norm, *_ = model.graph.node
    assert (norm.domain, norm.op_type, list(norm.input)) == (
        "layerswap",
        "GroupNorm",
        ["x", "gamma", "beta"],
    )
    # What remains still computes the same, here in onnx's own evaluator.
    norm.domain, norm.op_type = "", "Identity"
    graphs.replace_all(norm.input, ["x"])
    graphs.replace_all(norm.attribute, [])
    complete = graphs.complete(model, constants)
    onnx.checker.check_model(complete)
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    for branch, expected in ((True, x.max(1).max(1, keepdims=True)), (False, x.max(1) ** 2)):
        (got,) = ReferenceEvaluator(complete).run(None, {"x": x, "p": np.array(branch)})
        np.testing.assert_array_equal(got, expected)


def test_a_graph_that_onnx_cannot_convert_is_refused_with_a_remedy(monkeypatch):
    def fail(model, opset):
        raise RuntimeError("no adapter\nand more")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    with pytest.raises(ExportError, match="from opset 18 to 21: no adapter") as caught:
        raise_opset(*light(), 21)
    assert "18 or below" in caught.value.hint
