"""The demonstration: what it prints is computed, what it writes is right, failures are clear."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tf_keras
from click.testing import CliRunner
from rich.console import Console

import layerswap as ls
from layerswap import demo
from layerswap.cli import cli
from layerswap.errors import ExportError, LayerswapError, LoadError

FIXTURES = Path(__file__).parents[1] / "fixtures"
WAYS = ("reset", "copied", "matched", "calibrated")


def run(folder, finetune=False):
    """What the demonstration prints."""
    printed = io.StringIO()
    demo.run_demo(finetune, folder, Console(file=printed, width=120))
    return printed.getvalue()


def percentages(line):
    return [float(number) for number in re.findall(r"(-?[\d.]+)%", line)]


def accuracies(printed):
    """Accuracy by row: `BN`, and `auto` or `Keras` with the way to set γ and β."""
    found = {}
    for line in printed.splitlines():
        if line.startswith("│ BN, as trained"):
            (found["BN"],) = percentages(line)
        elif line.startswith("│ GN"):
            choice = "auto" if "(auto)" in line else "Keras"
            (way,) = (way for way in WAYS if way in line)
            found[choice, way], _same, _drift = percentages(line)
    return found


def curves(printed):
    """The rows of the second table: steps and one accuracy for each model."""
    rows = (re.match(r"│ +(\d+) │(.*)", line) for line in printed.splitlines())
    return {int(row[1]): percentages(row[2]) for row in rows if row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parent") / "new" / "output"


@pytest.fixture(scope="module")
def printed(folder):
    """Of a run with few steps of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FINETUNE_STEPS", 4)
        patch.setattr(demo, "FINETUNE_EVERY", 2)
        return run(folder, finetune=True)


def test_matching_keeps_the_accuracy_and_the_naive_ways_lose_it(printed):
    found = accuracies(printed)
    assert found.keys() == {"BN", *((choice, way) for choice in ("auto", "Keras") for way in WAYS)}
    assert found["BN"] >= 98.5
    for choice in ("auto", "Keras"):
        assert found[choice, "matched"] >= found["BN"] - 2
        assert found[choice, "calibrated"] >= found["BN"] - 1
        assert found[choice, "reset"] <= found["BN"] - 20
        assert found[choice, "copied"] <= found["BN"] - 20


def test_the_accuracies_are_those_of_the_models(printed):
    digits = np.load(FIXTURES / "digits_test.npz")
    model = tf_keras.models.load_model(FIXTURES / "digits_bn.keras")
    ways = {"BN": model, ("auto", "matched"): ls.swap(model).model}
    for row, judged in ways.items():
        right = np.asarray(judged(digits["x"])).argmax(-1) == digits["y"]
        assert accuracies(printed)[row] == pytest.approx(100 * right.mean(), abs=0.051)


def test_the_training_starts_where_the_table_ends(printed):
    found, trained = accuracies(printed), curves(printed)
    assert list(trained) == [0, 2, 4]
    assert trained[0] == [found["BN"], found["auto", "reset"], found["auto", "matched"]]
    assert "batch size 2" in printed
    assert "demo --finetune" not in printed


def test_the_onnx_file_is_written_and_verified(printed, folder):
    assert {path.name for path in folder.iterdir()} == {"digits_gn.onnx", "digits_gn.onnx.ref.npz"}
    parity = ls.verify(folder / "digits_gn.onnx")
    assert parity.ok
    text = " ".join(printed.split())
    assert f"Exported to {folder / 'digits_gn.onnx'}" in text
    assert "Verified in onnxruntime at batch sizes 1, 3:" in text
    assert f"largest difference from Keras {parity.max_absolute:.1e}" in text


def test_a_second_run_replaces_what_the_first_wrote(printed, folder):
    for path in folder.iterdir():
        path.write_bytes(b"old")
    again = run(folder)
    assert accuracies(again) == accuracies(printed)
    assert curves(again) == {}
    assert "demo --finetune" in again
    assert {path.name for path in folder.iterdir()} == {"digits_gn.onnx", "digits_gn.onnx.ref.npz"}
    assert ls.verify(folder / "digits_gn.onnx").ok


def refusal(folder):
    """The error of a run that fails; nothing was printed before."""
    printed = io.StringIO()
    with pytest.raises(LayerswapError) as caught:
        demo.run_demo(output_dir=folder, console=Console(file=printed))
    assert printed.getvalue() == ""
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("name", [demo.MODEL_NAME, demo.DIGITS_NAME])
def test_missing_files(tmp_path, monkeypatch, name):
    (tmp_path / "fixtures").mkdir()
    for other in {demo.MODEL_NAME, demo.DIGITS_NAME} - {name}:
        (tmp_path / "fixtures" / other).symlink_to(FIXTURES / other)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "layerswap" / "demo.py"))
    error = refusal(tmp_path / "output")
    assert isinstance(error, LoadError)
    assert error.where == name
    assert "Install layerswap again" in error.hint
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_bytes(b"precious")
    error = refusal(tmp_path / "file" / below)
    assert isinstance(error, ExportError)
    assert "--output-dir" in error.hint
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_the_option_that_the_hint_names_exists(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(demo, "run_demo", lambda finetune, folder: folders.append(folder))
    result = CliRunner().invoke(cli, ["demo", "--output-dir", str(tmp_path)])
    assert result.exception is None
    assert folders == [tmp_path]


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to any
    error = refusal(tmp_path)
    assert isinstance(error, ExportError)
    assert "permissions" in error.hint
    assert list(tmp_path.iterdir()) == []
