"""Every format there and back, every way to fail, and nothing harmed by any of them."""

import errno
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import oracle
from layerswap.errors import ExportError, LoadError, UsageError
from layerswap.keras_graph import inspection, storage
from layerswap.keras_graph.storage import is_revived, load, save

FORMATS = {"keras": "m.keras", "h5": "m.h5", "savedmodel": "m"}
every_format = pytest.mark.parametrize("format", FORMATS)


class Scale(tf_keras.layers.Layer):
    """A custom layer that isn't registered."""

    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", initializer="ones")

    def call(self, inputs):
        return inputs * self.factor


class Listed(tf_keras.layers.Layer):
    """Keeps its layers in a nested list, where `.keras` loses their weights."""

    def __init__(self, **options):
        super().__init__(**options)
        self.nested = [[tf_keras.layers.Dense(2)], [tf_keras.layers.Dense(2)]]

    def call(self, inputs):
        return self.nested[1][0](self.nested[0][0](inputs))


class Subclassed(tf_keras.Model):
    """A model without a configuration."""

    def __init__(self):
        super().__init__()
        self.dense = tf_keras.layers.Dense(4, name="dense")
        self.norm = tf_keras.layers.GroupNormalization(2, name="norm")

    def call(self, inputs):
        return self.norm(self.dense(inputs))


def randomized(model, seed=0):
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape))
    return model


def small(*extra, seed=0):
    """Dense, GroupNormalization and the extra layers."""
    x = y = tf_keras.Input((6,), name="features")
    y = tf_keras.layers.Dense(4, name="dense")(y)
    y = tf_keras.layers.GroupNormalization(2, epsilon=0.02, name="norm")(y)
    for layer in extra:
        y = layer(y)
    return randomized(tf_keras.Model(x, y, name="small"), seed)


def samples(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def tree(folder):
    """Every file below the folder with its bytes; hidden ones and folders count."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_keras(path, config, metadata="2.21.0", weights=b"", drop=(), **options):
    """A `.keras` file made by hand."""
    members = {
        "metadata.json": json.dumps({"keras_version": metadata}),
        "config.json": config if isinstance(config, str | bytes) else json.dumps(config),
        "model.weights.h5": weights or empty_h5(),
    }
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            if name not in drop:
                archive.writestr(name, content)


def empty_h5():
    buffer = io.BytesIO()
    h5py.File(buffer, "w").close()
    return buffer.getvalue()


def edit_config(path, change):
    """Rewrites the configuration inside a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    members["config.json"] = json.dumps(change(config) or config)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def layer_config(config, name):
    return next(layer for layer in config["config"]["layers"] if layer["name"] == name)


def refusal(path, match, **options):
    """The one LoadError of loading the path; it names the path and leaves it as it was."""
    before = tree(path) if path.is_dir() else path.exists() and path.read_bytes()
    with pytest.raises(LoadError, match=match) as caught:
        load(path, **options)
    assert caught.value.where == str(path)
    assert before == (tree(path) if path.is_dir() else path.exists() and path.read_bytes())
    return caught.value


# --- there and back -------------------------------------------------------------------------


@every_format
def test_round_trip(tmp_path, format):
    model, path, x = small(), tmp_path / FORMATS[format], samples(3, 6)
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, samples(3, 4), verbose=0)
    save(model, path, format)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    before = tree(tmp_path)
    loaded = load(path)
    plain = tf_keras.models.load_model(path)
    assert tree(tmp_path) == before
    for other in (loaded, plain):
        np.testing.assert_array_equal(other(x), model(x))
        assert type(other.get_layer("norm")) is tf_keras.layers.GroupNormalization
        assert isinstance(other.optimizer, tf_keras.optimizers.Adam)
        # tf_keras restores an optimizer's state from files, not from a SavedModel.
        assert other.optimizer.iterations.numpy() == (format != "savedmodel")
        assert not is_revived(other)
        assert not any(is_revived(layer) for layer in other.layers)


@every_format
def test_a_loaded_model_can_be_saved_in_every_format(tmp_path, format):
    model, x = small(), samples(3, 6)
    save(model, tmp_path / FORMATS[format], format)
    for other in FORMATS:
        target = tmp_path / f"again-{FORMATS[other]}"
        save(load(tmp_path / FORMATS[format]), target, other)
        np.testing.assert_array_equal(load(target)(x), model(x))


