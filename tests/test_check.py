"""`check` as a whole: verdict, exit code, report; with the model loaded and without."""

import json
import subprocess
import sys

import onnx
import pytest
import tensorflow as tf
import tf_keras
from onnx import parser
from tf_keras import layers

import layerswap as ls
from layerswap.__main__ import run
from layerswap.errors import LoadError, UsageError
from layerswap.records import Report, from_json


class Branch(layers.Layer):
    """Keeps one layer by attribute and one in a list; `norm` decides which."""

    def __init__(self, norm="LayerNormalization", **kwargs):
        super().__init__(**kwargs)
        self.norm = norm
        self.first = getattr(layers, norm)()
        self.others = [getattr(layers, norm)()]

    def call(self, inputs):
        return self.others[0](self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "norm": self.norm}


class Renamed(layers.BatchNormalization):
    """A BatchNormalization under another name."""


class Handmade(layers.Layer):
    """Normalises by batch without saying so."""

    def build(self, shape):
        self.mean = self.add_weight("moving_mean", (shape[-1],), trainable=False)

    def call(self, inputs):
        return inputs - self.mean


class Calling(layers.Layer):
    def call(self, inputs):
        mean, variance = tf.nn.moments(inputs, 0)
        return tf.nn.batch_normalization(inputs, mean, variance, None, None, 1e-3)


class Swapped(layers.Layer):
    """Called `batch_norm` from the days when it was one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batch_norm = layers.GroupNormalization(1)

    def call(self, inputs):
        return self.batch_norm(inputs)


def plus_one(x):
    return x + 1.0


def by_hand(x):
    return tf.nn.batch_normalization(x, 0.0, 1.0, None, None, 1e-3)


OBJECTS = {
    kind.__name__: kind for kind in (Branch, Renamed, Handmade, Calling, Swapped, plus_one, by_hand)
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def keep(path, *stack):
    model = tf_keras.Sequential([layers.Input((8,)), *stack], name="model")
    model.save(path, **({} if "." in path else {"save_format": "tf"}))
    return path


def codes(report):
    return sorted((f.code, f.where) for f in report.findings)


def onnx_file(path, body):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[1,2] x, float[2] v) => (float[1,2] y) {{ {body} }}"""
    onnx.save(parser.parse_model(text), path)
    return path


def plain(path="plain.keras"):
    return keep(path, layers.Dense(4), layers.LayerNormalization(name="norm"))


def batch(path="batch.keras"):
    return keep(path, layers.Dense(4), layers.BatchNormalization(name="norm"))


def custom(path="custom.keras", norm="LayerNormalization"):
    return keep(path, layers.Dense(4), Branch(norm, name="branch"))


# --- the verdict ----------------------------------------------------------------------------


def test_clean():
    report = ls.check(plain())
    assert (report.ok, report.exit_code, report.undetermined) == (True, 0, False)
    (checked,) = report.checked
    assert (checked.source, checked.examined) == ("plain.keras", 3)
    assert [(x.path, x.class_name, x.parents) for x in checked.layers] == [
        ("norm", "LayerNormalization", ("Sequential",))
    ]
    assert from_json(Report, report.to_json()) == report


def test_left_over():
    report = ls.check(batch())
    assert (report.ok, report.exit_code) == (False, 1)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("LS101", "error")
    assert (finding.where, finding.file) == ("norm", "batch.keras")


def test_undetermined():
    report = ls.check(custom())
    assert (report.ok, report.exit_code, report.undetermined) == (False, 3, True)


def test_what_is_certain_wins_over_what_is_not():
    report = ls.check(keep("m.keras", Branch(name="branch"), layers.BatchNormalization(name="n")))
    assert (report.exit_code, report.undetermined) == (1, True)
    assert codes(report) == [("LS002", "branch"), ("LS101", "n")]


def test_a_swapped_model_is_clean_and_its_source_is_not(digits):
    assert ls.check(digits).exit_code == 1
    for target in ("swapped.keras", "swapped.h5"):
        assert ls.convert(digits, target).ok
        report = ls.check(target)
        assert report.ok
        assert {x.class_name for x in report.checked[0].layers} == {"GroupNormalization"}
        assert ls.check(target, load=True).checked[0].layers[0].class_name == "GroupNormalization"


