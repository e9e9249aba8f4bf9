"""What stays unimported, and what is said where a package is missing."""

import subprocess
import sys

import numpy as np
import pytest

HEAVY = {"tensorflow", "tf_keras", "tf2onnx", "keras"}
RUNNING = {"onnx", "onnxruntime", "openvino", "cv2"}
LIGHT = {"numpy", "pydantic", "rich", *RUNNING}

SAY_IMPORTED = """
import sys
{code}
print("IMPORTED", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""

# Hides packages as if they weren't installed, also from find_spec.
HIDE = """
import sys
hidden = set({hidden!r})
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *args)
sys.meta_path[:] = [Hiding(f) if hasattr(f, "find_spec") else f for f in sys.meta_path]
from layerswap.__main__ import run
code = run(sys.argv[1:])
print("IMPORTED", *sorted({{name.partition(".")[0] for name in sys.modules}}))
sys.exit(code)
"""


def python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def imported(result):
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("IMPORTED")]
    return set(line.split()[1:])


def run_command(*arguments):
    code = f"from layerswap.__main__ import run; assert run({list(map(str, arguments))!r}) == 0"
    result = python(SAY_IMPORTED.format(code=code))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return imported(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["verify", "--help"],
        ["plan", "-h"],
        ["rule", "-h"],
    ],
    ids=" ".join,
)
def test_help_imports_next_to_nothing(arguments):
    names = run_command(*arguments)
    assert "click" in names
    assert not names & (HEAVY | LIGHT)


def test_import_layerswap_imports_next_to_nothing():
    names = imported(python(SAY_IMPORTED.format(code="import layerswap; dir(layerswap)")))
    assert "layerswap" in names
    assert not names & (HEAVY | LIGHT | {"click"})


def test_the_policy_the_errors_and_the_records_need_no_framework():
    code = "from layerswap import LayerswapError, Policy, Report; Policy(groups=4)"
    names = imported(python(SAY_IMPORTED.format(code=code)))
    assert "pydantic" in names
    assert not names & (HEAVY | RUNNING | {"rich"})


def test_the_names_of_the_runtimes_need_nothing():
    code = "from layerswap.runtimes import ALL, RUNTIMES; assert ALL not in RUNTIMES"
    assert not imported(python(SAY_IMPORTED.format(code=code))) & (HEAVY | LIGHT)


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_verify_leaves_tensorflow_out(digits_onnx, runtime):
    names = run_command("verify", digits_onnx, "--runtime", runtime)
    assert "onnx" in names
    assert not names & HEAVY
    assert ("onnxruntime" in names) == (runtime == "onnxruntime")


PACKAGES = {
    "onnxruntime": {"onnx", "onnxruntime"},
    "openvino": {"onnx", "openvino"},
    "opencv": {"onnx", "cv2"},
    "reference": {"onnx"},
    "all": RUNNING,
}
if np.lib.NumpyVersion(np.__version__) < "2.0.0":
    del PACKAGES["opencv"]  # opencv-python-headless 5 needs NumPy 2
    PACKAGES["all"] = RUNNING - {"cv2"}


@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_runtime_for_files_imports_no_other_and_no_tensorflow(digits_onnx, runtime):
    code = (
        f"import layerswap; assert layerswap.verify({str(digits_onnx)!r}, runtime={runtime!r}).ok"
    )
    result = python(SAY_IMPORTED.format(code=code))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert imported(result) & (HEAVY | RUNNING) == PACKAGES[runtime]


def test_a_runtime_for_folders_imports_no_keras_and_no_onnx(digits, tmp_path):
    import layerswap as ls

    assert ls.convert(digits, tmp_path / "model").ok
    code = f"import layerswap; assert layerswap.verify({str(tmp_path / 'model')!r}).ok"
    result = python(SAY_IMPORTED.format(code=code))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    names = imported(result)
    assert "tensorflow" in names
    # Keras 3, which TensorFlow brings along, takes OpenCV where it finds it.
    assert not names & (RUNNING - {"cv2"} | {"tf_keras", "tf2onnx"})


KERAS = "reading and writing Keras models needs the package '{}', which is not installed"
RUNTIME = "running an ONNX file needs the package '{}', which is not installed"
COMMANDS = {
    "plan": ["plan", "in.keras"],
    "convert": ["convert", "in.keras", "out.onnx"],
    "demo": ["demo"],
}


def assert_missing(result, package, extra, message, folder):
    assert result.returncode == 3
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert lines == [
        f"Error: {message.format(package)}",
        f"Install it with: pip install 'layerswap[{extra}]'",
    ]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("package", ["tensorflow", "tf_keras", "tf2onnx"])
def test_the_extra_keras_is_missing(tmp_path, command, package):
    """Said before anything is read: the file named doesn't exist, and nothing is imported."""
    others = {"tensorflow", "tf_keras", "tf2onnx"} - {package}
    result = python(HIDE.format(hidden=[package]), *COMMANDS[command], cwd=tmp_path)
    assert_missing(result, package, "keras", KERAS, tmp_path)
    assert not imported(result) & others


@pytest.mark.parametrize("command", ["convert", "demo"])
def test_the_extra_runtime_is_missing(tmp_path, command):
    """Said before the model is loaded: the file named doesn't exist."""
    result = python(HIDE.format(hidden=["onnxruntime"]), *COMMANDS[command], cwd=tmp_path)
    assert_missing(result, "onnxruntime", "runtime", RUNTIME, tmp_path)
    assert not imported(result) & {"tf_keras", "tf2onnx"}


def test_verify_without_any_extra(digits_onnx, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    code = HIDE.format(hidden=["tensorflow", "tf_keras", "tf2onnx", "onnxruntime"])
    result = python(code, "verify", digits_onnx, cwd=folder)
    assert_missing(result, "onnxruntime", "runtime", RUNTIME, folder)
    result = python(code, "verify", digits_onnx, "--runtime", "reference", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "reference reproduces the Keras model" in result.stdout