@every_format
def test_overwriting_twice(tmp_path, format):
    path, x = tmp_path / FORMATS[format], samples(3, 6)
    for seed in (0, 1, 2):
        model = small(seed=seed)
        save(model, path, format, overwrite=seed > 0)
        np.testing.assert_array_equal(tf_keras.models.load_model(path)(x), model(x))
        assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_hdf5_under_both_of_its_other_suffixes(tmp_path):
    save(small(), tmp_path / "m.h5", "h5")
    for name in ("m.hdf5", "early.keras"):  # tf_keras before 2.12 wrote HDF5 under .keras
        shutil.copy(tmp_path / "m.h5", tmp_path / name)
        assert load(tmp_path / name).name == "small"


def test_a_file_of_keras_2_from_before_tf_keras(tmp_path):
    save(small(), tmp_path / "m.keras", "keras")
    edit_config(
        tmp_path / "m.keras", lambda config: config.update(module="keras.src.engine.functional")
    )
    assert load(tmp_path / "m.keras").name == "small"


def test_a_string_as_the_path(tmp_path):
    save(small(), str(tmp_path / "m.keras"), "keras")
    assert load(str(tmp_path / "m.keras"))


def test_the_source_may_be_read_only(tmp_path, monkeypatch):
    save(small(), tmp_path / "m.keras", "keras")
    (tmp_path / "m.keras").chmod(0o444)
    stamp = (tmp_path / "m.keras").stat().st_mtime_ns
    load(tmp_path / "m.keras")
    assert (tmp_path / "m.keras").stat().st_mtime_ns == stamp


# --- SavedModel -----------------------------------------------------------------------------


def conv_model():
    x = tf_keras.Input((None, None, 3), name="image")
    y = tf_keras.layers.Conv2D(64, 3, name="conv")(x)
    y = tf_keras.layers.GroupNormalization(4, epsilon=0.02, name="norm")(y)
    y = tf_keras.layers.Conv2D(64, 3, name="scores")(y)
    return randomized(tf_keras.Model(x, y, name="net"))


def test_serving_signature_computes_group_norm(tmp_path):
    model = conv_model()
    save(model, tmp_path / "m", "savedmodel")
    served = tf.saved_model.load(tmp_path / "m").signatures["serving_default"]
    norm = model.get_layer("norm")
    for batch, size in ((1, 7), (3, 5)):
        x = samples(batch, size, size, 3)
        between = oracle.group_norm(
            model.get_layer("conv")(x).numpy(), 4, norm.gamma.numpy(), norm.beta.numpy(), 0.02
        )
        expected = model.get_layer("scores")(between.astype(np.float32))
        got = served(image=tf.constant(x))
        assert set(got) == {"scores"}
        np.testing.assert_allclose(got["scores"], expected, rtol=1e-4, atol=1e-3)


def test_variables_are_stored_once(tmp_path):
    model = conv_model()
    save(model, tmp_path / "m", "savedmodel")
    stored = (tmp_path / "m" / "variables" / "variables.data-00000-of-00001").stat().st_size
    assert stored < 4 * model.count_params() + 8192


def test_a_subclassed_model_as_saved_model_comes_back_revived(tmp_path):
    model, x = Subclassed(), samples(3, 6)
    model(x)
    save(model, tmp_path / "m", "savedmodel")
    revived = load(tmp_path / "m")
    assert is_revived(revived)
    assert not is_revived(revived.norm)
    np.testing.assert_array_equal(revived(x), model(x))
    served = tf.saved_model.load(tmp_path / "m").signatures["serving_default"]
    np.testing.assert_allclose(served(tf.constant(x))["output_1"], model(x), atol=1e-5)


def test_a_revived_layer_and_its_own_class(tmp_path):
    save(small(Scale(name="scale")), tmp_path / "m", "savedmodel")
    assert is_revived(load(tmp_path / "m").get_layer("scale"))
    known = load(tmp_path / "m", custom_objects={"Scale": Scale})
    assert type(known.get_layer("scale")) is Scale
    assert not is_revived(known.get_layer("scale"))


