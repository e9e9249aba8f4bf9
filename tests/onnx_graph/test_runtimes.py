"""Runtimes run files, and say in one sentence why they can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import parser

from layerswap.errors import ExportError, LoadError, MissingExtraError
from layerswap.onnx_graph import runtimes
from layerswap.onnx_graph.runtimes import open_runtime
from layerswap.runtimes import FILE_RUNTIMES

RNG = np.random.default_rng(5)
EACH = pytest.mark.parametrize("runtime", FILE_RUNTIMES, indirect=True)
# They keep 32 bits of an integer, and don't notice themselves that an input is missing.
CARELESS = pytest.mark.parametrize("runtime", ["openvino", "opencv"], indirect=True)
TYPES = {"float32": "float", "float64": "double"}


def model_of(path, text):
    """Writes a graph given in ONNX's text form."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return model_of(
        tmp_path / "model.onnx",
        """g (float[N,2] x, float[2] shift) => (float[N,2] z, float[N,2] a)
        { z = Add(x, shift) a = Relu(z) }""",
    )


# --- what they compute ----------------------------------------------------------------------


@EACH
def test_gives_every_output_by_name_in_the_graphs_order(runtime, path):
    run = runtime.session(path)
    for batch in (3, 1):
        x = normal(batch, 2)
        got = run({"shift": np.array([1, 1], "float32"), "x": x})
        assert list(got) == ["z", "a"]
        np.testing.assert_array_equal(got["z"], x + 1)
        np.testing.assert_array_equal(got["a"], np.maximum(x + 1, 0))
    assert runtime.name in FILE_RUNTIMES
    assert runtime.version[0].isdigit()


@EACH
def test_an_output_before_the_one_that_it_is_made_of(runtime, tmp_path):
    text = """g (float[N,2] x, float[N,2] y) => (float[N,2] a, float[N,2] z, float[N,2] y)
    { z = Sub(y, x) a = Relu(z) }"""
    x, y = normal(3, 2), normal(3, 2)
    got = runtime.session(model_of(tmp_path / "m.onnx", text))({"x": x, "y": y})
    assert list(got) == ["a", "z", "y"]
    np.testing.assert_array_equal(got["a"], np.maximum(y - x, 0))
    np.testing.assert_array_equal(got["z"], y - x)
    np.testing.assert_array_equal(got["y"], y)


@EACH
@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 6, 4), (2, 5, 6, 4)], ids=len)
def test_ranks_two_to_five(runtime, shape, tmp_path):
    """Shapes come out as they should: a mean over the last axis, and channels first."""
    last = len(shape)
    given, mean, moved = (
        ",".join(map(str, axes))
        for axes in (
            ("N", *shape),
            [f"m{i}" for i in range(last)],
            [f"t{i}" for i in range(last + 1)],
        )
    )
    text = f"""g (float[{given}] x) => (float[{mean}] m, float[{moved}] t) {{
        axis = Constant<value_ints = [{last}]>()
        m = ReduceMean<keepdims = 0>(x, axis)
        t = Transpose<perm = {[0, last, *range(1, last)]}>(x)
    }}"""
    path = model_of(tmp_path / "m.onnx", text)
    run = runtime.session(path)
    for batch in (1, 3):
        x = normal(batch, *shape)
        got = run({"x": x})
        np.testing.assert_allclose(got["m"], x.mean(-1), atol=1e-6)
        np.testing.assert_array_equal(got["t"], np.moveaxis(x, -1, 1))


@EACH
def test_open_axes(runtime, tmp_path):
    text = """g (float[N,C,H,W] x, float[C] scale, float[C] shift) => (float[N,C,H,W] y)
    { y = InstanceNormalization<epsilon = 0.03>(x, scale, shift) }"""
    path = model_of(tmp_path / "m.onnx", text)
    run = runtime.session(path)
    for shape in ((1, 3, 5, 7), (3, 2, 4, 4)):
        x, scale, shift = normal(*shape) * 3 + 2, normal(shape[1]), normal(shape[1])
        got = run({"x": x, "scale": scale, "shift": shift})["y"]
        wide = x.astype(np.float64)
        centred = wide - wide.mean((2, 3), keepdims=True)
        factor = scale[:, None, None] / np.sqrt(wide.var((2, 3), keepdims=True) + 0.03)
        np.testing.assert_allclose(got, centred * factor + shift[:, None, None], atol=1e-5)


@EACH
def test_products_are_those_of_float32(runtime, tmp_path):
    """Left to itself OpenVINO may compute in bfloat16, which is 4e-3 off."""
    text = """g (float[N,64] x, float[64,32] w) => (float[N,32] y)
    { p = MatMul(x, w) y = Softmax<axis = 1>(p) }"""
    path = model_of(tmp_path / "m.onnx", text)
    x, w = normal(3, 64), normal(64, 32)
    got = runtime.session(path)({"x": x, "w": w})["y"]
    product = np.exp(x.astype(np.float64) @ w)
    np.testing.assert_allclose(got, product / product.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)


