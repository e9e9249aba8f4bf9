"""An artifact in every runtime against its reference, and what is said where one is missing."""

import dataclasses
import shutil
import sys

import numpy as np
import onnx
import pytest

import layerswap as ls
from layerswap import verifying
from layerswap.comparison import furthest
from layerswap.errors import (
    ExportError,
    LoadError,
    MissingExtraError,
    ParityError,
    UsageError,
)
from layerswap.records import Parity, Tolerance
from layerswap.references import (
    Reference,
    fingerprint,
    load_reference,
    reference_path,
    save_reference,
)
from layerswap.runtimes import ALL, FILE_RUNTIMES, RUNTIMES
from layerswap.verifying import open_runtime, report_parity, verify

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "opencv": "cv2"}
FLOATS = onnx.TensorProto.FLOAT


@pytest.fixture(scope="session")
def _converted_folder(tmp_path_factory, digits):
    target = tmp_path_factory.mktemp("converted") / "digits_gn"
    assert ls.convert(digits, target).ok
    return target


@pytest.fixture
def digits_folder(_converted_folder, tmp_path):
    """A copy of the bundled model's SavedModel export, its reference beside it."""
    shutil.copytree(_converted_folder.parent, tmp_path / "exported")
    return tmp_path / "exported" / "digits_gn"


@pytest.fixture
def doubling(tmp_path):
    """A graph that gives 2·x, its weight in another file, and a reference of a single batch."""
    weight = onnx.numpy_helper.from_array(np.full((1, 300), 2, np.float32), "w")
    values = [onnx.helper.make_tensor_value_info(n, FLOATS, [2, 300]) for n in "xy"]
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 8
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    tolerance = Tolerance(1e-5, 1e-4)
    known = Reference(({"x": x},), ({"y": 2 * x},), None, fingerprint(path), tolerance, 0, "0")
    save_reference(known, reference_path(path))
    return path


def installed():
    """What `all` runs on an ONNX file here; OpenCV needs NumPy 2."""
    old = np.lib.NumpyVersion(np.__version__) < "2.0.0"
    return [name for name in FILE_RUNTIMES if not (old and name == "opencv")]


# --- in every runtime -----------------------------------------------------------------------


@pytest.mark.parametrize("runtime", FILE_RUNTIMES, indirect=True)
def test_an_export_in_every_runtime(runtime, digits_onnx):
    parity = verify(digits_onnx, runtime=runtime.name)
    assert parity.ok
    assert parity.runtime == runtime.name
    assert parity.batches == (1, 3)
    assert parity.max_relative < 1e-5


def test_the_default_is_by_the_kind_of_the_artifact(digits_onnx, digits_folder):
    assert verify(digits_onnx).runtime == "onnxruntime"
    assert verify(digits_folder).runtime == "savedmodel"
    assert verify(f"{digits_folder}/").ok


def test_a_folder_named_by_a_dot(digits_folder, monkeypatch):
    monkeypatch.chdir(digits_folder)
    assert verify(".").ok
    monkeypatch.chdir(digits_folder / "variables")
    assert verify("..").ok


def test_a_saved_model_in_its_runtime(digits_folder):
    report = report_parity(digits_folder, runtime="savedmodel")
    assert report.ok
    assert [parity.batches for parity in report.parity] == [(1, 3)]
    assert report.drift is not None
    assert report.findings == ()


@pytest.mark.parametrize("runtime", FILE_RUNTIMES, indirect=True)
def test_one_batch_and_weights_beside_the_file(runtime, doubling):
    parity = verify(doubling, runtime=runtime.name)
    assert parity.ok
    assert parity.batches == (2,)


def test_an_artifact_is_loaded_once_for_all_batches(digits_onnx, monkeypatch):
    runtime, loads = open_runtime(digits_onnx), []
    stock = runtime._load

    def load(path):
        loads.append(path)
        return stock(path)

    monkeypatch.setattr(runtime, "_load", load)
    known = load_reference(reference_path(digits_onnx))
    assert verifying.measure_parity(runtime, digits_onnx, known).batches == (1, 3)
    assert loads == [str(digits_onnx)]


# --- the reference belongs to another artifact ------------------------------------------------


