"""The commands that take samples: `convert --samples`, `--distill` and `advise`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from layerswap.__main__ import run
from layerswap.cli.converting import convert
from layerswap.cli.reporting import Output
from layerswap.records import Report, from_json
from layerswap.samples import MOST

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODULE = """
import numpy as np
import tensorflow as tf

X = np.load({path!r})

def dataset():
    return tf.data.Dataset.from_tensor_slices(X[:32]).batch(8)

def short():
    yield X[:8]
    raise OSError("the disk is gone")

def slow():
    import time
    for x in X:
        time.sleep(0.2)
        yield x

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a trained model and its samples."""
    shutil.copy(FIXTURES / "digits_bn.keras", tmp_path / "digits.keras")
    samples = np.load(FIXTURES / "digits_test.npz")["x_train"][:64]
    np.save(tmp_path / "x.npy", samples)
    # A name of its own: modules are imported once per process.
    module = f"data_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{module}.py").write_text(MODULE.format(path=str(tmp_path / "x.npy")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return module


@pytest.fixture
def command(here, capsys):
    """Runs a command; gives exit code, stdout and stderr."""

    def call(*arguments):
        code = run(list(map(str, arguments)))
        return (code, *capsys.readouterr())

    return call


def accuracy(path):
    digits = np.load(FIXTURES / "digits_test.npz")
    scores = tf_keras.models.load_model(path).predict(digits["x"], verbose=0)
    return float((scores.argmax(axis=1) == digits["y"]).mean())


def report_of(command, *arguments):
    code, out, err = command(*arguments, "--report-format", "json")
    assert code == 0, err
    return from_json(Report, out)


def test_samples_and_distillation_keep_more_and_the_report_says_so(command):
    found = report_of(
        command, "convert", "digits.keras", "out.keras", "--groups", "32", "--on-indivisible",
        "nearest", "--samples", "x.npy", "--distill", "20",
    )  # fmt: skip
    calibration = found.calibration
    assert (calibration.samples, calibration.held_out) == (48, 16)
    assert calibration.error <= calibration.error_match
    assert len(calibration.layers) == len(found.plan.swaps) == 8
    assert {fit.path for fit in calibration.layers} == {s.site.path for s in found.plan.swaps}
    assert {"read samples", "calibrate", "distill"} <= found.seconds.keys()
    naive = report_of(command, "convert", "digits.keras", "reset.keras", "--weights", "reset")
    assert naive.calibration is None
    assert accuracy("out.keras") > 0.95 > 0.5 > accuracy("reset.keras")


def test_the_text_names_samples_errors_and_agreement(command):
    code, out, err = command("convert", "digits.keras", "out.keras", "--samples", "x.npy")
    assert code == 0
    assert re.search(r"^calibrated \d of 8 layers on 48 samples; on 16 others ", out, re.MULTILINE)
    assert re.search(r"^same arg-max as BN on these: [\d.]+% without", out, re.MULTILINE)
    assert "calibrate ...\n" in err


def test_a_function_of_a_module_gives_the_samples(command, here):
    found = report_of(command, "convert", "digits.keras", "o.keras", "--samples", f"{here}:dataset")
    assert found.calibration.samples == 24
    few = [finding for finding in found.findings if finding.code == "few-samples"]
    assert "32 samples" in few[0].message


def test_the_default_of_max_samples_is_the_library_s():
    (option,) = [parameter for parameter in convert.params if parameter.name == "max_samples"]
    assert option.default == MOST


def test_max_samples_bounds_them(command):
    found = report_of(
        command, "convert", "digits.keras", "out.keras", "--samples", "x.npy", "--max-samples", 16
    )
    assert (found.calibration.samples, found.calibration.held_out) == (12, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--samples", "none.npy"], 3, "no such file"),
        (["--samples", "digits.keras"], 2, "suffix '.keras'"),
        (["--samples", "MODULE:missing"], 2, "no attribute 'missing'"),
        (["--samples", "nowhere_at_all:x"], 2, "No module named"),
        (["--samples", "MODULE:number"], 2, "can't be read from a int"),
        (["--samples", "MODULE:short"], 3, "OSError after 8: the disk is gone"),
        (["--samples", "wrong.npy"], 2, "samples of shape (9, 8, 1), but input 'image' takes"),
        (["--samples", "nan.npy"], 3, "1 values of the samples for input 'image' are NaN"),
        (["--samples", "few.npy"], 3, "too few samples: 5"),
        (["--samples", "damaged.npy"], 3, "can't be read as samples"),
        (["--distill", "10"], 2, "distill needs samples"),
        (["--samples", "x.npy", "--distill", "-1"], 2, "distill must be a whole number"),
        (["--samples", "x.npy", "--max-samples", "3"], 2, "max_samples must be"),
        (["--samples", "x.npy", "--weights", "reset"], 2, "nothing to fit"),
    ],
)
def test_bad_samples_end_with_one_message_and_no_output(command, here, arguments, code, says):
    x = np.load("x.npy")
    np.save("wrong.npy", np.zeros((20, 9, 8, 1)))
    np.save("few.npy", x[:5])
    broken = x.copy()
    broken[3, 0, 0, 0] = np.nan
    np.save("nan.npy", broken)
    Path("damaged.npy").write_bytes(Path("x.npy").read_bytes()[:40])
    given = [text.replace("MODULE", here) for text in arguments]
    found, out, err = command("convert", "digits.keras", "out.onnx", "-q", *given)
    assert found == code, err
    assert says in err.replace("input_1", "image"), err
    assert out == ""
    assert "Traceback" not in err
    assert not [path for path in Path().iterdir() if path.name.startswith((".", "out"))]


def test_advice_is_measured_with_samples_and_predicted_without(command):
    measured = report_of(command, "advise", "digits.keras", "--samples", "x.npy").advice
    assert measured.measured
    assert measured.verdict == "swap"
    assert len(measured.layers) == 8
    for layer in measured.layers:
        errors = {choice.groups: choice.error for choice in layer.alternatives}
        assert layer.error == errors[layer.groups]
        assert errors[1] <= errors[layer.channels]
    predicted = report_of(command, "advise", "digits.keras").advice
    assert not predicted.measured
    assert [layer.path for layer in predicted.layers] == [layer.path for layer in measured.layers]


def test_what_is_advised_can_be_done(command):
    """The options that the text names, given to `convert`, are what was measured."""
    options = ["--samples", "x.npy", "--groups", "32", "--on-indivisible", "nearest"]
    advice = report_of(command, "advise", "digits.keras", *options)
    _, out, _ = command("advise", "digits.keras", *options)
    assert "options that do this:" in out
    import shlex

    lines = out.split("options that do this:\n")[1].splitlines()
    own = [shlex.split(line) for line in lines if line.startswith("  --overrides")]
    done = report_of(
        command,
        "convert",
        "digits.keras",
        "out.keras",
        *options,
        *[word for o in own for word in o],
    )
    wanted = {layer.path: layer.groups for layer in advice.advice.layers}
    assert {swap.site.path: swap.groups for swap in done.plan.swaps} == wanted
    assert done.calibration.error == pytest.approx(advice.calibration.error, rel=1e-3)


@pytest.mark.parametrize("stage", ["read samples", "swap", "calibrate", "distill", "export"])
def test_an_interrupt_at_any_stage_leaves_nothing(command, monkeypatch, stage):
    @contextmanager
    def interrupting(self):
        def say(name, done=0, total=0):
            if name == stage and done >= total // 2:
                raise KeyboardInterrupt

        yield say

    monkeypatch.setattr(Output, "progress", interrupting)
    code, _, err = command(
        "convert", "digits.keras", "out.onnx", "--samples", "x.npy", "--distill", "4"
    )
    assert code == 130
    assert err.strip().endswith("Interrupted; nothing unfinished is left behind.")
    assert not [path for path in Path().iterdir() if path.name.startswith((".", "out"))]
    assert threading.active_count() < 8  # no run of a model waits for its turn for ever


def test_an_interrupt_while_samples_are_read_leaves_nothing(here):
    command = [sys.executable, "-m", "layerswap", "convert", "digits.keras", "out.onnx"]
    with subprocess.Popen(
        [*command, "--samples", f"{here}:slow"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        # Whoever started the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stderr:
            if line.startswith("read samples"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert "Interrupted; nothing unfinished is left behind." in rest
    assert not [path for path in Path().iterdir() if path.name.startswith((".", "out"))]