def stock_layers():
    """Stock layers with regularizers, constraints, activations and functions of their own."""
    layers = tf_keras.layers
    x = layers.Input((8, 8, 3), name="image")
    y = layers.Conv2D(8, 3, padding="same", kernel_regularizer="l2", bias_constraint="non_neg")(x)
    y = layers.GroupNormalization(4, gamma_regularizer="l1", name="norm")(y)
    y = layers.MaxPooling2D()(layers.Activation("swish")(y))
    y = layers.Dropout(0.5)(layers.PReLU(shared_axes=[1, 2])(tf.nn.relu(y) + 1.0))
    inner = tf_keras.Sequential([layers.Conv2D(8, 1), layers.LeakyReLU(0.2)], name="inner")
    y = layers.Reshape((4, 32))(inner(y))
    y = layers.Bidirectional(layers.LSTM(3))(layers.TimeDistributed(layers.Dense(4))(y))
    model = tf_keras.Model(x, layers.Dense(2, activity_regularizer="l2", name="scores")(y))
    model.get_layer("inner").trainable = False
    return randomized(model)


def is_traced(folder):
    return b"call_and_return_all_conditional_losses" in (folder / "saved_model.pb").read_bytes()


def test_without_traces_stock_layers_come_back_the_same(tmp_path):
    model, x = stock_layers(), samples(3, 8, 8, 3)
    model.compile("adam", "mse", metrics=["mae"])
    save(model, tmp_path / "lean", "savedmodel")
    tf_keras.models.save_model(model, tmp_path / "traced", save_format="tf")
    assert is_traced(tmp_path / "traced")
    assert not is_traced(tmp_path / "lean")
    lean, traced = (tf_keras.models.load_model(tmp_path / name) for name in ("lean", "traced"))
    assert not any(is_revived(layer) for layer in lean._flatten_layers())
    assert lean.get_config() == traced.get_config()
    assert lean.optimizer.get_config() == traced.optimizer.get_config()
    for ours, theirs in zip(lean._flatten_layers(), traced._flatten_layers(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.name == theirs.name
        assert ours.trainable == theirs.trainable
    for other in (model, traced):
        np.testing.assert_array_equal(lean(x), other(x))
        np.testing.assert_array_equal(lean.losses, other.losses)
        for ours, theirs in zip(lean.weights, other.weights, strict=True):
            assert ours.name == theirs.name
            np.testing.assert_array_equal(ours, theirs)
    served = tf.saved_model.load(tmp_path / "lean").signatures["serving_default"]
    np.testing.assert_allclose(served(image=x)["scores"], model(x), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        Scale(name="scale"),
        tf_keras.layers.TimeDistributed(Scale(name="scale")),
        tf_keras.layers.Dense(2, activation=tf.math.sin, name="sine"),
        tf_keras.layers.Dense(
            2, kernel_initializer=lambda shape, dtype: tf.ones(shape), name="ones"
        ),
        tf_keras.layers.ReLU(activity_regularizer="l2"),
        tf_keras.Sequential([tf_keras.layers.Dense(2), Scale(name="scale")]),
    ],
)
def test_what_a_configuration_leaves_out_is_traced(tmp_path, layer):
    wide = tf_keras.layers.Reshape((2, 2))
    model, x = small(wide, layer), samples(3, 6)
    save(model, tmp_path / "m", "savedmodel")
    assert is_traced(tmp_path / "m")
    loaded = tf_keras.models.load_model(tmp_path / "m")
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_array_equal(loaded.losses, model.losses)


def test_a_loss_added_to_the_model_is_traced(tmp_path):
    model = small()
    model.add_loss(lambda: tf.reduce_sum(model.get_layer("dense").kernel))
    save(model, tmp_path / "m", "savedmodel")
    loaded = tf_keras.models.load_model(tmp_path / "m")
    np.testing.assert_array_equal(loaded.losses, model.losses)


# --- custom objects -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["keras", "h5"])
def test_custom_objects_are_known_during_the_load_only(tmp_path, format):
    model, path, x = small(Scale(name="scale")), tmp_path / FORMATS[format], samples(3, 6)
    save(model, path, format)
    np.testing.assert_array_equal(load(path, custom_objects={"Scale": Scale})(x), model(x))
    error = refusal(path, "'Scale'")
    assert "--custom-objects" in error.hint
    assert "custom_objects={'Scale'" in error.hint


def test_a_registered_class_needs_no_mention(tmp_path):
    registered = tf_keras.saving.register_keras_serializable("storage_test", "Registered")(
        type("Registered", (Scale,), {})
    )
    save(small(registered(name="scale")), tmp_path / "m.keras", "keras")
    assert isinstance(load(tmp_path / "m.keras").get_layer("scale"), registered)


@pytest.mark.parametrize("format", ["keras", "h5"])
def test_an_unknown_loss_is_named(tmp_path, format):
    def my_loss(truth, prediction):
        return tf.reduce_mean(tf.square(truth - prediction))

    model, path = small(), tmp_path / FORMATS[format]
    model.compile("sgd", my_loss)
    save(model, path, format)
    assert "my_loss" in refusal(path, "'my_loss'").hint
    assert load(path, custom_objects={"my_loss": my_loss}).loss is my_loss


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "Popen"),
        ("this_module_would_be_imported", "Layer"),
        ("keras.utils", "get_file"),
        ("tf_keras.src.utils.data_utils", "get_file"),
        ("keras_evil", "Layer"),
        ("tensorflow", "Module"),
    ],
)
def test_modules_named_by_the_file_are_not_imported(tmp_path, module, name):
    save(small(), tmp_path / "m.keras", "keras")
    edit_config(
        tmp_path / "m.keras",
        lambda config: layer_config(config, "norm").update(module=module, class_name=name),
    )
    refusal(tmp_path / "m.keras", f"'{name}'")


