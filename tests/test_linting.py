"""`check` on many files, in runtimes, on weights of Keras files, with settings from files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import tf_keras
from onnx import helper, parser
from tf_keras import layers

import layerswap as ls
from layerswap import linting
from layerswap.__main__ import run
from layerswap.criteria import Criteria
from layerswap.errors import LoadError, UsageError
from layerswap.policy import Policy
from layerswap.references import load_reference, reference_path, save_reference


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def onnx_file(path, body="y = Relu (x)", shape="1,4"):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[{shape}] x) => (float[{shape}] y) {{ {body} }}"""
    onnx.save(parser.parse_model(text), path)
    return str(path)


LEFT = """
  v = Constant <value = float[4] {1, 1, 1, 1}> ()
  y = BatchNormalization (x, v, v, v, v)
"""


def said(capsys):
    return json.loads(capsys.readouterr().out)


# --- many files -------------------------------------------------------------------------------


def test_processes_say_the_same_in_the_same_order(capsys):
    files = [onnx_file(f"{n}.onnx", LEFT if n % 3 else "y = Relu (x)") for n in range(9)]
    Path("bad.onnx").write_bytes(b"")
    arguments = ["check", *files, "bad.onnx", "absent.onnx", "--report-format", "json"]
    assert run([*arguments, "--jobs", "1"]) == 1
    alone = capsys.readouterr()
    assert run([*arguments, "--jobs", "2"]) == 1
    together = capsys.readouterr()
    assert together.out == alone.out
    report = json.loads(alone.out)
    assert [c["source"] for c in report["checked"]] == arguments[1:12]
    assert [f["code"] for f in report["findings"]].count("LS001") == 2


