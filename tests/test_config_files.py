"""The layers in a file's configuration against those of the model that tf_keras loads from it."""

import json
import os
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import tf_keras
from tf_keras import layers
from tf_keras.saving import register_keras_serializable
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

import layerswap as ls
from layerswap import keras_files, stock_names
from layerswap.config_files import check_config_file
from layerswap.errors import LoadError

FORMATS = {"keras": "model.keras", "h5": "model.h5", "savedmodel": "model"}
STOCK = (
    BatchNormalizationBase,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.Normalization,
    layers.SpectralNormalization,
    layers.UnitNormalization,
)
BUILDERS = {}


def builder(function):
    BUILDERS[function.__name__] = function
    return function


def bn(**kwargs):
    return layers.BatchNormalization(**kwargs)


@builder
def sequential():
    return tf_keras.Sequential([layers.Input((4, 4, 2)), layers.Conv2D(4, 1), bn(), layers.ReLU()])


@builder
def branches():
    x = inputs = layers.Input((4, 4, 2))
    y = bn(name="a")(layers.Conv2D(2, 1, kernel_regularizer="l2", kernel_constraint="max_norm")(x))
    x = layers.Add()([x, y]) * 2.0
    return tf_keras.Model(inputs, [layers.LayerNormalization()(x), layers.UnitNormalization()(x)])


@builder
def three_deep():
    inner = tf_keras.Sequential([layers.Input((8,)), layers.Dense(8), bn(name="n")], name="inner")
    inputs = layers.Input((8,))
    middle = tf_keras.Model(inputs, bn(name="m")(inner(inputs)), name="middle")
    inputs = layers.Input((8,))
    return tf_keras.Model(inputs, bn(name="o")(middle(inputs)))


@builder
def nested_used_twice():
    inner = tf_keras.Sequential([layers.Input((8,)), layers.Dense(8), bn(name="n")], name="inner")
    inputs = layers.Input((8,))
    return tf_keras.Model(inputs, inner(inner(inputs)))


@builder
def time_distributed_twice():
    inputs = layers.Input((3, 4, 5))
    both = layers.TimeDistributed(layers.TimeDistributed(bn(name="n"), name="in"), name="out")
    return tf_keras.Model(inputs, both(inputs))


@builder
def time_distributed_model():
    inner = tf_keras.Sequential([layers.Input((5,)), layers.Dense(4), bn(name="n")], name="inner")
    inputs = layers.Input((3, 5))
    return tf_keras.Model(inputs, layers.TimeDistributed(inner, name="steps")(inputs))


@builder
def recurrent():
    inputs = layers.Input((6, 4))
    cells = layers.StackedRNNCells([layers.LSTMCell(2), layers.GRUCell(3)])
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(inputs)
    return tf_keras.Model(inputs, bn()(layers.RNN(cells)(layers.GroupNormalization(4)(x))))


@builder
def synchronized():
    inputs = layers.Input((4, 4, 2))
    x = bn(synchronized=True)(inputs)
    return tf_keras.Model(inputs, layers.experimental.SyncBatchNormalization()(x))


def shared_by_two_parents():
    norm = bn(name="shared")
    inputs = layers.Input((8,))
    one = tf_keras.Model(inputs, norm(inputs), name="one")
    inputs = layers.Input((8,))
    two = tf_keras.Model(inputs, norm(layers.Dense(8)(inputs)), name="two")
    inputs = layers.Input((8,))
    return tf_keras.Model(inputs, two(one(inputs)))


@builder
def preprocessing_and_attention():
    inputs = layers.Input((5, 8))
    x = layers.Normalization(mean=0.5, variance=2.0)(inputs)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    return tf_keras.Model(inputs, layers.Identity()(x + inputs))


@builder
def mixed_precision():
    inputs = layers.Input((4, 4, 2))
    x = layers.Conv2D(4, 1, dtype="mixed_float16", kernel_initializer="ones")(inputs)
    return tf_keras.Model(inputs, bn(dtype="mixed_float16", gamma_regularizer="l1_l2")(x))


