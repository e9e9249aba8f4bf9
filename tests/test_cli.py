"""The commands, run in this process; what only a process of its own shows, in one."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

from layerswap import verifying
from layerswap.__main__ import run
from layerswap.errors import LoadError
from layerswap.policy import Policy
from layerswap.records import Report, SwapPlan, from_json

OUTPUTS = {"keras": "out.keras", "h5": "out.h5", "savedmodel": "out", "onnx": "out.onnx"}
FIELDS = Policy.model_fields
SUMMARY = "1 BatchNormalization layers: 1 to swap, 0 skipped, 0 refused"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(here, capsys):
    """Runs a command; gives exit code, stdout and stderr."""

    def call(*arguments):
        code = run(list(map(str, arguments)))
        return (code, *capsys.readouterr())

    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HDF5 file")
        tf_keras.models.save_model(model, path)
    return path


def plan_json(command, *arguments):
    code, out, _ = command("plan", *arguments, "--report-format", "json")
    assert code in (0, 1)
    return from_json(SwapPlan, out)


# --- plan ---------------------------------------------------------------------------------


def test_plan_prints_a_table(command, tiny, here):
    code, out, err = command("plan", tiny)
    assert code == 0
    assert out.splitlines()[0].split() == [
        "layer", "class", "channels", "groups", "per", "group", "elements", "epsilon",
        "decision", "reason",
    ]  # fmt: skip
    assert out.endswith(f"{tiny}: {SUMMARY}\n")
    assert err == "load ...\nplan ...\n"
    assert names(here) == []


def test_plan_prints_json(command, tiny):
    code, out, _ = command("plan", tiny, "--report-format", "json", "--quiet")
    plan = from_json(SwapPlan, out)
    assert code == 0
    assert plan.source == str(tiny)
    assert len(plan.swaps) == len(plan.decisions) == 1


def test_plan_with_refusals_is_exit_code_1(command, tiny):
    code, out, err = command("plan", tiny, "--groups", 3)
    assert code == 1
    assert "[indivisible-channels]" in out
    assert "Error" not in err


POLICY_OPTIONS = {
    "groups": (["--groups", "2"], 2),
    "groups_auto": (["--groups", "auto"], "auto"),
    "groups_each": (["--groups", "-1"], -1),
    "channels_per_group": (["--channels-per-group", "8"], 8),
    "allow_degenerate": (["--allow-degenerate"], True),
    "on_indivisible": (["--on-indivisible", "nearest"], "nearest"),
    "epsilon": (["--epsilon", "0.25"], 0.25),
    "epsilon_carry": (["--epsilon", "carry"], "carry"),
    "adaptive_k": (["--adaptive-k", "0.5"], 0.5),
    "axis": (["--axis", "-1"], -1),
    "center": (["--center", "true"], True),
    "scale": (["--scale", "carry"], "carry"),
    "beta_initializer": (["--beta-initializer", "ones"], "ones"),
    "gamma_initializer": (["--gamma-initializer", '{"class_name": "Z"}'], {"class_name": "Z"}),
    "beta_regularizer": (["--beta-regularizer", "none"], "none"),
    "gamma_regularizer": (["--gamma-regularizer", "null"], "none"),
    "beta_constraint": (["--beta-constraint", "none"], "none"),
    "gamma_constraint": (["--gamma-constraint", "carry"], "carry"),
    "include": (["--include", "**", "--include", "*"], ["**", "*"]),
    "exclude": (["--exclude", "*"], ["*"]),
    "overrides": (["--overrides", "*", '{"groups": 4}'], {"*": {"groups": 4}}),
    "weights": (["--weights", "copy"], "copy"),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICY_OPTIONS)
def test_every_policy_option_reaches_the_plan(command, tiny, name):
    options, value = POLICY_OPTIONS[name]
    field = name if name in FIELDS else name.rpartition("_")[0]
    plan = plan_json(command, tiny, *options)
    assert plan.policy[field] == value
    default = plan_json(command, tiny).policy
    changed = {key for key in plan.policy if plan.policy[key] != default.get(key)}
    assert changed <= {field}
    if value not in ("auto", "carry"):
        assert changed == {field}


def test_no_policy_field_lacks_an_option():
    covered = {n if n in FIELDS else n.rpartition("_")[0] for n in POLICY_OPTIONS}
    assert covered == set(FIELDS)


def test_options_reach_the_decision(command, tiny):
    (swap,) = plan_json(command, tiny, "--groups", 8, "--epsilon", 0.5, "--weights", "copy").swaps
    assert (swap.groups, swap.config["epsilon"], swap.weights) == (8, 0.5, "copy")
    assert plan_json(command, tiny, "--exclude", "norm").skips[0].site.path == "norm"


@pytest.mark.parametrize("groups", ["0", "-5", "3.5", "abc", "true", "", "[2]"])
def test_groups_that_are_none(command, tiny, groups, here):
    code, out, err = command("plan", tiny, "--groups", groups)
    assert (code, out) == (2, "")
    assert err.startswith("Error: groups must be a positive integer, -1 (one group per channel)")


def test_config_is_read_and_the_options_win(command, tiny, here):
    Path("layerswap.toml").write_text("groups = 8\nepsilon = 0.5\n")
    Path("mine.toml").write_text("groups = 4\n")
    assert plan_json(command, tiny).policy["groups"] == 8
    policy = plan_json(command, tiny, "--config", "mine.toml").policy
    assert (policy["groups"], policy["epsilon"]) == (4, 0.5)
    assert plan_json(command, tiny, "--config", "mine.toml", "--groups", 2).policy["groups"] == 2


def test_a_bad_config_names_file_and_field(command, tiny, here):
    Path("mine.toml").write_text("gorups = 4\n")
    code, _, err = command("plan", tiny, "--config", "mine.toml")
    assert code == 2
    assert err == "Error: mine.toml: unknown field 'gorups'; did you mean 'groups'?\n"
    code, _, err = command("plan", tiny, "--config", "absent.toml")
    assert (code, err) == (3, "Error: absent.toml: can't be read: No such file or directory\n")


# --- convert --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUTPUTS)
def test_convert_to_every_format(command, tiny, here, kind):
    before = tiny.read_bytes()
    code, out, err = command("convert", tiny, OUTPUTS[kind])
    assert code == 0, err
    assert out.splitlines()[0] == f"{tiny}: {SUMMARY}"
    assert "variables: 4 copied, 2 fitted, 0 fresh" in out
    assert f"wrote {OUTPUTS[kind]} ({kind}" in out
    assert "reproduces the Keras model at batch size 1 and 3" in out
    assert err == "load ...\nplan ...\nswap ...\nexport ...\nverify ...\n"
    beside = [f"{OUTPUTS[kind]}.ref.npz"] if kind in ("onnx", "savedmodel") else []
    assert names(here) == [OUTPUTS[kind], *beside]
    assert tiny.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "target"),
    [("onnx", "model.bin"), ("h5", "model.hdf5"), ("savedmodel", "model.v1")],
)
def test_format_wins_over_the_suffix(command, tiny, here, kind, target):
    code, _, err = command("convert", tiny, target, "--format", kind, "-q")
    assert (code, err) == (0, "")
    if kind == "onnx":
        onnx.checker.check_model(onnx.load(target))
        assert command("verify", target)[0] == 0
    else:
        assert tf_keras.models.load_model(target).count_params() > 0


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("target", ["model.bin", "model", "model.onnx", "model.KERAS", "model.H5"])
def test_a_suffix_that_keras_doesn_t_read_is_said_at_once(command, tiny, here, kind, target):
    code, out, err = command("convert", tiny, target, "--format", kind)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"Error: {target}: a file in the format {kind} needs the suffix .{kind}\n"
    )
    assert names(here) == []


def test_an_unknown_suffix_names_the_known_ones(command, tiny, here):
    code, out, err = command("convert", tiny, "model.txt")
    assert (code, out) == (2, "")
    assert err.startswith("Error: model.txt: unknown suffix '.txt'\nUse .keras, .h5, .onnx or no")
    assert names(here) == []


@pytest.mark.parametrize("option", ["--format", "--report-format"])
def test_an_unknown_choice_is_usage(command, tiny, here, option):
    code, _, err = command("convert", tiny, "out.onnx", option, "pickle")
    assert code == 2
    assert "'pickle' is not one of" in err
    assert names(here) == []


def test_the_model_converted_is_the_one_that_python_converts(command, tiny, here):
    import layerswap as ls

    assert command("convert", tiny, "out.keras", "--groups", 2, "--epsilon", 0.1)[0] == 0
    expected = ls.swap(tiny, groups=2, epsilon=0.1).model
    got = tf_keras.models.load_model("out.keras")
    x = tf.constant(np.random.default_rng(0).normal(size=(2, *got.input_shape[1:])), tf.float32)
    np.testing.assert_allclose(got(x), expected(x), atol=1e-6)
    again = [m for m in got._flatten_layers() if isinstance(m, layers.GroupNormalization)]
    assert {layer.groups for layer in again} == {2}


def test_opset_is_the_file_s(command, tiny, here):
    assert command("convert", tiny, "out.onnx", "--opset", 17)[0] == 0
    assert [o.version for o in onnx.load("out.onnx").opset_import if not o.domain] == [17]


@pytest.mark.parametrize("opset", ["0", "-3", "9999", "x"])
def test_an_opset_that_isn_t_offered(command, tiny, here, opset):
    code, _, err = command("convert", tiny, "out.onnx", "--opset", opset, "-q")
    assert code == 2
    assert "opset" in err
    assert "Traceback" not in err
    assert names(here) == []


def test_the_input_is_never_replaced(command, tiny, here):
    shutil.copy(tiny, "mine.keras")
    before = Path("mine.keras").read_bytes()
    code, _, err = command("convert", "mine.keras", "./mine.keras", "--force", "-q")
    assert code == 2
    assert "would replace the model" in err
    assert Path("mine.keras").read_bytes() == before


def test_the_report_of_a_conversion_as_json(command, tiny, here):
    code, out, _ = command("convert", tiny, "out.onnx", "--report-format", "json")
    report = from_json(Report, out)
    assert code == report.exit_code == 0
    assert report.artifact.path == "out.onnx"
    assert report.artifact.bytes == Path("out.onnx").stat().st_size
    assert report.artifact.reference == "out.onnx.ref.npz"
    assert report.parity[0].ok
    assert report.drift.relative_error > 0
    assert list(report.seconds) == ["load", "plan", "swap", "export", "verify"]
    assert all(value >= 0 for value in report.seconds.values())


def test_no_verify_runs_nothing_but_still_writes_the_reference(command, tiny, here, monkeypatch):
    monkeypatch.setattr(verifying, "open_runtime", lambda: pytest.fail("opened"))
    code, out, err = command("convert", tiny, "out.onnx", "--no-verify")
    assert code == 0
    assert "reproduces" not in out
    assert "verify ..." not in err
    assert names(here) == ["out.onnx", "out.onnx.ref.npz"]
    monkeypatch.undo()
    assert command("verify", here / "out.onnx")[0] == 0


@pytest.mark.parametrize("options", [[], ["--no-verify"]])
def test_a_model_that_takes_text_has_no_reference_and_is_said_so(command, here, options):
    words = layers.Input((), dtype="string")
    x = layers.Embedding(4, 8)(layers.StringLookup(vocabulary=["a", "b", "c"])(words))
    save(tf_keras.Model(words, layers.GroupNormalization(2)(x)), "text.keras")
    code, out, _ = command("export", "text.keras", "out", *options)
    assert code == 0
    assert "no reference, so `verify` has nothing to compare with: " in out
    assert names(here) == ["out", "text.keras"]


@pytest.fixture
def failing(monkeypatch):
    """No runtime reproduces anything."""
    stock = verifying.measure_parity

    def fail(*arguments):
        return dataclasses.replace(
            stock(*arguments), ok=False, max_absolute=np.inf, max_relative=np.inf
        )

    monkeypatch.setattr(verifying, "measure_parity", fail)


def test_a_file_that_fails_is_removed(command, tiny, here, failing):
    code, out, err = command("convert", tiny, "out.onnx", "-q")
    assert (code, out) == (1, "")
    assert err.startswith("Error: out.onnx: onnxruntime does not reproduce the Keras model")
    assert "--keep-failed" in err
    assert names(here) == []


def test_keep_failed_keeps_all_of_it_in_a_folder(command, tiny, here, failing, monkeypatch):
    arguments = ("convert", tiny, "out.onnx", "-q", "--keep-failed")
    code, _, err = command(*arguments, "--external-data", "always")
    assert code == 1
    assert "The file is kept as out.onnx.failed/out.onnx." in err
    assert names(here) == ["out.onnx.failed"]
    kept = here / "out.onnx.failed"
    assert names(kept) == ["out.onnx", "out.onnx.data", "out.onnx.ref.npz"]
    assert command(*arguments)[0] == 2
    assert command(*arguments, "--force")[0] == 1
    assert names(kept) == ["out.onnx", "out.onnx.ref.npz"]
    (kept / "mine").touch()
    code, _, err = command(*arguments, "--force")
    assert code == 2
    assert "is in the way of what --keep-failed may keep" in err
    monkeypatch.undo()
    assert command("verify", kept / "out.onnx")[0] == 0


def test_keep_failed_keeps_what_the_runtime_cannot_load(command, tiny, here, monkeypatch):
    def fail(*arguments):
        raise LoadError("can't load it", where="out.onnx")

    monkeypatch.setattr(verifying, "measure_parity", fail)
    code, _, err = command("convert", tiny, "out.onnx", "-q", "--keep-failed")
    assert code == 3
    assert "The file is kept as out.onnx.failed/out.onnx." in err
    assert names(here / "out.onnx.failed") == ["out.onnx", "out.onnx.ref.npz"]


@pytest.mark.parametrize("report", ["out", "out/report.txt", "out.ref.npz"])
def test_a_report_never_goes_into_an_artifact(command, tiny, here, report):
    assert command("export", tiny, "out", "-q")[0] == 0
    before = {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()}
    for arguments in (("export", tiny, "out/"), ("verify", "out"), ("convert", tiny, "out")):
        code, _, err = command(*arguments, "--force", "--output-file", report)
        assert code == 2
        assert "the report would replace a part of the model or of its reference" in err
    assert before == {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-shape", "1,a"], "--input-shape 1,a: expected sizes with commas between them"),
        (["--input-shape", "1,2", "--input-shape", "1,3"], "an input has two shapes"),
        (["--input-shape", "image=1,0"], "must hold one positive integer"),
        (["--groupnorm", "fast"], "groupnorm must be 'portable', 'plain'"),
        (["--target", "tvm"], "target_runtime must be 'onnxruntime'"),
        (["--serving-only"], "serving_only is an option for the format savedmodel, not for onnx"),
        (["--opset", "99"], "opset 99 is not supported"),
        (["--format", "keras"], "a file in the format keras needs the suffix .keras"),
        (["--inputs-as-nchw", "x"], "there is no input 'x'"),
    ],
)
def test_export_options_that_are_wrong_end_with_one_line(command, tiny, here, arguments, message):
    code, out, err = command("export", tiny, "out.onnx", "-q", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert names(here) == []


def test_a_failure_leaves_the_earlier_file(command, tiny, here, failing):
    Path("out.onnx").write_bytes(b"earlier")
    Path("out.onnx.ref.npz").write_bytes(b"its reference")
    assert command("convert", tiny, "out.onnx", "--force")[0] == 1
    assert Path("out.onnx").read_bytes() == b"earlier"
    assert Path("out.onnx.ref.npz").read_bytes() == b"its reference"
    assert names(here) == ["out.onnx", "out.onnx.ref.npz"]


def test_a_failure_is_reported_to_who_asked(command, tiny, here, failing):
    code, out, err = command("convert", tiny, "out.onnx", "--report-format", "json", "-q")
    report = from_json(Report, out)
    assert code == report.exit_code == 1
    assert [(f.code, f.severity, f.where) for f in report.findings] == [
        ("parity", "error", "out.onnx")
    ]
    assert err.startswith("Error: out.onnx:")


def test_refusals_are_reported_to_who_asked(command, tiny, here):
    code, _, err = command("convert", tiny, "out.onnx", "--groups", 3, "--output-file", "r.txt")
    assert code == 1
    assert err.count("[indivisible-channels]") == 1
    assert "1 refused" in Path("r.txt").read_text()
    assert names(here) == ["r.txt"]


def test_force_replaces_all_that_belongs_to_the_artifact(command, tiny, here):
    Path("out.onnx").write_bytes(b"old")
    Path("out.onnx.ref.npz").write_bytes(b"old")
    assert command("convert", tiny, "out.onnx", "--force")[0] == 0
    assert command("verify", "out.onnx")[0] == 0
    assert names(here) == ["out.onnx", "out.onnx.ref.npz"]


def test_quiet_says_nothing_on_stderr(command, tiny, here):
    for option in ("-q", "--quiet"):
        assert command("plan", tiny, option)[2] == ""


# --- reports --------------------------------------------------------------------------------


def test_output_file_takes_the_report_from_stdout(command, tiny, here):
    code, out, _ = command("plan", tiny, "--report-format", "json", "--output-file", "plan.json")
    assert (code, out) == (0, "")
    assert len(from_json(SwapPlan, Path("plan.json").read_bytes()).swaps) == 1


@pytest.mark.parametrize("name", ["plan", "convert", "verify"])
def test_an_existing_output_file_is_kept_unless_forced(command, tiny, digits_onnx, here, name):
    arguments = {
        "plan": ["plan", tiny],
        "convert": ["convert", tiny, "out.h5"],
        "verify": ["verify", digits_onnx],
    }[name]
    Path("r.txt").write_text("precious")
    code, _, err = command(*arguments, "--output-file", "r.txt")
    assert code == 2
    assert err.startswith("Error: r.txt: exists already\nTo replace it: --force")
    assert Path("r.txt").read_text() == "precious"
    assert names(here) == ["r.txt"], "said before the work"
    assert command(*arguments, "--output-file", "r.txt", "--force")[0] == 0
    assert "precious" not in Path("r.txt").read_text()


def test_the_report_never_replaces_the_model_or_what_belongs_to_it(
    command, digits_onnx, here, tiny
):
    source = Path(shutil.copy(tiny, "in.keras"))
    os.symlink("in.keras", "link.keras")
    before = source.read_bytes()
    for arguments in (
        ["plan", "in.keras", "--output-file", "in.keras"],
        ["plan", "in.keras", "--output-file", "link.keras"],
        ["convert", "in.keras", "out.onnx", "--output-file", "in.keras"],
        ["convert", "in.keras", "out.onnx", "--output-file", "./out.onnx"],
        ["convert", "in.keras", "out.onnx", "--output-file", "out.onnx.ref.npz"],
        ["verify", digits_onnx, "--output-file", digits_onnx],
        ["verify", digits_onnx, "--output-file", f"{digits_onnx}.ref.npz"],
    ):
        code, _, err = command(*arguments, "--force")
        assert code == 2, arguments
        assert "the report would replace a part of the model or of its reference" in err
    assert source.read_bytes() == before
    assert names(here) == ["in.keras", "link.keras"]
    assert command("verify", digits_onnx)[0] == 0


def test_an_output_file_in_a_missing_folder(command, tiny, here):
    code, _, err = command("plan", tiny, "--output-file", "absent/r.txt")
    assert code == 3
    assert "does not exist" in err


def test_a_finding_of_the_plan_is_in_the_report(command, here):
    model = tf_keras.Sequential([layers.Input((4, 4, 16)), layers.BatchNormalization(name="norm")])
    model.layers[0].moving_mean.assign(np.full(16, np.nan))
    save(model, "nan.keras")
    code, out, _ = command("plan", "nan.keras")
    assert code == 1
    assert "warning [nonfinite-weights]" in out
    assert "16 of 16 values are NaN or Inf" in out


# --- verify ---------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", [[], ["--runtime", "onnxruntime"], ["--runtime", "reference"]])
def test_verify(command, digits_onnx, runtime):
    code, out, err = command("verify", digits_onnx, *runtime)
    assert (code, err) == (0, "")
    name = runtime[1] if runtime else "onnxruntime"
    assert out.startswith(f"{name} reproduces the Keras model at batch size 1 and 3")
    assert "drift from the BN model" in out


def test_verify_as_json(command, digits_onnx):
    code, out, _ = command("verify", digits_onnx, "--report-format", "json")
    report = from_json(Report, out)
    assert (code, report.command, report.ok) == (0, "verify", True)


def tamper(path):
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(largest) * 1.5
    largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))
    onnx.save(model, path)


def test_a_tampered_file_is_found_by_checksum_and_by_numbers(command, digits_onnx):
    tamper(digits_onnx)
    code, out, _ = command("verify", digits_onnx)
    assert code == 1
    assert "error [checksum-mismatch]" in out
    assert "onnxruntime DIFFERS from the Keras model" in out


def test_a_file_that_only_its_checksum_tells_apart(command, digits_onnx):
    model = onnx.load(digits_onnx)
    model.doc_string = "changed"
    onnx.save(model, digits_onnx)
    code, out, _ = command("verify", digits_onnx, "--report-format", "json")
    report = from_json(Report, out)
    assert code == 1
    assert report.parity[0].ok
    assert [finding.code for finding in report.findings] == ["checksum-mismatch"]


def test_the_reference_is_missing_or_elsewhere(command, digits_onnx, here):
    moved = shutil.move(f"{digits_onnx}.ref.npz", here / "ref.npz")
    code, out, err = command("verify", digits_onnx)
    assert (code, out) == (3, "")
    assert err.startswith(f"Error: {digits_onnx}.ref.npz: there is no such file\n")
    assert command("verify", digits_onnx, "--reference", moved)[0] == 0


def test_there_is_nothing_to_verify(command, here):
    code, out, err = command("verify", "absent.onnx")
    assert (code, out, err) == (3, "", "Error: absent.onnx: there is no such file or folder\n")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--atol", "1e-30", "--rtol", "0"], 1),
        (["--atol", "1"], 0),
        (["--atol", "0", "--rtol", "1e-3"], 0),
        (["--rtol", "inf"], 0),
        (["--atol", "-1"], 2),
        (["--rtol", "nan"], 2),
        (["--atol", "x"], 2),
    ],
)
def test_tolerances(command, digits_onnx, options, code):
    assert command("verify", digits_onnx, *options, "--report-format", "json")[0] == code


def test_the_tolerances_given_are_those_printed(command, digits_onnx):
    out = command("verify", digits_onnx, "--atol", "0.5", "--rtol", "0.25")[1]
    assert "(tolerance 0.5 + 0.25 of the output's largest value)" in out


# --- custom objects, code in files ------------------------------------------------------------


@pytest.fixture
def custom(here, monkeypatch):
    """A file that uses a class of the module `mylayers` in the current folder."""
    Path("mylayers.py").write_text(
        "import tf_keras\nclass Twice(tf_keras.layers.Layer):\n"
        "    def call(self, x):\n        return x * 2\n"
    )
    monkeypatch.syspath_prepend(str(here))
    module = importlib.import_module("mylayers")
    model = tf_keras.Sequential(
        [layers.Input((4, 4, 16)), module.Twice(), layers.BatchNormalization(name="norm")]
    )
    yield save(model, here / "custom.h5")
    sys.modules.pop("mylayers", None)


def test_custom_objects_are_imported(command, custom, here):
    code, _, err = command("plan", custom)
    assert code == 3
    assert "'Twice'" in err
    assert "--custom-objects" in err
    assert command("plan", custom, "--custom-objects", "mylayers:Twice")[0] == 0
    code, _, err = command("convert", custom, "out.onnx", "--custom-objects", "mylayers:Twice")
    assert code == 0, err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Twice", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("mylayers:Thrice", "AttributeError: module 'mylayers' has no attribute 'Thrice'"),
        ("mylayers", "expected MODULE:NAME"),
        (":Twice", "expected MODULE:NAME"),
        ("mylayers:", "expected MODULE:NAME"),
    ],
)
def test_custom_objects_that_aren_t_there(command, custom, value, message):
    code, _, err = command("plan", custom, "-q", "--custom-objects", value)
    assert code == 2
    assert err.startswith(f"Error: --custom-objects {value}: {message}")


def test_code_in_a_file_runs_only_when_asked_to(command, here):
    x = layers.Input((4, 4, 16))
    y = layers.Lambda(lambda t: t * 2.0, name="doubling")(layers.BatchNormalization()(x))
    save(tf_keras.Model(x, y), "lambda.keras")
    code, _, err = command("convert", "lambda.keras", "out.onnx", "-q")
    assert code == 3
    assert "carries code, which is not run unasked: doubling" in err
    assert "--unsafe" in err
    assert names(here) == ["lambda.keras"]
    assert command("convert", "lambda.keras", "out.onnx", "-q", "--unsafe")[0] == 0


# --- the whole ------------------------------------------------------------------------------


def test_debug_shows_the_traceback(command, here):
    code, _, err = command("plan", "absent.keras", "--debug")
    assert code == 3
    assert "Traceback (most recent call last)" in err
    assert "Error: absent.keras: there is no such file or folder" in err.splitlines()
    assert "Traceback" not in command("plan", "absent.keras")[2]


def test_an_unforeseen_error_says_what_to_do(command, tiny, here, monkeypatch):
    from layerswap import conversion

    def fail(*_, **__):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(conversion, "load", fail)
    code, _, err = command("plan", tiny, "-q")
    assert code == 3
    assert err == (
        "Error: unexpected ZeroDivisionError: first line\n"
        "Run again with --debug and report what it shows.\n"
    )
    assert "Traceback" in command("plan", tiny, "-q", "--debug")[2]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["verify", "--help"]])
def test_help_is_exit_code_0(command, arguments):
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert "layerswap" in out


@pytest.mark.parametrize(
    "arguments", [[], ["no-such"], ["plan"], ["convert", "in.keras"], ["plan", "x", "--no-such"]]
)
def test_wrong_usage_is_exit_code_2(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: layerswap" in err


def test_the_demo_writes_where_it_is_told(command, here):
    code, out, err = command("demo", "--output-dir", here / "there")
    assert code == 0, err
    assert "Next, your own model" in out
    assert names(here) == ["there"]
    assert names(here / "there") == ["digits_gn.onnx", "digits_gn.onnx.ref.npz"]


def layerswap(*arguments, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "layerswap", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=120,
        **options,
    )


def test_a_process_prints_its_report_and_nothing_of_tensorflow_s(tiny, here):
    result = layerswap("convert", tiny, "out", "-q", stdout=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(f"{tiny}: {SUMMARY}\n".encode())
    assert names(here) == ["out", "out.ref.npz"]


def test_an_encoding_without_greek_letters(here):
    environment = {"PYTHONIOENCODING": "cp1252"}
    result = layerswap("convert", "--help", stdout=subprocess.PIPE, env=environment)
    assert result.returncode == 0, result.stderr
    assert b"\\u03b2" in result.stdout


def test_standard_output_that_is_full(digits_onnx):
    with open("/dev/full", "wb") as full:
        result = layerswap("verify", digits_onnx, stdout=full)
    assert result.returncode == 3
    assert result.stderr.decode().splitlines()[0] == (
        "Error: standard output: the report can't be written: No space left on device"
    )
    assert b"Exception ignored" not in result.stderr


def test_a_reader_that_has_enough(digits_onnx):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = layerswap("verify", digits_onnx, stdout=writing)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (0, b"")


def test_json_and_text_agree(command, digits_onnx):
    out = json.loads(command("verify", digits_onnx, "--report-format", "json")[1])
    text = command("verify", digits_onnx)[1]
    assert f"{out['parity'][0]['max_absolute']:.3g}" in text