@EACH
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]
)
def test_types_of_inputs(runtime, dtype, tmp_path):
    kind = TYPES.get(dtype, dtype)
    text = f"g ({kind}[N,3] x) => ({kind}[3,N] y) {{ y = Transpose<perm = [1, 0]>(x) }}"
    x = RNG.integers(0, 2, (4, 3)).astype(dtype)
    got = runtime.session(model_of(tmp_path / "m.onnx", text))({"x": x})["y"]
    np.testing.assert_array_equal(got, x.T)


@EACH
def test_arrays_that_are_not_contiguous(runtime, path):
    x = np.repeat(normal(3, 2), 2, axis=1)[:, ::2]
    got = runtime.session(path)({"x": x, "shift": np.zeros(2, "float32")})["z"]
    np.testing.assert_array_equal(got, x)


@EACH
def test_answers_outlast_the_next_run(runtime, path):
    run, shift = runtime.session(path), np.zeros(2, "float32")
    first, second = normal(3, 2), normal(3, 2)
    got = run({"x": first, "shift": shift})
    assert run({"x": second, "shift": shift}).keys() == got.keys()
    np.testing.assert_array_equal(got["z"], first)


@EACH
def test_names_that_are_no_identifiers(runtime, tmp_path):
    names = ["block 1/x:0", "größe/y:0"]
    node = onnx.helper.make_node("Relu", names[:1], names[1:])
    values = [onnx.helper.make_tensor_value_info(n, 1, ["N", 2]) for n in names]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "m ü.onnx")
    x = normal(3, 2)
    (got,) = runtime.session(tmp_path / "m ü.onnx")({names[0]: x}).values()
    np.testing.assert_array_equal(got, np.maximum(x, 0))


@EACH
def test_weights_beside_the_file(runtime, tmp_path):
    weight = onnx.numpy_helper.from_array(normal(2, 5), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, ["N", s]) for n, s in (("x", 2), ("y", 5))]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 8
    path = tmp_path / "m.onnx"
    expected = normal(3, 2)
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    got = runtime.session(path)({"x": expected})["y"]
    np.testing.assert_allclose(got, expected @ onnx.numpy_helper.to_array(weight), atol=1e-5)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(LoadError, match=f"{runtime.name} .* can't load it"):
        runtime.session(path)({"x": expected})


# --- what they refuse -----------------------------------------------------------------------


def mystery(path):
    """Writes a graph with an operator that nobody has."""
    node = onnx.helper.make_node("Mystery", ["x"], ["y"], domain="nowhere")
    values = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("nowhere", 1), onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    onnx.save(model, path)
    return path


@EACH
@pytest.mark.parametrize("content", [b"not a model", b"", None], ids=["text", "empty", "missing"])
def test_unloadable_file_is_one_clear_error(runtime, content, tmp_path, capfd):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        runtime.session(path)({"x": np.zeros(1, "float32")})
    assert caught.value.where == str(path)
    assert caught.value.message.startswith(f"{runtime.name} {runtime.version} can't load it: ")
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


@EACH
def test_a_file_cut_short(runtime, path, capfd):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LoadError, match="can't load it"):
        runtime.session(path)({})
    assert capfd.readouterr() == ("", "")


@EACH
def test_an_operator_that_a_runtime_lacks_is_a_load_error_that_names_it(runtime, tmp_path, capfd):
    with pytest.raises(LoadError, match=r"can't load it: .*Mystery"):
        runtime.session(mystery(tmp_path / "m.onnx"))({"x": np.zeros(2, "float32")})
    assert capfd.readouterr() == ("", "")


@EACH
def test_inputs_that_do_not_fit_are_an_export_error(runtime, path, capfd):
    with pytest.raises(ExportError, match=f"{runtime.name} .* failed to run the model: .*shift"):
        runtime.session(path)({"x": np.zeros((2, 2), "float32")})
    with pytest.raises(ExportError, match="failed to run the model"):
        runtime.session(path)({"x": np.zeros((2, 3), "float32"), "shift": np.zeros(2, "float32")})
    assert capfd.readouterr() == ("", "")


@CARELESS
def test_inputs_are_checked_for_runtimes_that_do_not(runtime, path):
    some = np.zeros(2, "float32")
    with pytest.raises(ExportError, match="inputs are shift, x, but given are a, shift, x"):
        runtime.session(path)({"x": some, "shift": some, "a": some})
    with pytest.raises(ExportError, match="inputs are shift, x, but given are none"):
        runtime.session(path)({})
    for shape in ((2, 3), (2,), (2, 2, 1)):
        given = {"x": np.zeros(shape, "float32"), "shift": some}
        with pytest.raises(ExportError, match=r"input 'x' has the shape \(.*\), not \(\?, 2\)"):
            runtime.session(path)(given)


