"""Graphs that other tools write, judged by the whole of `check`."""

import warnings
from pathlib import Path

import onnx
import pytest
from onnx import parser

import layerswap as ls
from layerswap.criteria import TARGETS

PYTORCH = sorted((Path(__file__).parents[2] / "fixtures" / "exporters").glob("*.txt"))
# The codes of findings, where there are any. PyTorch folds a BatchNormalization behind a
# convolution, but not where the older exporter is told to train.
EXPECTED = {
    "batchnorm-inference-dynamo": ["LS101"],
    "batchnorm-inference-torchscript": ["LS101"],
    "batchnorm-training-dynamo": ["LS101"],
    "batchnorm-training-torchscript": ["LS101"],
    "folded-training-torchscript": ["LS101"],
}
GROUPS = {"groupnorm": [(8, 2)], "instancenorm": [(8, 8)]}


def codes(report):
    return [finding.code for finding in report.findings]


def norms(report):
    return [(layer.class_name, layer.channels, layer.groups) for layer in report.checked[0].layers]


# --- PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PYTORCH, ids=lambda path: path.stem)
def test_pytorch(text, tmp_path):
    onnx.save(parser.parse_model(text.read_text()), tmp_path / "m.onnx")
    report = ls.check(tmp_path / "m.onnx")
    assert codes(report) == EXPECTED.get(text.stem, [])
    assert report.ok == (text.stem not in EXPECTED)
    known = GROUPS.get(text.stem.partition("-")[0], [])
    assert [(c, g) for _, c, g in norms(report) if g] == known


def test_the_fixtures_hold_what_the_tests_are_about():
    assert EXPECTED.keys() < {path.stem for path in PYTORCH}
    assert len(PYTORCH) == 14
    training = [path.stem for path in PYTORCH if "training_mode: int = 1" in path.read_text()]
    assert training == ["batchnorm-training-torchscript", "folded-training-torchscript"]


# --- tf2onnx --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory):
    """Writes a small Keras model by stock tf2onnx."""
    import tensorflow as tf
    import tf2onnx
    import tf_keras
    from tf_keras import layers

    def write(*stack):
        model = tf_keras.Sequential([layers.Input((6, 6, 8)), *stack])
        signature = [tf.TensorSpec((None, 6, 6, 8), tf.float32, name="x")]
        path = tmp_path_factory.mktemp("keras") / "m.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx.save(tf2onnx.convert.from_keras(model, signature, opset=18)[0], path)
        return path

    return write, layers


def test_tf2onnx_with_groupnorm(keras_file):
    write, layers = keras_file
    path = write(layers.Conv2D(8, 3), layers.GroupNormalization(2), layers.ReLU())
    assert "LS101" not in codes(ls.check(path))
    wrong = ls.check(path, target=["opencv"]).findings
    assert any("reduced" in f.message and f.code == "LS403" for f in wrong)


def test_tf2onnx_with_batchnorm(keras_file):
    write, layers = keras_file
    folded = write(layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU())
    assert "LS101" not in codes(ls.check(folded))
    left = write(layers.Conv2D(8, 3), layers.ReLU(), layers.BatchNormalization())
    report = ls.check(left)
    assert "LS101" in codes(report)
    assert [kind for kind, _, _ in norms(report)] == ["BatchNormalization"]


# --- scikit-learn ---------------------------------------------------------------------------


def test_scikit_learn(tmp_path):
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_iris(return_X_y=True)
    path = tmp_path / "m.onnx"
    for model in (LogisticRegression(), RandomForestClassifier(3, random_state=0)):
        pipeline = make_pipeline(StandardScaler(), model).fit(x, y)
        proto = skl2onnx.to_onnx(pipeline, x[:1].astype("float32"))
        path.write_bytes(proto.SerializeToString())
        report = ls.check(path)
        assert codes(report) == []
        assert not any("Batch" in kind for kind, _, _ in norms(report))
        assert ls.check(path, target=["onnxruntime"]).ok
        findings = ls.check(path, target=["openvino", "opencv"]).findings
        assert {"LS402", "LS403"} <= {finding.code for finding in findings}


# --- onnx's own test cases ------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    """Every test case of onnx for an operator: name → model."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case.model for case in collect_testcases(None)}


def test_every_case_of_onnx_is_judged(cases, tmp_path):
    """Without an error of its own, and right where normalization is the case."""
    assert len(cases) > 1000
    path = tmp_path / "m.onnx"
    for name, model in cases.items():
        path.write_bytes(model.SerializeToString())
        report = ls.check(path, target=TARGETS)
        found = codes(report)
        batch = name.startswith("test_batchnorm") and not name.endswith("expanded")
        assert ("LS101" in found) == batch, name
        assert "LS001" not in found, name
        if name.startswith(("test_instancenorm", "test_group_normalization", "test_batchnorm")):
            assert report.checked[0].layers or name.endswith("expanded"), name


def test_every_model_that_onnx_brings_along():
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    models = sorted(
        path for kind in ("simple", "pytorch-*") for path in data.glob(f"{kind}/*/*.onnx")
    )
    assert len(models) > 100
    for path in models:
        report = ls.check(path, target=TARGETS)
        kinds = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
        assert ("LS101" in codes(report)) == (("", "BatchNormalization") in kinds), path
        assert "LS001" not in codes(report), path
