"""What the options of an export make of a model, checked in runtimes and in the file itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import layerswap as ls
from layerswap.errors import ExportError, LoadError, UsageError
from layerswap.onnx_graph import files
from layerswap.onnx_graph.opsets import newest_opset
from layerswap.records import PROFILE_OPSETS
from layerswap.references import load_reference, save_reference
from zoo import randomize


def network(shape=(16, 16, 3)):
    """Convolutions, GN-to-be behind each, a residual, an image and scores as outputs."""
    image = layers.Input(shape, name="image")
    x = layers.Conv2D(32, 3, padding="same", name="stem")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn1")(x))
    y = layers.BatchNormalization(name="bn2")(layers.Conv2D(32, 1, name="point")(x))
    x = layers.Add(name="sum")([x, y])
    picture = layers.Conv2D(4, 3, padding="same", name="picture")(x)
    scores = layers.Dense(5, name="scores")(layers.GlobalAveragePooling2D(name="pool")(x))
    model = tf_keras.Model(image, [picture, scores], name="net")
    randomize(model)
    return model


@pytest.fixture(scope="module")
def converted():
    return ls.swap(network(), groups=4)


@pytest.fixture(scope="module")
def open_converted():
    return ls.swap(network((None, None, 3)), groups=4)


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})


def assert_like_keras(outputs, model, x, tolerance=1e-5):
    for got, expected in zip(outputs, model(x), strict=True):
        expected = np.asarray(expected)
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def sizes(value):
    return [d.dim_value or "open" for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("form", PROFILE_OPSETS)
@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
def test_every_form_in_both_precisions(converted, tmp_path, form, fp16):
    path = tmp_path / "m.onnx"
    artifact = ls.export(converted, path, groupnorm=form, fp16=fp16)
    assert artifact.parity.ok
    assert artifact.opset == max(18, PROFILE_OPSETS[form])
    assert [f.code for f in artifact.findings] == ["native-groupnorm"] * (form == "native")
    x = images(5, 16, 16, 3)
    assert_like_keras(run(path, x), converted.model, x, 1e-2 if fp16 else 1e-5)
    assert ("BatchNormalization" in operators(path)) == (form in ("portable", "precise"))
    assert ("GroupNormalization" in operators(path)) == (form == "native")
    assert ls.check(path).ok
    if fp16:
        assert path.stat().st_size < 0.75 * ls.export(converted, tmp_path / "f32.onnx").bytes


@pytest.mark.parametrize("opset", range(13, newest_opset() + 1))
def test_every_opset(converted, tmp_path, opset):
    path = tmp_path / "m.onnx"
    artifact = ls.export(converted, path, opset=opset)
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert artifact.opset == opset
    onnx.checker.check_model(model, full_check=True)
    x = images(2, 16, 16, 3)
    assert_like_keras(run(path, x), converted.model, x)


def test_an_opset_that_is_too_new_is_refused_before_anything_is_loaded(converted, tmp_path):
    newest = newest_opset()
    with pytest.raises(UsageError, match=f"opset {newest + 1} is not supported.*is {newest}"):
        ls.export(converted, tmp_path / "m.onnx", opset=newest + 1)


def test_tuned_for_onnxruntime(converted, tmp_path):
    artifact = ls.export(converted, tmp_path / "m.onnx", target_runtime="onnxruntime")
    assert artifact.parity.ok
    assert ls.check(tmp_path / "m.onnx").ok
    assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
    x = images(3, 16, 16, 3)
    assert_like_keras(run(tmp_path / "m.onnx", x), converted.model, x)


@pytest.mark.parametrize("wanted", [(2, 16, 16, 3), (None, 16, None, 3), [None] * 4])
def test_shapes_are_fixed(open_converted, tmp_path, wanted):
    path = tmp_path / "m.onnx"
    artifact = ls.export(open_converted, path, input_shape=wanted)
    assert artifact.parity.ok
    assert artifact.parity.batches == ((2,) if wanted[0] else (1, 3))
    (image,) = onnx.load(path).graph.input
    assert sizes(image) == [n or "open" for n in (*wanted[:3], 3)]
    x = images(2, 16, 16, 3)
    assert_like_keras(run(path, x), open_converted.model, x)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((1, 8, 16, 3), r"input_shape 1,8,16,3 contradicts the model's \?,16,16,3"),
        ((1, 16, 3), r"input_shape 1,16,3 contradicts"),
        ({"picture": (1, 16, 16, 3)}, "say which of the inputs is meant: image=..."),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(converted, tmp_path, wanted, message):
    with pytest.raises(UsageError, match=message):
        ls.export(converted, tmp_path / "m.onnx", input_shape=wanted)
    assert list(tmp_path.iterdir()) == []


def test_several_inputs_are_fixed_by_name(tmp_path):
    a, b = layers.Input((3,), name="a"), layers.Input((None,), name="b")
    norm = layers.GroupNormalization(1, name="gn")(a)
    model = tf_keras.Model([a, b], layers.Concatenate(name="c")([norm, b]))
    ls.export(model, tmp_path / "m.onnx", input_shape={"b": (None, 2)})
    assert [sizes(v) for v in onnx.load(tmp_path / "m.onnx").graph.input] == [
        ["open", 3],
        ["open", 2],
    ]
    with pytest.raises(UsageError, match=r"say which of the inputs is meant: a=..., b=..."):
        ls.export(model, tmp_path / "n.onnx", input_shape=(1, 2))


def test_channels_first_outside(converted, tmp_path):
    path = tmp_path / "m.onnx"
    artifact = ls.export(converted, path, inputs_as_nchw=["image"], outputs_as_nchw=True)
    assert artifact.parity.ok
    graph = onnx.load(path).graph
    assert sizes(graph.input[0]) == ["open", 3, 16, 16]
    assert [sizes(v) for v in graph.output] == [["open", 4, 16, 16], ["open", 5]]
    assert "Transpose" not in operators(path)
    x = images(3, 16, 16, 3)
    picture, scores = run(path, np.moveaxis(x, -1, 1))
    assert_like_keras([np.moveaxis(picture, 1, -1), scores], converted.model, x)
    assert ls.verify(path).ok
    reference = load_reference(f"{path}.ref.npz")
    assert reference.source_outputs[1]["picture"].shape == (3, 4, 16, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs_as_nchw": "x"}, "there is no input 'x'; there is image"),
        ({"outputs_as_nchw": ["scores"]}, "output 'scores' has 2 axes; only one of 4"),
    ],
)
def test_a_layout_that_is_impossible_is_refused(converted, tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        ls.export(converted, tmp_path / "m.onnx", **fields)
    assert list(tmp_path.iterdir()) == []


def test_all_of_none_is_refused(tmp_path):
    model = tf_keras.Sequential([layers.Input((4,), name="x"), layers.GroupNormalization(2)])
    for field in ("inputs_as_nchw", "outputs_as_nchw"):
        with pytest.raises(UsageError, match=r"no (in|out)put has 4 axes"):
            ls.export(model, tmp_path / "m.onnx", **{field: True})
    with pytest.raises(UsageError, match=r"say which of the inputs is meant: x=\.\.\."):
        ls.export(model, tmp_path / "m.onnx", input_shape={"all": (1, 4), "x": (2, 4)})


def test_weights_beside_the_file_belong_to_it(converted, tmp_path):
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    artifact = ls.export(converted, path, external_data="always")
    assert artifact.bytes == path.stat().st_size + data.stat().st_size
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert ls.verify(path).ok
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with pytest.raises(ls.LayerswapError, match="isn't the one that the reference was made for"):
        ls.verify(path)
    with pytest.raises(UsageError, match=r"m\.onnx: exists already"):
        ls.export(converted, path)
    ls.export(converted, path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.ref.npz"]
    assert ls.verify(path).ok


def test_weights_that_one_file_cannot_hold(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SINGLE_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match="don't fit into a single ONNX file"):
        ls.export(converted, tmp_path / "m.onnx", external_data="never")
    assert list(tmp_path.iterdir()) == []
    ls.export(converted, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists()


def test_metadata_says_what_the_file_was_made_of(converted, tmp_path):
    def metadata(made, **fields):
        ls.export(made, tmp_path / "m.onnx", overwrite=True, verify=False, **fields)
        return {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}

    first = metadata(converted)
    assert first == metadata(converted, external_data="always")
    assert sorted(first) == [f"layerswap.{k}" for k in KEYS]
    assert json.loads(first["layerswap.swaps"])[0] == {
        "path": "bn1",
        "channels": 32,
        "groups": 4,
        "axis": 3,
        "epsilon": converted.plan.swaps[0].config["epsilon"],
        "weights": "match",
    }
    calls = json.loads(first["layerswap.groupnorms"])
    assert [(c["path"], c["groups"], c["rank"]) for c in calls] == [("bn1", 4, 4), ("bn2", 4, 4)]

    other = ls.swap(converted.source, groups=8)
    second = metadata(other)
    assert first["layerswap.source"] == second["layerswap.source"]
    for key in ("model", "policy", "swaps", "groupnorms"):
        assert first[f"layerswap.{key}"] != second[f"layerswap.{key}"]
    model = tf_keras.models.clone_model(converted.model)
    model.set_weights(converted.model.get_weights())
    plain = metadata(model)
    assert plain == {k: first[k] for k in ("layerswap.groupnorms", "layerswap.model")}
    weights = model.get_weights()
    weights[0][0, 0, 0, 0] += 1e-6
    model.set_weights(weights)
    assert metadata(model)["layerswap.model"] != plain["layerswap.model"]


KEYS = ["groupnorms", "model", "policy", "source", "swaps"]

EXPORT = """
import sys
import layerswap as ls
precise = {"groupnorm": "precise", "fp16": True, "opset": 21}
for fields in ({}, precise, {"target_runtime": "onnxruntime"}):
    name = "_".join(map(str, fields.values())) or "plain"
    ls.convert(sys.argv[1], f"{sys.argv[2]}/{name}.onnx", external_data="always", **fields)