def test_what_can_t_be_read_raises():
    with pytest.raises(LoadError, match="no such file"):
        ls.check("absent.keras")
    with pytest.raises(LoadError, match="no such file"):
        ls.check("absent.keras", load=True)


@pytest.mark.parametrize("fields", [{"unsafe": True}, {"custom_objects": OBJECTS}])
def test_what_only_a_load_can_use_needs_one(fields):
    with pytest.raises(UsageError, match="loaded"):
        ls.check(plain(), **fields)


# --- with the model loaded ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".keras", ".h5", ""])
def test_loading_decides_about_a_custom_class(suffix):
    clean = ls.check(custom(f"a{suffix}"), load=True, custom_objects=OBJECTS)
    assert clean.ok
    assert [(x.path, x.parents) for x in clean.checked[0].layers] == [
        ("branch/first", ("Sequential", "Branch")),
        ("branch/others[0]", ("Sequential", "Branch")),
    ]
    path = custom(f"b{suffix}", "BatchNormalization")
    report = ls.check(path, load=True, custom_objects=OBJECTS)
    assert report.exit_code == 1
    left = [("LS101", "branch/first"), ("LS101", "branch/others[0]")]
    assert codes(report) == left
    assert codes(ls.check(path)) == (
        [("LS002", "branch"), *left] if suffix == "" else [("LS002", "branch")]
    )


def test_a_subclass_counts_once_loaded():
    path = keep("m.keras", layers.Dense(4), Renamed(name="n"))
    assert codes(ls.check(path)) == [("LS002", "n")]
    assert codes(ls.check(path, load=True, custom_objects=OBJECTS)) == [("LS101", "n")]


@pytest.mark.parametrize("kind", [Handmade, Calling])
def test_what_looks_like_it_is_never_clean(kind):
    path = keep("m.keras", layers.Dense(4), kind(name="n"))
    report = ls.check(path, load=True, custom_objects=OBJECTS)
    assert codes(report) == [("LS103", "n")]
    assert report.exit_code == 3


def test_a_name_from_earlier_days_is_no_suspicion():
    path = keep("m.keras", layers.Dense(4), Swapped(name="n"))
    assert ls.check(path, load=True, custom_objects=OBJECTS).ok


@pytest.mark.parametrize(("function", "code"), [(plus_one, 0), (by_hand, 3)])
def test_a_function_is_looked_into(function, code):
    path = keep("m.keras", layers.Dense(4, activation=function))
    assert ls.check(path).exit_code == 3
    assert ls.check(path, load=True, custom_objects=OBJECTS).exit_code == code


@pytest.mark.parametrize(("function", "code"), [(lambda x: x + 1.0, 0), (by_hand, 3)])
def test_code_in_the_file_is_run_only_when_asked(function, code):
    path = keep("m.keras", layers.Dense(4), layers.Lambda(function, name="code"))
    assert ls.check(path).exit_code == 3
    with pytest.raises(LoadError, match="carries code"):
        ls.check(path, load=True)
    assert ls.check(path, load=True, unsafe=True).exit_code == code


def test_an_operator_of_tensorflow_is_left_over_either_way():
    inputs = layers.Input((4, 4, 2))
    x, _, _ = tf.compat.v1.nn.fused_batch_norm(inputs, [1.0, 1.0], [0.0, 0.0])
    tf_keras.Model(inputs, tf.nn.relu(x)).save("m.keras")
    where = "tf.compat.v1.nn.fused_batch_norm"
    assert codes(ls.check("m.keras")) == [("LS102", where)]
    assert codes(ls.check("m.keras", load=True)) == [("LS102", where)]


def test_a_saved_model_without_its_classes_stays_open():
    report = ls.check(custom("m"), load=True)
    assert codes(report) == [("LS002", "branch")]


# --- the command ----------------------------------------------------------------------------