def change_weights(path):
    """Makes 2·x into 3·x; the `.onnx` file itself stays as it is."""
    data = path.with_name("m.onnx.data")
    before = path.read_bytes()
    data.write_bytes(np.full(300, 3, np.float32).tobytes())
    assert path.read_bytes() == before


def test_changed_external_data_is_found_by_checksum_and_by_numbers(doubling):
    change_weights(doubling)
    report = report_parity(doubling)
    assert report.exit_code == 1
    assert [finding.code for finding in report.findings] == ["checksum-mismatch"]
    assert not report.parity[0].ok
    with pytest.raises(ParityError, match="the file isn't the one"):
        verify(doubling)


@pytest.mark.parametrize("how", ["changed", "added", "gone"])
def test_a_changed_folder_is_found_by_checksum(digits_folder, how):
    index = digits_folder / "variables" / "variables.index"
    if how == "changed":
        (digits_folder / "fingerprint.pb").write_bytes(b"another")
    elif how == "added":
        (digits_folder / "assets").mkdir(exist_ok=True)
        (digits_folder / "assets" / "new.txt").write_text("new")
    else:
        (digits_folder / "keras_metadata.pb").unlink()
    assert index.is_file()
    report = report_parity(digits_folder)
    assert report.exit_code == 1
    assert report.parity[0].ok  # TensorFlow reads none of these
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("checksum-mismatch", "error")
    assert "the folder isn't the one that the reference was made for" in finding.message


def test_a_changed_variable_does_not_load(digits_folder):
    data = digits_folder / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(LoadError, match=r"savedmodel .* can't load it: .*[Cc]hecksum"):
        verify(digits_folder)
    codes = [finding.code for finding in report_parity(digits_folder, runtime=ALL).findings]
    assert codes == ["checksum-mismatch", "runtime-failed"]


# --- all of them ----------------------------------------------------------------------------


def test_all_runs_what_is_installed(digits_onnx):
    report = report_parity(digits_onnx, runtime=ALL)
    assert report.exit_code == 0
    assert [parity.runtime for parity in report.parity] == installed()
    assert all(parity.ok for parity in report.parity)
    missing = set(FILE_RUNTIMES) - set(installed())
    assert {finding.where for finding in report.findings} == missing
    assert verify(digits_onnx, runtime=ALL) == furthest(report.parity)


def test_all_on_a_folder(digits_folder):
    report = report_parity(digits_folder, runtime=ALL)
    assert [parity.runtime for parity in report.parity] == ["savedmodel"]
    assert report.exit_code == 0