def test_progress_where_it_takes_long(capsys):
    files = [onnx_file(f"{n}.onnx") for n in range(101)]
    assert run(["check", *files, "--jobs", "1"]) == 0
    assert capsys.readouterr().err.startswith("check ...")
    assert run(["check", *files, "--jobs", "1", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert run(["check", *files[:100]]) == 0
    assert capsys.readouterr().err == ""


def test_how_many_processes_are_worth_it(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    file = onnx_file("m.onnx")
    assert linting._worth([file]) == 1
    assert linting._worth([file] * 250) == 3
    assert linting._worth([file] * 10_000) == 4
    monkeypatch.setattr(os.path, "getsize", lambda path: 1 << 28)
    assert linting._worth([file, file]) == 3


def test_a_process_that_dies_is_said(monkeypatch, capsys):
    """As if onnx had crashed on a file."""
    file = onnx_file("m.onnx")
    # The fresh process imports this module by name.
    Path("dying.py").write_text("import os\ndef die(path):\n    os._exit(1)\n")
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("PYTHONPATH", os.getcwd(), prepend=os.pathsep)
    import dying

    with pytest.raises(LoadError, match="died"):
        list(linting._in_processes(dying.die, [file, file], 2))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_all_its_processes(number):
    file = onnx_file("m.onnx")
    files = [f"{index}.onnx" for index in range(2_000)]
    for name in files:
        os.link(file, name)
    process = subprocess.Popen(
        [sys.executable, "-m", "layerswap", "check", *files, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "check ..." not in process.stderr.readline():
        assert process.poll() is None
    # Ctrl-C reaches the whole group, kill one process.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == codes[number]
    assert out == ""
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # no process of the group is left
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process goes on")


def test_what_is_missing_in_a_process_is_said_as_ever(digits_onnx, monkeypatch, capsys):
    """A runtime that isn't installed, as far as fresh processes can see."""
    Path("openvino").mkdir()
    Path("openvino/__init__.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", os.getcwd(), prepend=os.pathsep)
    shutil.copy(digits_onnx, "b.onnx")
    arguments = ["check", str(digits_onnx), "b.onnx", "--runtime", "openvino", "--reference"]
    reference = str(reference_path(digits_onnx))
    done = subprocess.run(
        [sys.executable, "-m", "layerswap", *arguments, reference, "--jobs", "2", "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    assert "pip install 'layerswap[openvino]'" in done.stderr
    assert "Traceback" not in done.stderr


# --- selection --------------------------------------------------------------------------------


def test_the_command_line_chooses(capsys):
    file = onnx_file("m.onnx", LEFT, "1,4")
    assert run(["check", file, "--ignore", "LS1"]) == 0
    assert run(["check", file, "--select", "LS2"]) == 0
    assert run(["check", file, "--severity", "batchnorm-left=warning"]) == 0
    assert "warning LS101" in capsys.readouterr().out
    assert run(["check", file, "--severity", "LS101=undetermined"]) == 3
    assert run(["check", file, "--ignore", "LS001"]) == 2
    assert run(["check", file, "--select", "LS1O1"]) == 2
    assert "did you mean 'LS101'" in capsys.readouterr().err
    assert run(["check", file, "--severity", "LS101"]) == 2
    assert "--severity LS204=error" in capsys.readouterr().err


def test_the_files_choose(capsys):
    onnx_file("m.onnx", LEFT)
    os.mkdir("old")
    onnx_file("old/m.onnx", LEFT)
    text = '[check]\nignore = ["LS1"]\n[check.overrides."old/*"]\nignore = []\n'
    Path("layerswap.toml").write_text(text)
    assert run(["check", "m.onnx"]) == 0
    assert run(["check", "old/m.onnx"]) == 1
    assert run(["check", "m.onnx", "--ignore", "LS2"]) == 1
    Path("mine.toml").write_text('[check]\nignore = "LS2"\n')
    assert run(["check", "m.onnx", "--config", "mine.toml"]) == 1
    for wrong, words in (
        ('[check]\nignroe = "LS1"\n', "did you mean 'ignore'"),
        ('[check]\nselect = "LS9999"\n', "'LS9999', which is not a rule"),
        ("check = 3\n", "check is not a table"),
        ("[check.policy]\ngroups = 3\n", "stands outside"),
    ):
        Path("layerswap.toml").write_text(wrong)
        capsys.readouterr()
        assert run(["check", "m.onnx"]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert "layerswap.toml" in err


def test_the_same_file_serves_plan_and_check(digits):
    Path("layerswap.toml").write_text('groups = 4\n[check]\nignore = "LS204"\n')
    assert run(["convert", str(digits), "four.onnx", "--quiet"]) == 0
    assert run(["check", "four.onnx"]) == 0
    assert run(["check", "four.onnx", "--groups", "2"]) == 1
    Path("layerswap.toml").write_text("groups = 2\n")
    assert run(["check", "four.onnx", "--ignore", "LS204"]) == 1


@pytest.mark.parametrize("suffix", [".keras", ".onnx"])
def test_groups_against_a_policy(digits, suffix):
    path = f"m{suffix}"
    ls.convert(digits, path, groups=4)
    channels = [x.channels for x in ls.check(path).checked[0].layers if x.groups is not None]
    assert channels
    assert all(size and size % 4 == 0 for size in channels)
    found = ls.check(path, groups=2, select="LS202").findings
    assert [f.code for f in found] == ["LS202"] * len(channels)
    assert f"has 4 groups over {channels[0]} channels, not 2" in found[0].message
    assert ls.check(path, groups=4, select="LS202").findings == ()
    assert ls.check(path, select="LS202").findings == ()
    assert ls.check(path, channels_per_group=channels[0] // 4, select="LS202").exit_code in (0, 1)


def test_a_policy_that_names_layers(digits):
    policy = {"groups": 2, "overrides": {"block3*": {"groups": 4}}, "exclude": ["stem*"]}
    ls.convert(digits, "m.onnx", **{**policy, "exclude": []})
    assert ls.check("m.onnx", policy=Policy(**policy), select="LS202").ok
    other = Policy(**{**policy, "overrides": {"block3_a*": {"groups": 4}}})
    found = ls.check("m.onnx", policy=other, select="LS202").findings
    assert [f.where for f in found] == ["block3_b_bn"]
    model = onnx.load("m.onnx")
    del model.metadata_props[:]
    onnx.save(model, "bare.onnx")
    (finding,) = ls.check("bare.onnx", policy=other, select="LS202").findings
    assert (finding.code, finding.severity) == ("LS202", "undetermined")
    helper.set_model_props(model, {"layerswap.groupnorms": "[]"})
    onnx.save(model, "partial.onnx")
    (finding,) = ls.check("partial.onnx", policy=other, select="LS202").findings
    assert finding.severity == "undetermined"
    # An override about something else says nothing of groups.
    Path("layerswap.toml").write_text('[overrides."block3*"]\nepsilon = 0.5\n')
    assert run(["check", "bare.onnx", "--select", "LS202"]) == 0
    Path("layerswap.toml").write_text('[overrides."block3*"]\ngroups = 1\n')
    assert run(["check", "m.onnx", "--select", "LS202"]) == 1


def test_a_keras_file_among_files_to_run_is_said(digits_onnx, digits, capsys):
    ls.convert(digits, "m.keras")
    arguments = ["check", "m.keras", str(digits_onnx), "--runtime", "reference", "--quiet"]
    assert run([*arguments, "--report-format", "json"]) == 0
    (finding,) = said(capsys)["findings"]
    assert (finding["file"], finding["code"], finding["severity"]) == ("m.keras", "LS801", "info")
    assert [f.code for f in ls.check("m.keras", max_drift=1.0, load=True).findings] == ["LS802"]


def test_python_says_what_it_doesn_t_take(digits_onnx):
    with pytest.raises(UsageError, match="either criteria or its fields"):
        ls.check(digits_onnx, criteria=Criteria(), select="LS2")
    with pytest.raises(UsageError, match="unknown field"):
        ls.check(digits_onnx, selct="LS2")


# --- proof ------------------------------------------------------------------------------------


def proof(path, **fields):
    return [(f.code, f.severity) for f in ls.check(path, **fields).findings]


def test_parity_in_the_runtimes_asked_for(digits_onnx, tmp_path):
    for runtime in ("onnxruntime", "reference", "all", "onnxruntime,reference"):
        assert proof(digits_onnx, runtime=runtime) == []
    known = load_reference(reference_path(digits_onnx))
    for batch in known.outputs:
        for array in batch.values():
            array += 0.5
    other = tmp_path / "other.npz"
    save_reference(known, other)
    assert proof(digits_onnx, reference=str(other)) == [("LS801", "error")]
    (finding,) = ls.check(digits_onnx, reference=str(other)).findings
    assert "DIFFERS" in finding.message


def test_a_reference_for_another_file_is_said_once(digits_onnx):
    digits_onnx.write_bytes(digits_onnx.read_bytes() + b"\x12\x01x")
    assert proof(digits_onnx, runtime="onnxruntime") == [("LS713", "error")]


def test_drift_has_a_budget(digits_onnx, tmp_path):
    assert proof(digits_onnx, max_drift=10.0) == []
    assert proof(digits_onnx, max_drift=1e-9) == [("LS802", "error")]
    known = load_reference(reference_path(digits_onnx))
    bare = tmp_path / "bare.npz"
    parts = {name: getattr(known, name) for name in known.__slots__}
    save_reference(type(known)(**{**parts, "source_outputs": None}), bare)
    assert proof(digits_onnx, reference=str(bare), max_drift=10.0) == [("LS802", "undetermined")]


def test_a_runtime_that_fails(digits_onnx):
    model = onnx.load(digits_onnx)
    model.graph.node.add(op_type="Mystery", domain="mine", input=["x"], output=["q"])
    model.opset_import.add(domain="mine", version=1)
    onnx.save(model, digits_onnx)
    codes = {code for code, _ in proof(digits_onnx, runtime="onnxruntime")}
    assert {"LS803", "LS004"} <= codes


def test_every_runtime_asked_for_runs(digits_onnx):
    """onnx's own evaluator doesn't know what ONNX Runtime adds to it."""
    model = onnx.load(digits_onnx)
    model.graph.node.add(
        op_type="Gelu", domain="com.microsoft", input=[model.graph.input[0].name], output=["q"]
    )
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, digits_onnx)
    for runtimes in ("onnxruntime,reference", "reference,onnxruntime"):
        found = ls.check(digits_onnx, runtime=runtimes, select="LS803").findings
        assert [f.where for f in found] == ["reference"]


def test_no_reference_is_no_proof(digits_onnx, capsys):
    reference_path(digits_onnx).unlink()
    assert proof(digits_onnx, runtime="onnxruntime,reference") == [("LS801", "undetermined")]
    assert proof(digits_onnx, max_drift=1.0) == [("LS802", "undetermined")]
    assert run(["check", str(digits_onnx), "--runtime", "onnxruntime", "--quiet"]) == 3
    assert "no such file" in capsys.readouterr().out


def test_no_reference_hides_nothing_else(capsys):
    file = onnx_file("left.onnx", LEFT)
    assert run(["check", file, "--runtime", "onnxruntime", "--max-drift", "1", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert all(code in out for code in ("LS101", "LS801", "LS802"))


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m"])
def test_every_format_shows_groups_that_differ(name, tmp_path):
    inner = tf_keras.Sequential([layers.GroupNormalization(2, name="norm")], name="inner")
    model = tf_keras.Sequential([layers.Input((6, 6, 8)), inner])
    model.save(tmp_path / name)
    for groups, legal in ((2, True), (4, False), ("auto", False), (-1, False)):
        report = ls.check(tmp_path / name, groups=groups, select="LS2")
        assert report.ok == legal
        assert [f.where for f in report.findings] == ([] if legal else ["inner/norm"])
    assert ls.check(tmp_path / name, channels_per_group=4, select="LS2").ok


def test_groups_that_nobody_can_compare_are_undetermined(tmp_path):
    bare = layers.GroupNormalization(2, center=False, scale=False, name="norm")
    tf_keras.Sequential([layers.Input((6, 6, 8)), bare]).save(tmp_path / "m.h5")
    assert ls.check(tmp_path / "m.h5", groups=4).exit_code == 1
    report = ls.check(tmp_path / "m.h5", groups="auto")
    assert [(f.code, f.severity) for f in report.findings] == [("LS202", "undetermined")]
    assert report.exit_code == 3
    assert ls.check(tmp_path / "m.h5").exit_code == 0


def test_no_groups_at_all_are_an_error(tmp_path):
    norm = layers.GroupNormalization(2, name="norm")
    tf_keras.Sequential([layers.Input((6, 6, 8)), norm]).save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        config = file.attrs["model_config"]
        for groups, found in ((0, ["LS201"]), (-2, ["LS201"]), (4, [])):
            file.attrs["model_config"] = config.replace('"groups": 2', f'"groups": {groups}')
            file.flush()
            assert [f.code for f in ls.check(tmp_path / "m.h5").findings] == found


def test_a_policy_that_names_layers_is_for_the_onnx_file_too(digits_onnx):
    (table,) = (
        item.value
        for item in onnx.load(digits_onnx).metadata_props
        if item.key == "layerswap.groupnorms"
    )
    sites = json.loads(table)
    own = {site["path"]: {"groups": site["groups"]} for site in sites}
    first, *_ = own
    policy = Policy(groups=1, overrides=own)
    assert ls.check(digits_onnx, policy=policy).ok
    wrong = Policy(groups=1, overrides={**own, first: {"groups": sites[0]["channels"]}})
    assert [f.where for f in ls.check(digits_onnx, policy=wrong).findings] == [first]


# --- weights of Keras files ---------------------------------------------------------------------


def keras_file(path):
    model = tf_keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.GroupNormalization(2, name="norm"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )
    model.compile("adam", "mse")
    model.fit(np.zeros((2, 6, 6, 2)), np.zeros((2, 3)), verbose=0)
    return model


@pytest.mark.parametrize("path", ["m.keras", "m.h5"])
def test_weights_of_keras_files(path):
    model = keras_file(path)
    model.save(path)
    assert ls.check(path, weights=True).findings == ()
    kernel, bias = model.get_layer("head").get_weights()
    kernel[0, 0], kernel[1, 1] = np.nan, np.inf
    model.get_layer("head").set_weights([kernel, bias])
    model.save(path)
    (finding,) = ls.check(path, weights=True).findings
    assert (finding.code, finding.severity) == ("LS601", "error")
    assert finding.message.startswith(f"2 of its {kernel.size} values")
    assert ls.check(path).ok
    model.get_layer("head").set_weights([np.ones_like(kernel), bias])
    conv, shift = model.get_layer("conv").get_weights()
    model.get_layer("conv").set_weights([conv * 0, shift])
    gamma, beta = model.get_layer("norm").get_weights()
    model.get_layer("norm").set_weights([gamma * 0, beta])
    model.save(path)
    found = ls.check(path, weights=True).findings
    assert sorted(f.code for f in found) == ["LS602", "LS603"]
    assert sorted(f.where for f in found) == ["conv/kernel", "norm/gamma"]


def test_weights_of_a_saved_model_are_undetermined():
    keras_file("m").save("m", save_format="tf")
    (finding,) = ls.check("m", weights=True).findings
    assert (finding.code, finding.severity) == ("LS601", "undetermined")


def test_damaged_weights_are_one_message():
    keras_file("m.keras").save("m.keras")
    with zipfile.ZipFile("m.keras") as archive, zipfile.ZipFile("cut.keras", "w") as out:
        for name in archive.namelist():
            content = archive.read(name)
            out.writestr(name, content[: len(content) // 2] if name.endswith(".h5") else content)
    assert ls.check("cut.keras").ok
    with pytest.raises(LoadError, match="weights can't be read"):
        ls.check("cut.keras", weights=True)
    with zipfile.ZipFile("m.keras") as archive, zipfile.ZipFile("packed.keras", "w", 8) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    assert ls.check("packed.keras", weights=True).ok


def test_weights_that_lie_elsewhere_are_not_opened(tmp_path):
    """HDF5 lets a file's dataset be any bytes of any other file."""
    keras_file("m.h5").save("m.h5")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.full(4, np.nan).tobytes())
    with h5py.File("m.h5", "r+") as file:
        file["model_weights/norm"].create_dataset(
            "outside", (4,), "f8", external=[(str(secret), 0, 32)]
        )
        listed = np.array(["outside"], "S")
        file["model_weights/norm"].attrs["weight_names"] = listed
    with pytest.raises(LoadError, match="no weight"):
        ls.check("m.h5", weights=True)


def test_degenerate_and_tiny_groups_of_keras_files():
    for size, groups, code in ((1, 4, "LS203"), (1, 2, "LS204"), (4, 2, None)):
        model = tf_keras.Sequential(
            [layers.Input((size, size, 4)), layers.GroupNormalization(groups, name="norm")]
        )
        model.save("m.keras")
        assert [f.code for f in ls.check("m.keras").findings] == ([code] if code else [])
        assert [f.code for f in ls.check("m.keras", load=True).findings] == ([code] if code else [])


def test_epsilon_of_keras_files():
    for dtype, epsilon, code in (
        ("float32", 0.0, "LS502"),
        ("float32", 1e-8, None),
        ("mixed_float16", 1e-8, "LS503"),
        ("mixed_float16", 1e-6, None),
    ):
        norm = layers.GroupNormalization(1, epsilon=epsilon, dtype=dtype, name="norm")
        tf_keras.Sequential([layers.Input((8, 8, 4)), norm]).save("m.keras")
        assert [f.code for f in ls.check("m.keras").findings] == ([code] if code else [])


def test_a_file_and_what_is_written_beside_it_stay_as_they_are(digits_onnx):
    before = {f.name: f.read_bytes() for f in digits_onnx.parent.iterdir()}
    ls.check(digits_onnx, weights=True, runtime="onnxruntime", target="opencv")
    assert {f.name: f.read_bytes() for f in digits_onnx.parent.iterdir()} == before
    shutil.rmtree(digits_onnx.parent)
