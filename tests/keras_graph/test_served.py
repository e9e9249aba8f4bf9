"""A SavedModel's signature is run as it is, by its own names, without Keras."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import layerswap as ls
from layerswap.errors import ExportError, LoadError, MissingExtraError
from layerswap.keras_graph import storage
from layerswap.keras_graph.served import SavedModel
from layerswap.references import load_reference, reference_path
from layerswap.verifying import verify

RNG = np.random.default_rng(7)

# A program that knows nothing of layerswap or Keras. Their imports fail.
PLAIN = """
import sys
for name in ("layerswap", "tf_keras"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf
folder, reference = sys.argv[1:]
signature = tf.saved_model.load(folder).signatures["serving_default"]
arrays = np.load(reference)
names = [name.split("/", 2) for name in arrays.files if name.startswith("outputs/")]
assert names
for _, batch, output in names:
    inputs = {
        name.split("/", 2)[2]: tf.constant(arrays[name])
        for name in arrays.files
        if name.startswith(f"inputs/{batch}/")
    }
    error = np.abs(signature(**inputs)[output] - arrays[f"outputs/{batch}/{output}"]).max()
    assert error < 1e-4, error
    print(batch, output)
"""


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def save(model, folder):
    storage.save(model, folder, "savedmodel")
    return folder


@pytest.fixture
def folder(tmp_path):
    x = layers.Input((4,), name="x")
    model = tf_keras.Model(x, layers.Dense(2, name="y")(x))
    return save(model, tmp_path / "model")


# --- what it computes -----------------------------------------------------------------------


def test_several_inputs_and_outputs_of_every_rank(tmp_path):
    shapes = {"two": (3,), "three": (4, 3), "four": (4, 5, 3), "five": (2, 4, 5, 3)}
    inputs = {name: layers.Input(shape, name=name) for name, shape in shapes.items()}
    outputs = {n: layers.Dense(2, name=f"{n}_out")(x) for n, x in inputs.items()}
    model = tf_keras.Model(inputs, outputs)
    path = save(model, tmp_path / "model")
    for batch in (1, 3):
        arrays = {name: normal(batch, *shape) for name, shape in shapes.items()}
        got = SavedModel().session(path)(arrays)
        expected = model(arrays)
        assert got.keys() == {f"{name}_out" for name in shapes}
        for name in shapes:
            assert type(got[f"{name}_out"]) is np.ndarray
            np.testing.assert_allclose(got[f"{name}_out"], expected[name], atol=1e-5)


@pytest.mark.parametrize(
    "names", [("b-1", "a-2"), ("1x", "0x"), ("block/z", "a.b"), ("input_10", "input_9")]
)
def test_inputs_that_tensorflow_renames(names, tmp_path):
    """They are not in Keras's order afterwards, so that only the names tell them apart."""
    first, second = (layers.Input((3,), name=name) for name in names)
    model = tf_keras.Model([first, second], layers.Subtract(name="y")([first, second]))
    path = save(model, tmp_path / "model")
    arrays = {name: normal(2, 3) for name in names}
    expected = arrays[names[0]] - arrays[names[1]]
    np.testing.assert_allclose(SavedModel().session(path)(arrays)["y"], expected)
    swapped = dict(reversed(arrays.items()))  # as a reference file has them: in any order
    np.testing.assert_allclose(SavedModel().session(path)(swapped)["y"], expected)
    assert ls.export(model, path, overwrite=True).parity.ok


class Named(tf_keras.Model):
    """Takes a dictionary; Keras has no names for its inputs."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs["b"]) - inputs["a"]


def test_a_subclassed_model_of_named_inputs(tmp_path):
    model = Named()
    model({"b": normal(2, 4), "a": normal(2, 2)})
    artifact = ls.export(model, tmp_path / "model")
    assert artifact.parity.ok
    assert load_reference(reference_path(tmp_path / "model")).inputs[0].keys() == {"a", "b"}
    assert verify(tmp_path / "model").ok


def test_a_program_without_layerswap_and_tf_keras(digits, tmp_path):
    report = ls.convert(digits, tmp_path / "gn")
    assert report.ok
    arguments = [tmp_path / "gn", reference_path(tmp_path / "gn")]
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0 digit", "1 digit"]


def test_a_signature_that_keras_knows_nothing_of(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(3.0)
    spec = tf.TensorSpec([None, 2], tf.float32, "x")
    served = tf.function(lambda x: {"y": x * module.weight}).get_concrete_function(spec)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": served})
    x = normal(3, 2)
    runtime = SavedModel()
    np.testing.assert_array_equal(runtime.session(tmp_path / "m")({"x": x})["y"], x * 3)
    assert (runtime.name, runtime.version) == ("savedmodel", tf.__version__)


# --- what it refuses ------------------------------------------------------------------------


def damage(folder, how):
    """Spoils a SavedModel in one of several ways."""
    graph, data = folder / "saved_model.pb", folder / "variables/variables.data-00000-of-00001"
    if how == "no graph":
        graph.unlink()
    elif how == "another graph":
        graph.write_bytes(b"not a model")
    elif how == "empty graph":
        graph.write_bytes(b"")
    elif how == "variables cut short":
        data.write_bytes(data.read_bytes()[:10])
    elif how == "no variables":
        data.unlink()
    elif how == "a bit":
        content = bytearray(data.read_bytes())
        content[3] ^= 1
        data.write_bytes(content)
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "how",
    [
        "no graph",
        "another graph",
        "empty graph",
        "variables cut short",
        "no variables",
        "a bit",
        "nothing",
    ],
)
def test_a_damaged_folder_is_one_clear_error(how, folder, capfd):
    damage(folder, how)
    with pytest.raises(LoadError) as caught:
        SavedModel().session(folder)({"x": normal(1, 4)})
    assert caught.value.where == str(folder)
    assert caught.value.message.startswith(f"savedmodel {tf.__version__} can't load it: ")
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_no_signature(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "m"))
    with pytest.raises(LoadError, match="no signature 'serving_default'; those it has: none"):
        SavedModel().session(tmp_path / "m")({})


@pytest.mark.parametrize(
    "inputs",
    [{}, {"z": normal(1, 4)}, {"x": normal(1, 5)}, {"x": np.zeros((1, 4), np.int64)}],
    ids=["none", "another", "shape", "type"],
)
def test_inputs_that_do_not_fit_are_an_export_error(inputs, folder, capfd):
    with pytest.raises(ExportError, match=r"savedmodel .* failed to run the model: ") as caught:
        SavedModel().session(folder)(inputs)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_tensorflow_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match=r"layerswap\[keras\]") as caught:
        SavedModel()
    assert caught.value.message.startswith("running a SavedModel needs the package 'tensorflow'")
