"""Files, written piece by piece, against what protobuf and onnx read from them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from layerswap.errors import ExportError
from layerswap.onnx_graph import files, graphs
from layerswap.onnx_graph.files import write

GRAPH = """<ir_version: 8, opset_import: ["": 18], producer_name: "p">
g (float[2] x) => (float[2] y) { y = Identity(x) }"""


def constants(rng):
    brain = rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)
    # Older versions of onnx don't know the type.
    known = {"brain": brain} if _knows(brain.dtype) else {}
    return known | {
        "kernel": rng.normal(size=(3, 5, 40, 2)).astype(np.float32),
        "transposed": rng.normal(size=(30, 40)).astype(np.float32).T,
        "double": rng.normal(size=7),
        "half": rng.normal(size=(4, 200)).astype(np.float16),
        "big_endian": np.arange(300, dtype=">i4"),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "text": np.array(["a", "ü"], object),
    }


def _knows(dtype):
    try:
        return bool(helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError):
        return False


def light():
    model = parser.parse_model(GRAPH)
    model.metadata_props.add(key="k", value="v")
    return model


def assert_complete(loaded, values):
    expected = [graphs.tensor(name, value) for name, value in values.items()]
    assert list(loaded.graph.initializer) == expected
    del loaded.graph.initializer[:]
    assert loaded == light()


def test_the_bytes_mean_the_complete_model(tmp_path):
    values = constants(np.random.default_rng(0))
    (path,) = write(light(), values, tmp_path / "m.onnx")
    assert_complete(onnx.load(path), values)
    onnx.checker.check_model(path)


@pytest.mark.parametrize("external_data", ["always", "auto"])
def test_weights_beside_the_file_are_the_same(tmp_path, external_data, monkeypatch):
    if external_data == "auto":
        monkeypatch.setattr(files, "SINGLE_FILE_BYTES", 1000)
    values = constants(np.random.default_rng(0))
    written = write(light(), values, tmp_path / "m.onnx", external_data=external_data)
    assert written == [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    bare = onnx.load(written[0], load_external_data=False)
    outside = {t.name for t in bare.graph.initializer if t.data_location == t.EXTERNAL}
    assert (
        outside
        == {n for n, v in values.items() if v.nbytes > 1024}
        == {
            "kernel",
            "transposed",
            "half",
            "big_endian",
        }
    )
    for tensor in bare.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert places.get("location", "m.onnx.data") == "m.onnx.data"
        assert int(places.get("offset", 0)) % 4096 == 0
    loaded = onnx.load(written[0])
    assert [t.name for t in loaded.graph.initializer] == list(values)
    for tensor in loaded.graph.initializer:
        got, expected = numpy_helper.to_array(tensor), values[tensor.name]
        np.testing.assert_array_equal(got, expected.astype(expected.dtype.newbyteorder("<")))


def test_a_length_of_many_bytes(tmp_path):
    """Lengths are varints: below 128 one byte, up to five for what fits into a file."""
    sizes = [1, 31, 32, 33, 4095, 4096, 70_000, 5_000_000]
    values = {f"w{n}": np.arange(n, dtype=np.float32) for n in sizes}
    (path,) = write(light(), values, tmp_path / "m.onnx")
    assert_complete(onnx.load(path), values)


def test_never_beside_refuses_what_one_file_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SINGLE_FILE_BYTES", 1000)
    values = {"w": np.zeros(1000, np.float32)}
    with pytest.raises(ExportError, match="don't fit into a single ONNX file") as caught:
        write(light(), values, tmp_path / "m.onnx", external_data="never")
    assert "--external-data auto" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