def test_the_command_prints_layers_findings_and_verdict(capsys):
    assert run(["check", plain()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "layer  class               groups  channels  inside",
        "norm   LayerNormalization                    Sequential",
        "plain.keras: no BatchNormalization is left; 3 layers looked at, 1 of them normalize",
    ]
    assert run(["check", batch()]) == 1
    out = capsys.readouterr().out
    line = "batch.keras: norm: error LS101 [batchnorm-left] is a BatchNormalization in Sequential\n"
    assert line in out
    assert out.count("hint: ") == 1
    assert "batch.keras: 1 BatchNormalization left, 1 error;" in out


def test_every_file_is_reported_and_the_worst_counts(capsys):
    clean = onnx_file("clean.onnx", "y = Relu (x)")
    left = onnx_file("left.onnx", "y = BatchNormalization (x, v, v, v, v)")
    assert run(["check", plain(), clean]) == 0
    assert run(["check", plain(), "absent.keras", clean]) == 3
    assert run(["check", custom(), clean]) == 3
    assert run(["check", left, "absent.onnx", custom(), clean]) == 1
    out = capsys.readouterr().out
    for verdict in (
        "left.onnx: 1 BatchNormalization left,",
        "absent.onnx: undetermined whether",
        "custom.keras: undetermined whether",
        "clean.onnx: no BatchNormalization",
    ):
        assert verdict in out


def test_the_report_as_json(capsys):
    code = run(["check", plain(), custom(), "absent.h5", "--report-format", "json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 3
    assert [c["source"] for c in report["checked"]] == ["plain.keras", "custom.keras", "absent.h5"]
    assert [(f["file"], f["code"], f["severity"]) for f in report["findings"]] == [
        ("custom.keras", "LS002", "undetermined"),
        ("absent.h5", "LS001", "undetermined"),
    ]
    assert report["checked"][0]["layers"] == [
        {
            "path": "norm",
            "class_name": "LayerNormalization",
            "module": "keras.layers",
            "parents": ["Sequential"],
            "channels": None,
            "groups": None,
            "elements": None,
            "epsilon": 1e-3,
            "dtype": "float32",
        }
    ]


def test_the_report_in_a_file(tmp_path, capsys):
    arguments = ["check", plain(), "--output-file", "report.txt"]
    assert run(arguments) == 0
    assert "no BatchNormalization" in (tmp_path / "report.txt").read_text()
    assert run(arguments) == 2
    assert run([*arguments, "--force"]) == 0
    assert run(["check", plain(), "--output-file", "plain.keras", "--force"]) == 2
    assert "would replace a part of the model" in capsys.readouterr().err


def test_the_command_loads_when_told(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_to_check.py").write_text(
        "from tf_keras import layers\n"
        "class Branch(layers.Layer):\n"
        "    def __init__(self, norm, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.inner = getattr(layers, norm)()\n"
        "    def call(self, inputs):\n"
        "        return inputs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objects = ["--custom-objects", "mine_to_check:Branch"]
    for norm, code in (("LayerNormalization", 0), ("BatchNormalization", 1)):
        model = tf_keras.Sequential([layers.Input((8,)), Plain(norm, name="branch")])
        model.save("m.keras")
        assert run(["check", "m.keras", "--load", *objects]) == code
        assert "branch/inner" in capsys.readouterr().out
    assert run(["check", "m.keras", *objects]) == 2
    assert run(["check", "m.keras", "--load"]) == 3
    assert "undetermined LS001 [unreadable]" in capsys.readouterr().out


class Plain(layers.Layer):
    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm
        type(self).__name__ = "Branch"

    def call(self, inputs):
        return inputs

    def get_config(self):
        return {**super().get_config(), "norm": self.norm}


def test_it_needs_a_file(capsys):
    assert run(["check"]) == 2
    assert "FILE" in capsys.readouterr().err


def test_no_tensorflow_without_load(digits_onnx):
    plain(), batch("batch.h5"), custom("custom")
    code = """
import sys
from layerswap.__main__ import run
import layerswap as ls
files = [["plain.keras", sys.argv[1]], ["batch.h5"], ["custom"]]
print(*[run(["check", *names]) for names in files])
assert ls.check("plain.keras").ok
heavy = {"tensorflow", "tf_keras", "keras", "tf2onnx", "onnxruntime"}
print("heavy", heavy & {name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, digits_onnx], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["0 1 3", "heavy set()"]