@pytest.mark.parametrize(("module", "name"), [("builtins", "eval"), ("os", "system")])
def test_functions_named_by_the_file_are_not_fetched(tmp_path, module, name):
    save(small(), tmp_path / "m.keras", "keras")
    function = {"class_name": "function", "module": module, "config": name}
    edit_config(
        tmp_path / "m.keras",
        lambda config: layer_config(config, "dense")["config"].update(activation=function),
    )
    refusal(tmp_path / "m.keras", f"'{name}'")


# --- code -----------------------------------------------------------------------------------


def nested_lambda():
    """A Lambda in a TimeDistributed in a model in a model."""
    inner_in = tf_keras.Input((5, 4))
    wrapped = tf_keras.layers.TimeDistributed(
        tf_keras.layers.Lambda(lambda t: t * 3.0, name="triple"), name="steps"
    )
    inner = tf_keras.Model(inner_in, wrapped(inner_in), name="inner")
    x = tf_keras.Input((5, 4), name="features")
    return tf_keras.Model(x, inner(x), name="outer")


@every_format
def test_a_lambda_is_not_run_unasked(tmp_path, format):
    model, path, x = nested_lambda(), tmp_path / FORMATS[format], samples(3, 5, 4)
    save(model, path, format)
    error = refusal(path, "inner/steps/triple")
    assert "--unsafe" in error.hint
    np.testing.assert_allclose(load(path, unsafe=True)(x), 3 * x, rtol=1e-6)


@every_format
def test_the_bytecode_never_runs(tmp_path, format):
    """What the file carries would leave a mark: nothing may, however it is packed."""
    mark = tmp_path / "mark"
    code = f"lambda t: (open({str(mark)!r}, 'w'), t)[1]"
    model, path = small(tf_keras.layers.Lambda(eval(code), name="evil")), tmp_path / FORMATS[format]
    save(model, path, format)
    mark.unlink()
    refusal(path, "evil")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["output_shape", "mask"])