ls.convert(sys.argv[1], f"{sys.argv[2]}/whole")
ls.convert(sys.argv[1], f"{sys.argv[2]}/served", serving_only=True)
"""


def test_the_same_bytes_in_every_process(tmp_path):
    source = tmp_path / "m.keras"
    network().save(source)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXPORT, str(source), str(folder)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        for seed, folder in enumerate(folders)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    written = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in folders
    ]
    # A reference holds Keras's answers, which depend on the order of its threads; TensorFlow
    # draws the content of fingerprint.pb at random.
    kept = [
        {n: c for n, c in each.items() if not n.endswith((".ref.npz", "fingerprint.pb"))}
        for each in written
    ]
    assert len(kept[0]) >= 6 + 3 + 2
    assert kept[0] == kept[1]


def test_a_model_with_its_own_groupnorm_and_a_batchnorm_left(tmp_path):
    """`export` is of use for any model: GN is decomposed, BN folded as usual."""
    model = tf_keras.Sequential(
        [
            layers.Input((8, 8, 3), name="image"),
            layers.Conv2D(8, 3, name="c1"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="r"),
            layers.Conv2D(8, 3, name="c2"),
            layers.GroupNormalization(2, name="gn"),
        ]
    )
    randomize(model)
    artifact = ls.export(model, tmp_path / "m.onnx", groupnorm="plain")
    assert artifact.drift is None
    assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
    x = images(2, 8, 8, 3)
    (got,) = run(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(got, model(x), atol=1e-5)


def test_loops_say_that_their_weights_were_frozen(tmp_path):
    model = tf_keras.Sequential(
        [layers.Input((5, 4)), layers.LSTM(6, return_sequences=True), layers.BatchNormalization()]
    )
    artifact = ls.export(ls.swap(model, groups=2), tmp_path / "m.onnx", opset=21)
    assert artifact.parity.ok
    assert [(f.code, f.severity) for f in artifact.findings] == [("weights-frozen", "info")]


class Quantized(layers.Layer):
    """Rounds to steps that follow from a matrix; tf2onnx writes them as numbers."""

    def build(self, shape):
        self.kernel = self.add_weight("kernel", (shape[-1], 4), initializer="glorot_uniform")

    def call(self, x):
        limit = tf.reduce_max(tf.abs(self.kernel))
        return x @ tf.quantization.fake_quant_with_min_max_vars(self.kernel, -limit, limit)


def test_an_operation_that_needs_a_weights_value_is_a_reason_that_is_given(tmp_path):
    rows = layers.Input((5, 3))
    model = tf_keras.Model(rows, layers.GroupNormalization(2)(Quantized()(rows)))
    artifact = ls.export(model, tmp_path / "m.onnx")
    assert artifact.parity.ok
    (finding,) = artifact.findings
    assert finding.code == "weights-frozen"
    assert "an operation whose ONNX form depends on a weight's value" in finding.message


def test_a_saved_model_to_serve_only(converted, tmp_path):
    path = tmp_path / "served"
    whole = ls.export(converted, tmp_path / "whole")
    artifact = ls.export(converted, path, serving_only=True)
    assert artifact.parity.ok
    assert artifact.parity.runtime == "savedmodel"
    assert artifact.reference == f"{path}.ref.npz"
    assert artifact.bytes < whole.bytes
    assert not (path / "keras_metadata.pb").exists()
    assert ls.verify(path).ok
    loaded = tf.saved_model.load(str(path))
    x = images(3, 16, 16, 3)
    results = loaded.signatures["serving_default"](tf.constant(x))
    assert_like_keras([results["picture"], results["scores"]], converted.model, x)
    with pytest.raises(ls.LayerswapError, match="Keras"):
        ls.load(path)


def test_a_table_of_words_is_served(tmp_path):
    words = layers.Input((), dtype="string", name="word")
    x = layers.Embedding(4, 8)(layers.StringLookup(vocabulary=["a", "b", "c"])(words))
    model = tf_keras.Model(words, layers.GroupNormalization(2)(x))
    ls.export(model, tmp_path / "served", serving_only=True, verify=False)
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    (got,) = loaded.signatures["serving_default"](tf.constant(["b", "?"])).values()
    np.testing.assert_allclose(got, model(tf.constant(["b", "?"])), atol=1e-6)


def test_a_symbolic_link_leads_to_all_of_the_artifact(converted, tmp_path):
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.onnx", tmp_path / "real" / "m.onnx"
    real.write_bytes(b"old")
    link.symlink_to(real)
    artifact = ls.export(converted, link, overwrite=True, external_data="always")
    names = ["m.onnx", "m.onnx.data", "m.onnx.ref.npz"]
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.onnx", "real"]
    assert link.is_symlink()
    assert artifact.path == str(link)
    assert ls.verify(link).ok
    assert ls.verify(real).ok


def test_a_reference_of_what_was_replaced_goes(converted, tmp_path):
    ls.export(converted, tmp_path / "m.onnx")
    nothing = tf_keras.Sequential([layers.Input((2,)), layers.Lambda(lambda x: x / 0.0)])
    artifact = ls.export(nothing, tmp_path / "m.onnx", overwrite=True, verify=False)
    assert artifact.reference is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_reference_that_leaves_out_an_output_proves_nothing(converted, tmp_path):
    path = tmp_path / "m.onnx"
    ls.export(converted, path)
    reference = load_reference(f"{path}.ref.npz")
    outputs = tuple({"scores": batch["scores"]} for batch in reference.outputs)
    partial = dataclasses.replace(reference, outputs=outputs, source_outputs=None)
    save_reference(partial, tmp_path / "partial.npz")
    with pytest.raises(LoadError, match="says nothing of the output picture"):
        ls.verify(path, tmp_path / "partial.npz")


@pytest.mark.parametrize("model", [5, None, ["m.keras"]])
def test_what_is_no_model_is_said_so(model, tmp_path):
    with pytest.raises(UsageError, match="is not a tf_keras model"):
        ls.export(model, tmp_path / "m.onnx")


def test_a_path_is_exported_but_not_onto_itself(tmp_path):
    network().save(tmp_path / "m.keras")
    assert ls.export(tmp_path / "m.keras", tmp_path / "m.onnx").parity.ok
    with pytest.raises(UsageError, match="would replace the model that it is made of"):
        ls.export(tmp_path / "m.keras", tmp_path / "m.keras", overwrite=True)


def test_inputs_of_different_batch_sizes_are_refused(tmp_path):
    a, b = layers.Input((4,), name="a"), layers.Input((4,), name="b")
    model = tf_keras.Model([a, b], [layers.ReLU(name="c")(a), layers.ReLU(name="d")(b)])
    shapes = {"a": (1, 4), "b": (2, 4)}
    for verify in (True, False):
        with pytest.raises(UsageError, match="different batch sizes: 1, 2"):
            ls.export(model, tmp_path / "m.onnx", input_shape=shapes, verify=verify)


@pytest.mark.parametrize("name", ["m.onnx", "m.keras", "m.h5", "m"])
def test_the_batch_of_a_first_call_is_not_the_only_one_proven(name, tmp_path):
    model = tf_keras.Sequential([layers.Dense(4), layers.BatchNormalization()])
    model(images(32, 5))
    model.save(tmp_path / "source.keras")
    source = ls.load(tmp_path / "source.keras")
    assert source.inputs[0].shape[0] == 32  # it is in the file
    artifact = ls.export(ls.swap(source, groups=2), tmp_path / name)
    assert artifact.parity.batches == (1, 3)


@pytest.mark.parametrize("name", ["m.onnx", "m.keras", "m"])
def test_the_batch_that_a_model_needs_is_the_one_proven(name, tmp_path):
    rows = layers.Input((6,), batch_size=4)
    shaped = layers.Reshape((3, 2))(rows) + tf.zeros((4, 3, 2))
    model = tf_keras.Model(rows, layers.GroupNormalization(2)(shaped))
    assert ls.export(model, tmp_path / name).parity.batches == (4,)


def test_options_are_given_in_one_way():
    model = tf_keras.Sequential([layers.Input((2,)), layers.Dense(2)])
    with pytest.raises(UsageError, match="keyword arguments"):
        ls.export(model, "m.onnx", 17)
    with pytest.raises(UsageError, match="did you mean 'opset'"):
        ls.export(model, "m.onnx", {"opsett": 17})


@pytest.mark.parametrize("name", ["m.onnx", "m.keras", "m.h5", "m"])
def test_recurrent_state_is_left_alone_and_starts_from_zero(name, tmp_path):
    steps = layers.Input((5, 6), batch_size=4)
    lstm = layers.LSTM(4, stateful=True, return_sequences=True)
    model = tf_keras.Model(steps, layers.BatchNormalization(name="bn")(lstm(steps)))
    model(images(4, 5, 6))
    states = [state.numpy() for state in lstm.states]
    artifact = ls.export(ls.swap(model, groups=2), tmp_path / name)
    assert artifact.parity.ok
    for state, before in zip(lstm.states, states, strict=True):
        assert before.any()
        np.testing.assert_array_equal(state, before)