@pytest.mark.parametrize("name", PACKAGES)
def test_all_says_what_is_missing(digits_onnx, monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    report = report_parity(digits_onnx, runtime=ALL)
    assert report.exit_code == 0
    assert [p.runtime for p in report.parity] == [n for n in installed() if n != name]
    finding = next(f for f in report.findings if f.where == name)
    assert (finding.code, finding.severity) == ("runtime-missing", "info")
    assert "which is not installed" in finding.message
    assert finding.hint.startswith("Install it with: pip install 'layerswap[")
    assert verify(digits_onnx, runtime=ALL).ok


@pytest.mark.parametrize("name", PACKAGES)
def test_one_that_is_named_has_to_be_installed(digits_onnx, monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(MissingExtraError, match="which is not installed"):
        verify(digits_onnx, runtime=name)


@pytest.mark.parametrize("runtime", ["savedmodel", None, ALL])
def test_a_folder_needs_tensorflow(digits_folder, monkeypatch, runtime):
    """With `all`, too: nothing would be proven."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match=r"running a SavedModel needs .*'tensorflow'"):
        verify(digits_folder, runtime=runtime)


@pytest.mark.parametrize("error", [LoadError, ExportError])
def test_all_goes_on_where_one_fails(digits_onnx, monkeypatch, error):
    stock = verifying.measure_parity

    def measure(runtime, *arguments):
        if runtime.name == "openvino":
            raise error("openvino 1.0 can't do it", where="m.onnx", hint="Take another.")
        return stock(runtime, *arguments)

    monkeypatch.setattr(verifying, "measure_parity", measure)
    report = report_parity(digits_onnx, runtime=ALL)
    assert report.exit_code == 1
    assert [p.runtime for p in report.parity] == [n for n in installed() if n != "openvino"]
    failed = next(f for f in report.findings if f.code == "runtime-failed")
    assert (failed.severity, failed.where) == ("error", "openvino")
    assert (failed.message, failed.hint) == ("openvino 1.0 can't do it", "Take another.")
    with pytest.raises(ParityError, match=r"openvino: openvino 1.0 can't do it"):
        verify(digits_onnx, runtime=ALL)
    with pytest.raises(error):
        verify(digits_onnx, runtime="openvino")


def test_of_all_the_one_furthest_from_fine(digits_onnx, monkeypatch):
    stock = verifying.measure_parity

    def measure(runtime, *arguments):
        parity = stock(runtime, *arguments)
        ok = runtime.name != "reference"
        return dataclasses.replace(parity, ok=ok, max_absolute=0.0 if not ok else 0.5)

    monkeypatch.setattr(verifying, "measure_parity", measure)
    parity = verify(digits_onnx, runtime=ALL)
    assert (parity.runtime, parity.ok) == ("reference", False)
    assert report_parity(digits_onnx, runtime=ALL).exit_code == 1


def test_furthest():
    def parity(name, ok, error):
        return Parity(name, error, error, Tolerance(0.0, 0.0), (1,), ok)

    fine, worse, wrong = parity("a", True, 1e-7), parity("b", True, 1e-6), parity("c", False, 1e-9)
    assert furthest([fine, worse]) is worse
    assert furthest([fine, wrong, worse]) is wrong
    assert furthest([wrong, parity("d", False, np.inf)]).runtime == "d"


# --- what doesn't go together -----------------------------------------------------------------


@pytest.mark.parametrize("name", FILE_RUNTIMES)
def test_onnx_runtimes_take_no_folder(digits_folder, name):
    with pytest.raises(UsageError, match=f"'{name}' takes ONNX files only") as caught:
        verify(digits_folder, runtime=name)
    assert caught.value.hint == "For SavedModel folders there is savedmodel."


def test_savedmodel_takes_no_file(digits_onnx):
    with pytest.raises(UsageError, match="'savedmodel' takes SavedModel folders only") as caught:
        verify(digits_onnx, runtime="savedmodel")
    assert caught.value.hint == f"For ONNX files there is {', '.join(FILE_RUNTIMES)}."


def test_unknown_runtime_lists_the_known(digits_onnx):
    with pytest.raises(UsageError) as caught:
        verify(digits_onnx, runtime="abacus")
    assert caught.value.message == f"unknown runtime 'abacus'; there is {', '.join(RUNTIMES)}, all"


@pytest.mark.parametrize("runtime", [None, ALL, "reference"])
def test_nothing_to_verify(tmp_path, runtime):
    with pytest.raises(LoadError, match="there is no such file or folder"):
        verify(tmp_path / "absent", runtime=runtime)


@pytest.mark.parametrize("name", ["absolute", "relative"])
def test_negative_tolerances(digits_onnx, name):
    with pytest.raises(UsageError, match=f"the {name} tolerance must be zero or above, not -1"):
        verify(digits_onnx, **{name: -1})


def test_other_tolerances_are_those_of_the_parity(digits_onnx):
    parity = verify(digits_onnx, absolute=0.5, relative=0.25)
    assert parity.tolerance == Tolerance(0.5, 0.25)
    assert not verify(digits_onnx, absolute=0.0, relative=0.0).ok


def test_a_reference_elsewhere(digits_onnx, tmp_path):
    moved = shutil.move(reference_path(digits_onnx), tmp_path / "ref.npz")
    with pytest.raises(LoadError, match="there is no such file"):
        verify(digits_onnx)
    assert verify(digits_onnx, moved).ok
    assert verifying.measure_parity(
        open_runtime(digits_onnx), digits_onnx, load_reference(moved)
    ).ok


def test_a_runtime_for_what_is_not_there_yet(tmp_path):
    assert open_runtime(tmp_path / "new.onnx").name == "onnxruntime"