@EACH
@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_integers_of_more_than_32_bits_are_never_cut_off(runtime, value, tmp_path):
    path = model_of(tmp_path / "m.onnx", "g (int64[N] x) => (int64[N] y) { y = Identity(x) }")
    for x in (np.array([2**31 - 1, -(2**31)]), np.zeros(0, np.int64)):
        if runtime.name != "opencv" or x.size:  # see the empty batch below
            np.testing.assert_array_equal(runtime.session(path)({"x": x})["y"], x)
    x = np.array([0, value])
    if runtime.name in ("openvino", "opencv"):
        with pytest.raises(ExportError, match="input 'x' holds integers of more than 32 bits"):
            runtime.session(path)({"x": x})
    else:
        np.testing.assert_array_equal(runtime.session(path)({"x": x})["y"], x)


@pytest.mark.parametrize(
    ("name", "module", "package", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnxruntime", "runtime"),
        ("openvino", "openvino", "openvino", "openvino"),
        ("opencv", "cv2", "opencv-python-headless", "opencv"),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, name, module, package, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"layerswap\[{extra}\]") as caught:
        open_runtime(name)
    assert f"needs the package '{package}', which is not installed" in caught.value.message
    assert open_runtime("reference").name == "reference"


# --- one by one -----------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime"], indirect=True)
def test_a_large_model_keeps_its_weights_once(runtime, path, monkeypatch):
    entry = "session.disable_prepacking"
    data = path.with_name("model.onnx.data")
    data.write_bytes(bytes(1000))
    limit = path.stat().st_size + 1000
    monkeypatch.setattr(runtimes, "LARGE_BYTES", limit)
    with pytest.raises(RuntimeError):  # there is no such entry
        runtime._options(str(path)).get_session_config_entry(entry)
    monkeypatch.setattr(runtimes, "LARGE_BYTES", limit - 1)
    assert runtime._options(str(path)).get_session_config_entry(entry) == "1"
    x = normal(3, 2)
    got = runtime.session(path)({"x": x, "shift": np.zeros(2, "float32")})["z"]
    np.testing.assert_array_equal(got, x)


@EACH
def test_a_name_that_is_not_text(runtime, path):
    """OpenCV would take the process down, ONNX Runtime complain about its own arguments."""
    odd = shutil.move(path, os.fsdecode(os.fsencode(path.parent) + b"/\xff.onnx"))
    with pytest.raises(LoadError, match="its path is not valid Unicode"):
        runtime.session(odd)({"x": normal(3, 2), "shift": np.zeros(2, "float32")})


@pytest.mark.parametrize("runtime", ["opencv"], indirect=True)
def test_the_log_level_of_opencv_is_the_users_again(runtime, path, tmp_path):
    import cv2

    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_DEBUG)
    try:
        runtime.session(path)({"x": normal(3, 2), "shift": np.zeros(2, "float32")})
        with pytest.raises(LoadError):
            runtime.session(mystery(tmp_path / "m.onnx"))({})
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_DEBUG
    finally:
        cv2.utils.logging.setLogLevel(level)


@pytest.mark.parametrize("runtime", ["opencv"], indirect=True)
def test_opencv_gives_no_array_for_an_empty_batch(runtime, path):
    inputs = {"x": np.zeros((0, 2), "float32"), "shift": np.zeros(2, "float32")}
    with pytest.raises(ExportError, match="output 'z' is empty"):
        runtime.session(path)(inputs)


def test_openvino_tells_nobody_that_it_is_used(path, tmp_path):
    """Its telemetry would send a message and leave an identifier in the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys
import numpy as np
from layerswap.onnx_graph.runtimes import open_runtime
runtime = open_runtime("openvino")
run = runtime.session({os.fspath(path)!r})
run({{"x": np.zeros((3, 2), "f"), "shift": np.zeros(2, "f")}})
sys.exit(any(name.startswith("openvino_telemetry") for name in sys.modules))
"""
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"HOME": str(home)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == 0
    assert list(home.iterdir()) == []


def test_importing_the_room_loads_no_framework_and_no_runtime():
    code = (
        "import sys, layerswap.onnx_graph.build, layerswap.onnx_graph.runtimes; "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'tf_keras', 'tf2onnx', "
        "'onnxruntime', 'openvino', 'cv2', 'layerswap.keras_graph')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference"])
def test_inputs_that_nothing_needs_and_scalars_that_can_t_be_written(name, tmp_path):
    """A runtime may fold an input away: the shape of `x` is fixed."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float[2,3] x, float s) => (int64[2] a, float b) { a = Shape (x) b = Neg (s) }"""
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(text), path)
    scalar = np.array(2.0, np.float32)
    scalar.flags.writeable = False
    answer = open_runtime(name).session(path)({"x": np.zeros((2, 3), np.float32), "s": scalar})
    np.testing.assert_array_equal(answer["a"], [2, 3])
    assert answer["b"] == -2.0
