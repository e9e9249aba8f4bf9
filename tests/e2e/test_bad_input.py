"""Whatever is wrong with input, output or machine: one message, its exit code, nothing harmed.

Every test looks at the whole working folder afterwards, hidden files included.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import tf_keras
from tf_keras import layers

from layerswap import conversion
from layerswap.__main__ import run

OUTPUTS = {"keras": "out.keras", "h5": "out.h5", "savedmodel": "out", "onnx": "out.onnx"}
every_format = pytest.mark.parametrize("kind", OUTPUTS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fail(here, capfd):
    """Runs a command that has to fail with one message and leave the folder as it was."""

    def call(*arguments, code):
        before = contents(here)
        capfd.readouterr()
        got = run(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert got == code, err
        assert contents(here) == before
        assert out == ""
        return message(err)

    return call


def contents(folder):
    """Every file below the folder with its bytes, hidden ones and links included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def message(err):
    """The one message among the lines that name the stages."""
    lines = [line for line in err.splitlines() if line and not line.endswith(" ...")]
    assert "Traceback" not in err
    assert [line.startswith("Error: ") for line in lines].count(True) == 1, err
    assert lines[0].startswith("Error: ")
    return "\n".join(lines)


def save(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HDF5 file")
        tf_keras.models.save_model(model, path)
    return path


def small(*more):
    return tf_keras.Sequential(
        [layers.Input((4, 4, 16)), layers.BatchNormalization(name="norm"), *more]
    )


class Unregistered(layers.Layer):
    """A custom layer that the loader isn't told of."""


# --- input ----------------------------------------------------------------------------------


def not_a_model(path):
    path.write_text("print('hello')\n")


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    save(small(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_config(path):
    if path.suffix == ".h5":
        save(small(), path)
        with h5py.File(path, "a") as file:
            del file.attrs["model_config"]
    else:
        rewritten(path, "config.json")


def without_weights(path):
    if path.suffix == ".h5":
        save(small(), path)
        with h5py.File(path, "a") as file:
            del file["model_weights"]
    else:
        rewritten(path, "model.weights.h5")


def rewritten(path, left_out):
    whole = save(small(), path.with_name("whole.keras"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            if name != left_out:
                archive.writestr(name, source.read(name))
    whole.unlink()


def of_keras_3(path):
    config = {"class_name": "Sequential", "config": {"layers": []}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.5.0"}))
        archive.writestr("model.weights.h5", b"")


def with_unknown_layer(path):
    save(small(Unregistered()), path)


FILES = [
    (not_a_model, "in.keras", "is no complete .keras file", "Copy or download it again"),
    (not_a_model, "in.h5", "is no complete .h5 file", "Copy or download it again"),
    (not_a_model, "in.txt", "the suffix '.txt' is not that of a Keras model", "SavedModel folder"),
    (empty, "in.keras", "is no complete .keras file", "Copy or download it again"),
    (empty, "in.h5", "is no complete .h5 file", "Copy or download it again"),
    (truncated, "in.keras", "is no complete .keras file", "Copy or download it again"),
    (truncated, "in.h5", "", ""),
    (without_config, "in.keras", "has no config.json", "model.save()"),
    (without_config, "in.h5", "holds weights only, no model configuration", "load_weights()"),
    (without_weights, "in.keras", "has no model.weights.h5", "model.save()"),
    (without_weights, "in.h5", "has no weights", "model.save()"),
    (of_keras_3, "in.keras", "was written by Keras 3.5.0, not tf_keras", "TF_USE_LEGACY_KERAS=1"),
    (with_unknown_layer, "in.keras", "'Unregistered'", "--custom-objects"),
    (with_unknown_layer, "in.h5", "'Unregistered'", "--custom-objects"),
]


@pytest.mark.parametrize(
    ("make", "name", "problem", "remedy"), FILES, ids=[f"{f.__name__}-{n}" for f, n, *_ in FILES]
)
def test_a_file_that_is_no_model(fail, here, make, name, problem, remedy):
    make(here / name)
    for arguments in (["plan", name], ["convert", name, "out.onnx"]):
        text = fail(*arguments, code=3)
        assert text.startswith(f"Error: {name}: ")
        assert problem in text
        assert remedy in text


def test_a_path_that_is_not_there(fail, here):
    for arguments in (["plan", "absent.keras"], ["convert", "absent", "out.onnx"]):
        text = fail(*arguments, code=3)
        assert text == f"Error: {arguments[1]}: there is no such file or folder"


def test_a_folder_that_is_no_saved_model(fail, here):
    (here / "folder").mkdir()
    (here / "folder" / "thesis.tex").write_text("years")
    assert "is a folder but no SavedModel" in fail("plan", "folder", code=3)


def test_a_saved_model_without_its_variables(fail, here, digits):
    shutil.copytree(digits.with_name("digits_bn_savedmodel"), here / "in")
    shutil.rmtree(here / "in" / "variables")
    assert fail("convert", "in", "out.onnx", code=3).startswith("Error: in: ")


def nonfinite(path, value):
    model = small()
    model.get_layer("norm").moving_variance.assign(np.full(16, value))
    return save(model, path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(fail, here, value, capfd):
    nonfinite(here / "in.keras", value)
    assert run(["plan", "in.keras", "-q"]) == 1
    out = capfd.readouterr().out
    assert "warning [nonfinite-weights]" in out
    assert "16 of 16 values are NaN or Inf" in out
    text = fail("convert", "in.keras", "out.onnx", code=1)
    assert "norm (BatchNormalization)" in text
    assert "[nonfinite-weights]" in text


GROUPS = ["0", "-5", "3.5", "abc"]


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_that_are_none(fail, here, tiny, groups):
    text = fail("convert", tiny, "out.onnx", "--groups", groups, code=2)
    assert text.startswith("Error: groups must be a positive integer, -1")
    assert text.endswith(f"not {groups}" if groups != "abc" else "not 'abc'")


def test_more_groups_than_channels(fail, here):
    save(small(), here / "in.keras")
    text = fail("convert", "in.keras", "out.onnx", "--groups", 64, code=1)
    assert "norm (BatchNormalization)" in text
    assert "1, 2, 4, 8, 16" in text, "its legal groups"


def test_no_batchnorm_at_all(fail, here, capfd):
    save(tf_keras.Sequential([layers.Input((3,)), layers.Dense(2)]), here / "in.keras")
    assert run(["plan", "in.keras", "-q"]) == 0
    expected = "in.keras: no BatchNormalization; there is nothing to swap\n"
    assert capfd.readouterr().out == expected
    text = fail("convert", "in.keras", "out.onnx", code=1)
    assert "no BatchNormalization: there is nothing to convert" in text
    assert "--allow-no-batchnorm" in text
    assert run(["convert", "in.keras", "out.onnx", "-q", "--allow-no-batchnorm"]) == 0
    assert (here / "out.onnx").is_file()


# --- output ---------------------------------------------------------------------------------


@every_format
def test_an_existing_output_is_kept(fail, here, tiny, kind):
    if kind == "savedmodel":
        (here / "out").mkdir()
        (here / "out" / "saved_model.pb").write_bytes(b"precious")
    else:
        (here / OUTPUTS[kind]).write_bytes(b"precious")
    text = fail("convert", tiny, OUTPUTS[kind], code=2)
    assert text.startswith(f"Error: {OUTPUTS[kind]}: exists already\nTo replace it: --force")


def test_an_existing_reference_is_kept_and_said_before_the_work(fail, here, tiny, monkeypatch):
    (here / "out.onnx.ref.npz").write_bytes(b"precious")
    monkeypatch.setattr(conversion, "load", lambda *_, **__: pytest.fail("loaded"))
    text = fail("convert", tiny, "out.onnx", code=2)
    assert text.startswith("Error: out.onnx.ref.npz: exists already\n")


def test_a_folder_of_something_else_is_never_replaced(fail, here, tiny):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years")
    text = fail("convert", tiny, "out", "--force", code=2)
    assert "is a folder but no SavedModel, and is never replaced" in text
    (here / "out.onnx").mkdir()
    assert "is a folder" in fail("convert", tiny, "out.onnx", "--force", code=2)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("absent/out.onnx", "does not exist"),
        ("file/out.onnx", "file' does not exist"),
        ("n" * 300 + ".onnx", "File name too long"),
        ("/dev/null/out.onnx", "'/dev/null' does not exist"),
    ],
)
def test_an_output_that_can_not_be(fail, here, tiny, target, problem):
    (here / "file").write_text("")
    text = fail("convert", tiny, target, code=3)
    assert text.startswith(f"Error: {target}: ")
    assert problem in text


def test_a_device_is_no_output(fail, here, tiny):
    os.symlink("/dev/full", here / "out.onnx")
    assert "is not a regular file" in fail("convert", tiny, "out.onnx", "--force", code=2)


def test_a_folder_without_permission(fail, here, tiny, monkeypatch):
    """As for an ordinary user: root may write everywhere, whatever the mode says."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    text = fail("convert", tiny, "out.onnx", code=3)
    assert f"the folder '{here}' can't be written to" in text
    assert "Change its permissions" in text


@pytest.mark.parametrize("kind", ["keras", "h5", "onnx"])
def test_a_read_only_file_system(fail, here, tiny, monkeypatch, kind):
    """Which `os.access` may well not notice."""
    monkeypatch.setattr(os, "mkdir", guarded(os.mkdir, here))
    monkeypatch.setattr("io.open", guarded(open, here))
    text = fail("convert", tiny, OUTPUTS[kind], code=3)
    assert text.startswith(f"Error: {OUTPUTS[kind]}: can't be written: Read-only file system\n")


def guarded(function, folder):
    """The function, unless it would make something in the folder."""

    def call(path, *arguments, **options):
        inside = isinstance(path, str | Path) and Path(path).absolute().is_relative_to(folder)
        if inside and not Path(path).exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return function(path, *arguments, **options)

    return call


@contextmanager
def limited_files(size):
    """Within the block the kernel lets no file grow beyond `size`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_format
@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_fills_up(fail, here, tiny, kind, force):
    if force:
        assert run(["convert", str(tiny), OUTPUTS[kind], "-q", "--groups", "1"]) == 0
    with limited_files(3_000):
        text = fail("convert", tiny, OUTPUTS[kind], *(["--force"] * force), code=3)
    assert text.startswith(f"Error: {OUTPUTS[kind]}: ")


def test_a_report_for_which_there_is_no_room(fail, here, tiny, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    text = fail("plan", tiny, "--output-file", "plan.txt", code=3)
    assert text.startswith("Error: plan.txt: can't be written: No space left on device\n")
    assert "Free some space" in text


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_no_part_of_an_artifact_takes_its_place_alone(here, tiny, capsys, monkeypatch, error):
    """The last rename fails; the reference is in its place by then."""
    for name in ("out.onnx", "out.onnx.ref.npz"):
        (here / name).write_bytes(b"old")
    stock = os.replace

    def replace(source, target):
        if Path(target) == here / "out.onnx" and Path(source).name == "out.onnx":
            assert (here / "out.onnx.ref.npz").read_bytes() != b"old"
            monkeypatch.undo()
            raise error
        stock(source, target)

    monkeypatch.setattr(os, "replace", replace)
    code = run(["convert", str(tiny), str(here / "out.onnx"), "-q", "--force"])
    assert code == (3 if isinstance(error, OSError) else 130)
    assert contents(here) == {"out.onnx": b"old", "out.onnx.ref.npz": b"old"}


# --- interrupts -----------------------------------------------------------------------------

STAGES = ("load", "plan", "swap", "export", "verify")


@pytest.mark.parametrize("kind", ["onnx", "savedmodel"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_at_any_stage(here, tiny, capsys, monkeypatch, kind, stage):
    from layerswap.cli.reporting import Output

    @contextmanager
    def interrupting(self):
        def say(name):
            if name == stage:
                raise KeyboardInterrupt

        yield say

    monkeypatch.setattr(Output, "progress", interrupting)
    assert run(["convert", str(tiny), OUTPUTS[kind]]) == 130
    err = capsys.readouterr().err
    assert err.strip() == "Interrupted; nothing unfinished is left behind."
    assert contents(here) == {}


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "layerswap", *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("number", "moment", "target"),
    [
        (signal.SIGINT, "load ...", "out.onnx"),
        (signal.SIGINT, "plan ...", "out.onnx"),
        (signal.SIGINT, "export ...", "out"),
        (signal.SIGTERM, "verify ...", "out.onnx"),
    ],
)
def test_a_signal_while_it_works(here, tiny, number, moment, target):
    """While packages are imported (load), or in the middle of another stage."""
    process = start(here, "convert", tiny, target)
    assert f"{moment}\n" in iter(process.stderr.readline, "")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 143), err
    lines = [line for line in err.splitlines() if line and not line.endswith(" ...")]
    assert lines == ["Interrupted; nothing unfinished is left behind."]
    assert out == ""
    assert contents(here) == {}


def test_an_interrupt_that_a_package_turns_into_an_import_error(here):
    """As onnxruntime does: it must not be taken for a missing package."""
    (here / "onnxruntime.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError('broken') from error\n"
    )
    (here / "m.onnx").touch()
    process = start(here, "verify", "m.onnx")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Interrupted; nothing unfinished is left behind.\n")


# --- again, and at once -----------------------------------------------------------------------


def test_running_twice_gives_the_same_bytes(here, tiny, capsys):
    assert run(["convert", str(tiny), "out.onnx", "-q"]) == 0
    first = contents(here)
    assert set(first) == {"out.onnx", "out.onnx.ref.npz"}
    assert run(["convert", str(tiny), "out.onnx", "-q", "--force"]) == 0
    assert contents(here) == first


def test_two_at_once(here, tiny):
    """In one folder, to different outputs."""
    before = tiny.read_bytes()
    both = [start(here, "convert", tiny, f"{name}.onnx", "-q") for name in ("a", "b")]
    for process in both:
        _, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, "")
    files = contents(here)
    assert set(files) == {"a.onnx", "a.onnx.ref.npz", "b.onnx", "b.onnx.ref.npz"}
    assert files["a.onnx"] == files["b.onnx"]
    assert tiny.read_bytes() == before