@register_keras_serializable("checks")
class Block(layers.Layer):
    """Keeps its layers where only the live object shows them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norms = [layers.LayerNormalization(), layers.BatchNormalization()]
        self.one = layers.BatchNormalization(name="one")

    def call(self, inputs):
        return self.one(self.norms[1](self.norms[0](inputs)))


@register_keras_serializable("checks")
class Subclassed(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()

    def call(self, inputs):
        return self.block(inputs)


def custom():
    inputs = layers.Input((4,))
    return tf_keras.Model(inputs, layers.Dense(2)(Block(name="block")(inputs)))


def save(model, format, folder):
    tf_keras.models.save_model(
        model, folder / FORMATS[format], save_format={"savedmodel": "tf"}.get(format, format)
    )
    return folder / FORMATS[format]


def paths(checked, *classes):
    return sorted(x.path for x in checked.layers if not classes or x.class_name in classes)


# --- against what tf_keras loads ------------------------------------------------------------


# A SavedModel takes seconds; the same code walks it.
AS_SAVED_MODEL = ("branches", "three_deep", "time_distributed_model")


@pytest.mark.parametrize(
    ("name", "format"),
    [(n, f) for n in BUILDERS for f in FORMATS if f != "savedmodel" or n in AS_SAVED_MODEL],
)
def test_every_normalization_layer_is_listed(name, format, tmp_path):
    tf_keras.utils.set_random_seed(0)
    model = BUILDERS[name]()
    path = save(model, format, tmp_path)
    checked, findings = check_config_file(path)
    loaded = tf_keras.models.load_model(path)
    truth = sorted(type(x).__name__ for x in set(loaded.submodules) if isinstance(x, STOCK))
    assert sorted(layer.class_name for layer in checked.layers) == truth
    assert {f.code for f in findings} <= {"LS101"}
    assert sorted(f.where for f in findings) == sorted(d.site.path for d in ls.plan(path).decisions)


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_that_two_models_share_is_listed_in_both(format, tmp_path):
    checked, findings = check_config_file(save(shared_by_two_parents(), format, tmp_path))
    assert paths(checked) == sorted(f.where for f in findings) == ["one/shared", "two/shared"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_in_the_place_of_an_activation(format, tmp_path):
    inputs = layers.Input((4,))
    x = layers.Dense(4, activation=bn(name="inside"), name="d")(inputs)
    _, findings = check_config_file(save(tf_keras.Model(inputs, x), format, tmp_path))
    assert [(f.code, f.where) for f in findings] == [("LS101", "d/activation")]


def test_parents_are_the_classes_that_hold_it(tmp_path):
    checked, _ = check_config_file(save(BUILDERS["three_deep"](), "keras", tmp_path))
    assert {x.path: x.parents for x in checked.layers} == {
        "o": ("Functional",),
        "middle/m": ("Functional", "Functional"),
        "middle/inner/n": ("Functional", "Functional", "Sequential"),
    }
    assert checked.examined == 9


def test_the_spectral_wrapper_and_what_it_wraps(tmp_path):
    # Built by hand: with Keras 3 beside it, tf_keras's own can't be.
    wrapper = layers.SpectralNormalization(layers.Dense(2, activation=bn(name="n")), name="s")
    config = layers.serialize(wrapper)
    model = {"class_name": "Sequential", "config": {"name": "m", "layers": [config]}}
    checked, findings = check_config_file(write_h5(tmp_path / "m.h5", model))
    assert [(x.path, x.class_name) for x in checked.layers] == [
        ("s", "SpectralNormalization"),
        ("s/layer/activation", "BatchNormalization"),
    ]
    assert [f.code for f in findings] == ["LS101"]


def test_every_layer_of_tf_keras_is_known():
    public = {
        name
        for module in (layers, layers.experimental, layers.experimental.preprocessing)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, layers.Layer)
    }
    # Those that need code of the user's, or live in a process of their own.
    assert public - stock_names.LAYERS <= {
        "DynamicEmbedding",
        "DynamicLookup",
        "PreprocessingLayer",
    }
    assert {"Functional", "Sequential", "TFOpLambda"} <= stock_names.LAYERS
    helpers = {
        name
        for module in (tf_keras.initializers, tf_keras.regularizers, tf_keras.constraints)
        for name in vars(module)
        if not name.startswith("_")
    }
    abstract = {"Constraint", "Initializer", "Regularizer", "deserialize", "get", "serialize"}
    assert helpers - abstract <= stock_names.HELPERS
    activations = {name for name in vars(tf_keras.activations) if not name.startswith("_")}
    assert activations - {"deserialize", "get", "serialize"} <= stock_names.ACTIVATIONS


# --- what isn't tf_keras --------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_custom_class_keeps_the_answer_open(format, tmp_path):
    checked, findings = check_config_file(save(custom(), format, tmp_path))
    (unknown,) = [f for f in findings if f.severity == "undetermined"]
    assert (unknown.code, unknown.where) == ("LS002", "block")
    assert "checks>Block" in unknown.message
    # A SavedModel notes every layer that Keras tracks.
    found = ["block/norms[0]", "block/norms[1]", "block/one"] if format == "savedmodel" else []
    assert paths(checked) == found


@pytest.mark.parametrize("format", ["keras", "savedmodel"])
def test_a_subclassed_model_keeps_the_answer_open(format, tmp_path):
    model = Subclassed()
    model(np.zeros((2, 4), np.float32))
    checked, findings = check_config_file(save(model, format, tmp_path))
    assert ("LS002", "") in {(f.code, f.where) for f in findings}
    if format == "savedmodel":
        assert paths(checked) == ["block/norms[0]", "block/norms[1]", "block/one"]


def double(x):
    return x * 2.0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (lambda: layers.Lambda(lambda x: x + 1.0, name="it"), "it"),
        (lambda: layers.Lambda(double, name="it"), "it"),
        (lambda: layers.Dense(3, activation=double, name="it"), "it/activation"),
        (lambda: layers.Dense(3, kernel_regularizer=double, name="it"), "it/kernel_regularizer"),
    ],
    ids=["lambda", "function", "activation", "regularizer"],
)
def test_a_foreign_function_keeps_the_answer_open(layer, where, format, tmp_path):
    inputs = layers.Input((4,))
    _, findings = check_config_file(save(tf_keras.Model(inputs, layer()(inputs)), format, tmp_path))
    assert [(f.severity, f.code, f.where) for f in findings] == [("undetermined", "LS003", where)]


@pytest.mark.parametrize(
    "item",
    [
        {"class_name": "Dense", "module": "mine"},
        {"class_name": "Dense", "module": None},
        {"class_name": "Dense", "module": "keras.layers", "registered_name": "mine>Dense"},
        {"class_name": "mine>Dense"},
        {"class_name": "Evil", "module": "keras.layers", "registered_name": None},
        {"class_name": "BatchNormalization", "module": "mine", "registered_name": "x>y"},
        {"class_name": "TFOpLambda", "config": {"name": "x", "function": "io.write_file"}},
        {"class_name": "SomeCell", "config": {}},
    ],
    ids=str,
)
def test_a_name_of_tf_keras_alone_is_no_proof(item, tmp_path):
    item = {"config": {"name": "x"}, **item}
    model = {"class_name": "Sequential", "config": {"name": "m", "layers": [item]}}
    checked, findings = check_config_file(write_h5(tmp_path / "m.h5", model))
    assert {f.severity for f in findings} == {"undetermined"}
    assert checked.layers == ()


@pytest.mark.parametrize("function", ["nn.batch_normalization", "compat.v1.nn.fused_batch_norm"])
def test_a_call_of_tensorflow_s_own_is_found(function, tmp_path):
    item = {"class_name": "TFOpLambda", "config": {"name": "x", "function": function}}
    model = {"class_name": "Sequential", "config": {"name": "m", "layers": [item]}}
    _, findings = check_config_file(write_h5(tmp_path / "m.h5", model))
    assert [(f.code, f.severity, f.where) for f in findings] == [("LS102", "error", "x")]


@pytest.mark.parametrize("form", [json.dumps, dict])
@pytest.mark.parametrize(("op", "count"), [("FusedBatchNormV3", 1), ("AddV2", 0)])
def test_an_operator_of_early_tensorflow_is_found(op, count, form, tmp_path):
    node = form({"name": "batch_norm/it", "op": op})
    item = {"class_name": "TensorFlowOpLayer", "config": {"name": "x", "node_def": node}}
    model = {"class_name": "Sequential", "config": {"name": "m", "layers": [item]}}
    _, findings = check_config_file(write_h5(tmp_path / "m.h5", model))
    assert [f.code for f in findings] == ["LS102"] * count


def test_layers_anywhere_in_a_foreign_configuration_are_found(tmp_path):
    norm = layers.serialize(bn(name="n"))
    config = {"name": "x", "parts": {"a": [norm, {"b": norm}]}, "activation": "mine"}
    item = {"class_name": "mine>Holder", "config": config}
    model = {"class_name": "Sequential", "config": [item]}  # as early Keras wrote it
    checked, findings = check_config_file(write_h5(tmp_path / "m.h5", model))
    assert paths(checked) == ["x/parts[a][0]", "x/parts[a][1][b]"]
    assert checked.layers[0].parents == ("Sequential", "mine>Holder")
    assert {f.where for f in findings if f.severity == "undetermined"} == {"x", "x/activation"}


# --- files that can't be read ---------------------------------------------------------------


def write_h5(path, config, **attributes):
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        for name, value in attributes.items():
            file.attrs[name] = value
    return path


def write_keras(path, config, version="2.21.0", weights=b""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", config)
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        if weights is not None:
            archive.writestr("model.weights.h5", weights)
    return path


def saved_model(path, metadata):
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"")
    if metadata is not None:
        (path / "keras_metadata.pb").write_bytes(metadata)
    return path


def truncated(path, digits):
    path.write_bytes(digits.read_bytes()[:5000])
    return path


EMPTY = '{"class_name": "Sequential", "config": {"layers": []}}'
NEWER = '{"class_name": "InputLayer", "config": {"batch_shape": [1]}}'
BAD = {
    "absent": ("no such file", lambda p, d: p / "absent.keras"),
    "suffix": ("suffix", lambda p, d: shutil.copy(d, p / "model.zip")),
    "truncated": ("cut short", lambda p, d: truncated(p / "m.keras", d)),
    "zip_as_h5": ("cut short", lambda p, d: shutil.copy(d, p / "m.h5")),
    "null": ("empty", lambda p, d: write_keras(p / "m.keras", "null")),
    "null_h5": ("empty", lambda p, d: write_h5(p / "m.h5", None)),
    "list": ("empty", lambda p, d: write_keras(p / "m.keras", "[]")),
    "no_class": ("not that of a model", lambda p, d: write_keras(p / "m.keras", "{}")),
    "no_json": ("can't be read", lambda p, d: write_keras(p / "m.keras", "{")),
    "deep": ("can't be read", lambda p, d: write_keras(p / "m.keras", "[" * 10**6)),
    "keras_3": ("Keras 3", lambda p, d: write_keras(p / "m.keras", EMPTY, "3.4.1")),
    "keras_3_h5": ("Keras 3", lambda p, d: write_h5(p / "m.h5", {}, keras_version="3.0")),
    "keras_3_unsaid": ("Keras 3", lambda p, d: write_keras(p / "m.keras", NEWER, None)),
    "no_weights": ("has no model", lambda p, d: write_keras(p / "m.keras", EMPTY, weights=None)),
    "weights_only": ("weights only", lambda p, d: h5py.File(p / "m.h5", "w").close() or p / "m.h5"),
    "folder": ("no SavedModel", lambda p, d: p),
    "tf_module": ("without a Keras model", lambda p, d: saved_model(p / "m", None)),
    "broken_metadata": ("can't be read", lambda p, d: saved_model(p / "m", b"\x0a\xff\xff")),
    "other_metadata": ("can't be read", lambda p, d: saved_model(p / "m", b"\x0f\xff\xff")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_t_be_read_is_said(name, digits, tmp_path):
    message, make = BAD[name]
    path = make(tmp_path, digits)
    with pytest.raises(LoadError, match=message) as caught:
        check_config_file(path)
    assert caught.value.where == str(path)
    assert caught.value.hint or name == "absent"


def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(keras_files, "_MAX_CONFIG", 1000)
    path = write_keras(tmp_path / "m.keras", EMPTY + " " * 10_000)
    with pytest.raises(LoadError, match="would unpack to"):
        check_config_file(path)


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.hdf5"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(LoadError, match="not a regular file"):
        check_config_file(tmp_path / name)


def test_a_damaged_configuration_is_noticed(tmp_path):
    path = write_keras(tmp_path / "m.keras", EMPTY)
    data = bytearray(path.read_bytes())
    data[45] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(LoadError, match="can't be read"):
        check_config_file(path)