def test_bytecode_in_the_other_functions_of_a_lambda(tmp_path, key):
    layer = tf_keras.layers.Lambda(lambda t: t, name="evil")
    save(small(layer), tmp_path / "m.h5", "h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        inner = layer_config(config, "evil")["config"]
        inner[key], inner[f"{key}_type"] = inner["function"], "lambda"
        inner["function"], inner["function_type"] = "relu", "function"
        file.attrs["model_config"] = json.dumps(config)
    refusal(tmp_path / "m.h5", "evil")


def test_a_lambda_as_an_activation(tmp_path):
    path = tmp_path / "m.keras"
    save(small(), path, "keras")
    code = {"class_name": "__lambda__", "config": {"value": ["4wA=", None, None]}}
    edit_config(path, lambda c: layer_config(c, "dense")["config"].update(activation=code))
    refusal(path, "code.*: dense")


def with_operation(path, function, inbound):
    """An `.h5` model with a layer that calls a TensorFlow function by name."""
    x = tf_keras.Input((4,), name="x")
    tf_keras.Model(x, tf.math.add(x, 1.0)).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layer = json.loads(json.dumps(config["config"]["layers"][1]))
        layer["name"] = layer["config"]["name"] = "operation"
        layer["config"]["function"], layer["inbound_nodes"] = function, [inbound]
        config["config"]["layers"].append(layer)
        file.attrs["model_config"] = json.dumps(config)


def test_a_layer_that_writes_a_file_while_it_is_loaded(tmp_path):
    mark = tmp_path / "mark"
    inbound = ["_CONSTANT_VALUE", -1, str(mark), {"contents": "x"}]
    with_operation(tmp_path / "m.h5", "io.write_file", inbound)
    refusal(tmp_path / "m.h5", "code.*: operation")
    assert not mark.exists()


@pytest.mark.parametrize(
    "function",
    [
        "load_op_library",
        "compat.v1.write_file",
        "compat.v1.gfile.Remove",
        "raw_ops.WriteFile",
        "data.Dataset",
        "py_function",
        "numpy_function",
        "keras.models.load_model",
        "io.read_file",
    ],
)
def test_functions_that_reach_outside_the_model(tmp_path, function):
    with_operation(tmp_path / "m.h5", function, ["x", 0, 0, {}])
    refusal(tmp_path / "m.h5", "code.*: operation")


@every_format
def test_plain_operations_are_no_code(tmp_path, format):
    x = tf_keras.Input((4,), name="x")
    y = tf.transpose(tf.math.add(x, 1.0))[0]
    y = tf.gather(tf.concat([tf.reshape(y, [-1]), tf.nn.relu(y)], 0), [0])
    save(tf_keras.Model(x, y), tmp_path / FORMATS[format], format)
    assert load(tmp_path / FORMATS[format])


def test_a_saved_model_from_before_its_metadata_file(tmp_path):
    """TensorFlow 2.4 kept the metadata in saved_model.pb; the Lambda is found there, too."""
    from tensorflow.core.protobuf import saved_model_pb2
    from tf_keras.protobuf import saved_metadata_pb2

    save(small(tf_keras.layers.Lambda(lambda t: t, name="evil")), tmp_path / "m", "savedmodel")
    metadata = saved_metadata_pb2.SavedMetadata()
    metadata.ParseFromString((tmp_path / "m" / "keras_metadata.pb").read_bytes())
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((tmp_path / "m" / "saved_model.pb").read_bytes())
    for node in metadata.nodes:
        user = saved.meta_graphs[0].object_graph_def.nodes[node.node_id].user_object
        user.identifier, user.metadata = node.identifier, node.metadata
    (tmp_path / "m" / "saved_model.pb").write_bytes(saved.SerializeToString())
    (tmp_path / "m" / "keras_metadata.pb").unlink()
    refusal(tmp_path / "m", "evil")
    assert load(tmp_path / "m", unsafe=True)


# --- what can't be loaded -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m"])
def test_a_missing_path(tmp_path, name):
    refusal(tmp_path / name, "no such file")


@pytest.mark.parametrize("name", ["m.onnx", "m.txt", "m.KERAS", "m"])
def test_another_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"something")
    assert ".keras" in refusal(tmp_path / name, "suffix").hint


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.hdf5"])
@pytest.mark.parametrize("content", [b"", b"PK", b"not a model", b"\x89HDF\r\n\x1a\n"])
def test_contents_that_are_no_model(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name, ".")


def test_a_folder_that_is_no_saved_model(tmp_path):
    (tmp_path / "stuff").write_bytes(b"")
    refusal(tmp_path, "no SavedModel")


@every_format
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, format, share):
    path = tmp_path / FORMATS[format]
    save(small(), path, format)
    file = path / "saved_model.pb" if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refusal(path, ".")


def test_a_flipped_bit_in_the_weights(tmp_path):
    model = small()
    save(model, tmp_path / "m.keras", "keras")
    content = bytearray((tmp_path / "m.keras").read_bytes())
    content[content.find(model.get_layer("dense").kernel.numpy().tobytes()) + 9] ^= 1
    (tmp_path / "m.keras").write_bytes(content)
    refusal(tmp_path / "m.keras", "damaged")


@pytest.mark.parametrize("missing", ["config.json", "model.weights.h5"])
def test_a_zip_without(tmp_path, missing):
    write_keras(tmp_path / "m.keras", {"class_name": "Functional"}, drop=[missing])
    refusal(tmp_path / "m.keras", missing)


@pytest.mark.parametrize("config", ["null", "[]", "3"])
def test_no_configuration(tmp_path, config):
    write_keras(tmp_path / "m.keras", config)
    refusal(tmp_path / "m.keras", "configuration is empty")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = config
        file.create_group("model_weights")
    refusal(tmp_path / "m.h5", "configuration is empty")


@pytest.mark.parametrize("config", ["", "{", b"\xff\xfe", "{}", "[" * 100_000])
def test_a_broken_configuration(tmp_path, config):
    write_keras(tmp_path / "m.keras", config)
    refusal(tmp_path / "m.keras", ".")


