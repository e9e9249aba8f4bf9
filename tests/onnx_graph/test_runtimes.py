"""Runtimes run files, and say in one sentence why they can't."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import parser

from layerswap.errors import ExportError, LoadError, MissingExtraError, UsageError
from layerswap.onnx_graph.runtimes import open_runtime

NAMES = ["onnxruntime", "reference"]


@pytest.fixture
def path(tmp_path):
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N,2] x, float[2] shift) => (float[N,2] z, float[N,2] a)
        { z = Add(x, shift) a = Relu(z) }"""
    )
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("name", NAMES)
def test_gives_every_output_by_name_in_the_graphs_order(name, path):
    runtime = open_runtime(name)
    x = np.array([[1, -3], [0, 5], [2, 2]], "float32")
    got = runtime.run(path, {"shift": np.array([1, 1], "float32"), "x": x})
    assert list(got) == ["z", "a"]
    np.testing.assert_array_equal(got["z"], x + 1)
    np.testing.assert_array_equal(got["a"], np.maximum(x + 1, 0))
    assert runtime.name == name
    assert runtime.version


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"not a model", b"", None], ids=["text", "empty", "missing"])
def test_unloadable_file_is_one_clear_error(name, content, tmp_path):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        open_runtime(name).run(path, {"x": np.zeros(1, "float32")})
    assert caught.value.where == str(path)
    assert name in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_do_not_fit_are_an_export_error(name, path):
    with pytest.raises(ExportError, match=f"{name} .* failed to run"):
        open_runtime(name).run(path, {"x": np.zeros((2, 2), "float32")})


def test_operator_that_onnxruntime_lacks_is_a_load_error(tmp_path):
    node = onnx.helper.make_node("Mystery", ["x"], ["y"], domain="nowhere")
    values = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("nowhere", 1), onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="can't load the file"):
        open_runtime("onnxruntime").run(tmp_path / "m.onnx", {"x": np.zeros(2, "float32")})


def test_unknown_runtime_lists_the_known():
    with pytest.raises(
        UsageError, match="unknown runtime 'abacus'; there is onnxruntime, reference"
    ):
        open_runtime("abacus")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"layerswap\[runtime\]"):
        open_runtime("onnxruntime")
    assert open_runtime("reference").name == "reference"


def test_importing_the_room_loads_no_framework_and_no_runtime():
    code = (
        "import sys, layerswap.onnx_graph.build, layerswap.onnx_graph.runtimes; "
        "sys.exit(any(m in sys.modules for m in "
        "('tensorflow', 'tf_keras', 'tf2onnx', 'onnxruntime', 'layerswap.keras_graph')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