def test_a_layer_alone(tmp_path):
    config = tf_keras.saving.serialize_keras_object(tf_keras.layers.ReLU(name="relu"))
    write_keras(tmp_path / "m.keras", config)
    refusal(tmp_path / "m.keras", "holds a ReLU|can't rebuild")


def test_weights_only(tmp_path):
    small().save_weights(tmp_path / "w.h5")
    assert "load_weights" in refusal(tmp_path / "w.h5", "weights only").hint
    small().save_weights(tmp_path / "v3.weights.h5")
    refusal(tmp_path / "v3.weights.h5", "weights only")


def test_h5_without_weights(tmp_path):
    save(small(), tmp_path / "m.h5", "h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        del file["model_weights"]["dense"]
        layers = [name for name in file["model_weights"].attrs["layer_names"] if name != b"dense"]
        file["model_weights"].attrs["layer_names"] = layers
    refusal(tmp_path / "m.h5", "can't rebuild")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        del file["model_weights"]
    refusal(tmp_path / "m.h5", "no weights")


def test_keras_without_some_weights(tmp_path):
    save(small(), tmp_path / "m.keras", "keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        config = archive.read("config.json")
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights, "r+") as file:
        del file["layers"]["dense"]
    write_keras(tmp_path / "m.keras", config, weights=weights.getvalue())
    refusal(tmp_path / "m.keras", "dense")
    write_keras(tmp_path / "m.keras", config)
    refusal(tmp_path / "m.keras", "can't rebuild")


def test_weights_that_tf_keras_never_looks_for(tmp_path):
    """It neither saves nor loads the weights of layers in nested lists, and says nothing."""
    model = small(Listed(name="listed"))
    model.compile("sgd", "mse", metrics=[tf_keras.metrics.AUC()])  # their variables don't count
    model.fit(samples(2, 6), np.ones((2, 2)), verbose=0)
    tf_keras.models.save_model(model, tmp_path / "m.keras")
    known = {"Listed": Listed}
    assert ".h5" in refusal(tmp_path / "m.keras", "lacks 4", custom_objects=known).hint
    with pytest.raises(ExportError, match="leaves out 4"):
        save(model, tmp_path / "n.keras", "keras")
    save(model, tmp_path / "n.h5", "h5")
    x = samples(3, 6)
    np.testing.assert_array_equal(load(tmp_path / "n.h5", custom_objects=known)(x), model(x))


def test_adapted_bins_that_tf_keras_would_drop(tmp_path):
    """A `.keras` file loses them without a word; the other formats keep them."""
    layer = tf_keras.layers.Discretization(num_bins=4, name="bins")
    values = np.arange(100.0).reshape(-1, 1)
    layer.adapt(values)
    x = tf_keras.Input((1,), name="x")
    model = tf_keras.Model(x, layer(x))
    with pytest.raises(ExportError, match="'bins'"):
        save(model, tmp_path / "m.keras", "keras")
    save(model, tmp_path / "m.h5", "h5")
    np.testing.assert_array_equal(load(tmp_path / "m.h5")(values), model(values))
    fixed = tf_keras.layers.Discretization([10.0, 50.0])
    model = tf_keras.Model(x, fixed(x))
    save(model, tmp_path / "m.keras", "keras")
    np.testing.assert_array_equal(load(tmp_path / "m.keras")(values), model(values))


def test_a_layer_with_a_metric_of_its_own(tmp_path):
    class Counting(tf_keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.counter = tf_keras.metrics.Mean(name="counter")

        def call(self, inputs):
            self.add_metric(self.counter(inputs))
            return inputs

    model = small(Counting(name="counting"))
    model.compile("sgd", "mse")
    model.fit(samples(2, 6), samples(2, 4), verbose=0)
    save(model, tmp_path / "m.keras", "keras")
    assert load(tmp_path / "m.keras", custom_objects={"Counting": Counting})


def test_saved_model_without_variables(tmp_path):
    save(small(), tmp_path / "m", "savedmodel")
    shutil.rmtree(tmp_path / "m" / "variables")
    refusal(tmp_path / "m", "can't rebuild")


def test_saved_model_with_broken_metadata(tmp_path):
    save(small(), tmp_path / "m", "savedmodel")
    (tmp_path / "m" / "keras_metadata.pb").write_bytes(b"\xff\xff\xff")
    refusal(tmp_path / "m", ".")


def test_a_module_is_no_keras_model(tmp_path):
    module = tf.Module()
    module.serve = tf.function(lambda x: x, input_signature=[tf.TensorSpec([None], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "m"))
    error = refusal(tmp_path / "m", r"tf\.Module")
    assert "Keras 3" in str(error)


# --- bombs ----------------------------------------------------------------------------------


def test_a_zip_bomb_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "m.keras"
    monkeypatch.setattr(inspection, "_ALLOWANCE", 1 << 20)
    write_keras(path, {}, weights=bytes(1 << 22), compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("was extracted"))
    refusal(path, "bomb")


def test_a_member_larger_than_it_says(tmp_path):
    """A header that lies about the size ends in a checksum error, not in a full memory."""
    path = tmp_path / "m.keras"
    write_keras(path, {}, weights=bytes(1 << 16), compression=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    assert content.count((1 << 16).to_bytes(4, "little")) == 2
    path.write_bytes(content.replace((1 << 16).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    refusal(path, "damaged")


@pytest.mark.parametrize("format", ["keras", "h5"])
def test_a_dataset_that_claims_to_be_enormous(tmp_path, format):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = "{}"
        file.create_dataset("vars/0", shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))
    path = tmp_path / FORMATS[format]
    if format == "h5":
        path.write_bytes(buffer.getvalue())
    else:
        write_keras(path, {"class_name": "Functional"}, weights=buffer.getvalue())
    refusal(path, "bomb")


def test_a_compressed_archive_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_ALLOWANCE", 0)
    save(small(), tmp_path / "m.keras", "keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert load(tmp_path / "m.keras").name == "small"


# --- Keras 3 --------------------------------------------------------------------------------

KERAS_3 = {
    "module": "keras.src.models.functional",
    "class_name": "Functional",
    "config": {
        "name": "functional",
        "trainable": True,
        "layers": [
            {
                "module": "keras.layers",
                "class_name": "InputLayer",
                "config": {"batch_shape": [None, 4], "dtype": "float32", "name": "x"},
                "registered_name": None,
                "name": "x",
                "inbound_nodes": [],
            }
        ],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["x", 0, 0]],
    },
    "registered_name": "Functional",
    "build_config": {"input_shape": None},
}


@pytest.mark.parametrize("version", ["3.8.0", "3.12.1", "4.0", None])
def test_keras_3_archive(tmp_path, version):
    write_keras(tmp_path / "m.keras", KERAS_3, metadata=version)
    assert "TF_USE_LEGACY_KERAS=1" in refusal(tmp_path / "m.keras", "Keras 3|Keras 4").hint


def test_keras_3_archive_without_metadata(tmp_path):
    write_keras(tmp_path / "m.keras", KERAS_3, drop=["metadata.json"])
    refusal(tmp_path / "m.keras", "Keras 3")


@pytest.mark.parametrize("version", ["3.8.0", np.bytes_(b"3.8.0"), None])
def test_keras_3_h5(tmp_path, version):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(KERAS_3)
        file.create_group("model_weights")
        if version is not None:
            file.attrs["keras_version"] = version
    assert "TF_USE_LEGACY_KERAS=1" in refusal(tmp_path / "m.h5", "Keras 3").hint


def test_keras_3_saved_model(tmp_path):
    """What Keras 3 exports: functions and variables, but none of the model's layers."""
    archive = tf.Module()
    archive.variables_ = [tf.Variable([1.0], name="kernel")]
    spec = [tf.TensorSpec([None, 1], tf.float32, name="x")]
    archive.serve = tf.function(lambda x: x * archive.variables_[0], input_signature=spec)
    signatures = {"serving_default": archive.serve.get_concrete_function()}
    tf.saved_model.save(archive, str(tmp_path / "m"), signatures=signatures)
    assert "TF_USE_LEGACY_KERAS=1" in refusal(tmp_path / "m", "Keras 3").hint


# --- what can't be saved --------------------------------------------------------------------


@every_format
def test_an_existing_target_needs_permission(tmp_path, format):
    path = tmp_path / FORMATS[format]
    save(small(), path, format)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="--force"):
        save(small(seed=1), path, format)
    assert tree(tmp_path) == before


@every_format
def test_a_missing_parent_folder(tmp_path, format):
    with pytest.raises(ExportError, match="does not exist"):
        save(small(), tmp_path / "absent" / FORMATS[format], format)


def test_an_unknown_format_and_a_wrong_suffix(tmp_path):
    with pytest.raises(UsageError, match="unknown format"):
        save(small(), tmp_path / "m", "tflite")
    with pytest.raises(UsageError, match=r"suffix \.keras"):
        save(small(), tmp_path / "m.zip", "keras")


def test_a_precious_folder_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_bytes(b"years")
    with pytest.raises(UsageError, match="never replaced"):
        save(small(), tmp_path / "m", "savedmodel", overwrite=True)
    assert tree(tmp_path) == {"m": None, "m/thesis.tex": b"years"}


def test_a_subclassed_model_in_h5(tmp_path):
    model = Subclassed()
    model(samples(2, 6))
    with pytest.raises(ExportError, match="h5") as caught:
        save(model, tmp_path / "m.h5", "h5")
    assert "savedmodel" in caught.value.hint
    assert tree(tmp_path) == {}


@every_format
def test_a_model_that_was_never_called(tmp_path, format):
    with pytest.raises(ExportError, match="isn't built"):
        save(Subclassed(), tmp_path / FORMATS[format], format)
    assert tree(tmp_path) == {}


def test_a_model_built_without_ever_being_called(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(2)])
    model.built = True
    with pytest.raises(ExportError, match="isn't known"):
        save(model, tmp_path / "m", "savedmodel")
    assert tree(tmp_path) == {}


def test_a_layer_without_a_configuration(tmp_path):
    class Unserializable(Scale):
        def get_config(self):
            raise NotImplementedError("no configuration")

    model = small(Unserializable(name="scale"))
    for format in ("keras", "h5"):
        with pytest.raises(ExportError, match="no configuration"):
            save(model, tmp_path / FORMATS[format], format)
    assert tree(tmp_path) == {}


def test_variables_of_the_same_name_in_h5(tmp_path):
    class Twins(tf_keras.layers.Layer):
        def build(self, input_shape):
            self.one = tf.Variable(1.0, name="gamma")
            self.two = tf.Variable(2.0, name="gamma")

        def call(self, inputs):
            return inputs * self.one + self.two

    with pytest.raises(ExportError, match="name"):
        save(small(Twins(name="twins")), tmp_path / "m.h5", "h5")
    assert tree(tmp_path) == {}


# --- what goes wrong while saving -----------------------------------------------------------

LAST_CALL = {
    "keras": (zipfile.ZipFile, "writestr"),
    "h5": (Path, "write_bytes"),
    "savedmodel": (tf_keras.models, "save_model"),
}


def failing_after(function, error):
    """The function, followed by the error: the worst moment, everything half written."""

    def wrapper(*args, **kwargs):
        function(*args, **kwargs)
        raise error

    return wrapper


@every_format
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_midway(tmp_path, monkeypatch, format, error, existing):
    path, model = tmp_path / FORMATS[format], small()
    if existing:
        save(model, path, format)
    before = tree(tmp_path)
    owner, name = LAST_CALL[format]
    monkeypatch.setattr(owner, name, failing_after(getattr(owner, name), error))
    expected = ExportError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(small(seed=1), path, format, overwrite=True)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert tree(tmp_path) == before
    if existing:
        np.testing.assert_array_equal(load(path)(samples(2, 6)), model(samples(2, 6)))


@pytest.mark.parametrize("format", ["keras", "h5"])
def test_a_full_disk(tmp_path, monkeypatch, format):
    """Writes through to the device that is always full; HDF5 must not take us down."""
    path = tmp_path / FORMATS[format]
    save(small(), path, format)
    before = tree(tmp_path)
    write = storage._WRITERS[format]

    def to_full(model, temporary):
        temporary.symlink_to("/dev/full")
        write(model, temporary)

    monkeypatch.setitem(storage._WRITERS, format, to_full)
    with pytest.raises(ExportError, match="No space left"):
        save(small(seed=1), path, format, overwrite=True)
    assert tree(tmp_path) == before


@every_format
def test_a_read_only_folder(tmp_path, monkeypatch, format):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="can't be written to"):
        save(small(), tmp_path / FORMATS[format], format)
    assert tree(tmp_path) == {}


@every_format
def test_saving_does_not_change_the_model(tmp_path, format):
    model, x = small(), samples(3, 6)
    model.compile("adam", "mse")
    before, weights = model.predict(x, verbose=0), model.get_weights()
    save(model, tmp_path / FORMATS[format], format)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    for ours, theirs in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert model.optimizer is not None
