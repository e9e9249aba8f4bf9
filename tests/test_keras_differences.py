"""`diff` on Keras files: real models, saved in both formats, changed in one thing at a time."""

import contextlib
import itertools
import json
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import tf_keras
from tf_keras import layers

import layerswap as ls
from layerswap.errors import LoadError

SUFFIXES = (".keras", ".h5")
PAIRS = list(itertools.product(SUFFIXES, SUFFIXES))
every_pair = pytest.mark.parametrize("suffixes", PAIRS, ids=" ".join)
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What Keras counts, it counts on through a process.
    tf_keras.backend.clear_session()


def saved(model, path):
    model.save(path)
    return path


def compared(one, other, suffixes=(".keras", ".keras")):
    return ls.diff(saved(one, f"a{suffixes[0]}"), saved(other, f"b{suffixes[1]}"))


def told(report):
    return [(d.code, d.where) for d in report.differences]


def graph(*, act="relu", size=3, normalize=layers.BatchNormalization, call=1, double=False):
    """A graph with a nested model, a shared layer and names that Keras makes up."""
    tf_keras.utils.set_random_seed(0)
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(8, size, padding="same")(inputs)
    x = layers.Activation(act)(normalize()(x))
    nested = tf_keras.Sequential([layers.Input((8, 8, 8)), layers.Conv2D(8, 1), normalize()])
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, nested(x)]))
    shared = layers.Dense(4)
    calls = [shared(x), shared(layers.Activation("tanh")(x))]
    outputs = layers.Reshape((2, 2))(calls[call])
    ends = {"a": outputs, "b": calls[0], "c": calls[1]} if double else [outputs, *calls]
    return tf_keras.Model(inputs, ends)


def wrapped(units=4):
    tf_keras.utils.set_random_seed(0)
    return tf_keras.Sequential(
        [
            layers.Input((5, 3)),
            layers.Bidirectional(layers.LSTM(units, return_sequences=True)),
            layers.TimeDistributed(layers.Dense(2)),
            layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
        ]
    )


def named(*stack):
    tf_keras.utils.set_random_seed(0)
    return tf_keras.Sequential([layers.Input((4,), name="in"), *stack], name="model")


# --- what is no difference --------------------------------------------------------------------


@every_pair
def test_a_model_and_itself(suffixes):
    model = graph()
    assert told(compared(model, model, suffixes)) == []


@every_pair
@pytest.mark.parametrize("double", [False, True])
def test_names_that_keras_counts(suffixes, double):
    assert told(compared(graph(double=double), graph(double=double), suffixes)) == []
    first, second = (json.loads(ls_config(f"{n}{s}")) for n, s in zip("ab", suffixes, strict=True))
    assert first != second


def ls_config(path):
    if path.endswith(".h5"):
        with h5py.File(path) as file:
            return file.attrs["model_config"]
    with zipfile.ZipFile(path) as archive:
        return archive.read("config.json")


@every_suffix
def test_wrapped_layers_and_cells(suffix):
    assert told(compared(wrapped(), wrapped(), (suffix, suffix))) == []


def test_two_formats_of_what_they_name_differently():
    """Bidirectional and stacked cells: nothing says which number is which name."""
    model = wrapped()
    report = compared(model, model, (".keras", ".h5"))
    assert [d.code for d in report.differences] == ["LS910"]
    assert report.exit_code == 0
    assert ls.diff("a.keras", "b.h5", exit_code=True).exit_code == 3


@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16", "float64"])
@every_pair
def test_types(suffixes, dtype):
    model = named(layers.Dense(3, dtype=dtype), layers.BatchNormalization(dtype=dtype))
    assert told(compared(model, model, suffixes)) == []
    changed = tf_keras.models.clone_model(model)
    weights = model.get_weights()
    weights[0] = (weights[0] * 2).astype(weights[0].dtype)
    changed.set_weights(weights)
    report = compared(model, changed, suffixes)
    assert told(report) == [("LS906", "dense/kernel")]
    assert report.differences[0].norms["relative"] == 1.0


@every_pair
def test_objects_among_the_settings(suffixes):
    model = named(
        layers.Dense(
            3,
            kernel_regularizer=tf_keras.regularizers.L2(1e-3),
            kernel_initializer=tf_keras.initializers.HeNormal(seed=1),
            kernel_constraint=tf_keras.constraints.MaxNorm(2.0),
            activation=tf_keras.activations.swish,
        ),
        layers.LeakyReLU(),
    )
    assert told(compared(model, model, suffixes)) == []


def test_a_name_of_its_own_that_looks_counted():
    """Counted from the start, two layers would have one name; so they keep their own."""
    layers.Dropout(0.5)  # is called `dropout`; those in the models count on

    def model(value):
        dense = layers.Dense(4, name="dropout", kernel_initializer="zeros")
        result = named(dense, layers.Dropout(0.5), layers.Dropout(0.5))
        dense.bias.assign([value] * 4)
        return result

    assert ("LS906", "dropout/bias") in told(compared(model(1.0), model(2.0)))


# --- what is one --------------------------------------------------------------------------------


def test_settings():
    report = compared(graph(), graph(act="selu"))
    (difference,) = report.differences
    assert (difference.code, difference.where) == ("LS904", "activation")
    assert (difference.before, difference.after) == ('"relu"', '"selu"')


def test_sizes():
    assert told(compared(graph(), graph(size=5))) == [
        ("LS904", "conv2d"),
        ("LS906", "conv2d/kernel"),
    ]


def test_settings_inside_a_wrapper():
    report = compared(wrapped(), wrapped(5))
    assert ("LS904", "bidirectional/layer") in told(report)
    assert {d.code for d in report.differences} == {"LS904", "LS906"}


@every_pair
def test_which_call_of_a_shared_layer_feeds_another(suffixes):
    report = compared(graph(call=0), graph(call=1), suffixes)
    (difference,) = report.differences
    assert (difference.code, difference.where) == ("LS904", "reshape")
    assert (difference.before, difference.after) == ("dense", "call 2 of dense")


def test_which_output_of_a_layer_feeds_another():
    def model(number):
        inputs = layers.Input((5, 3), name="in")
        outputs = layers.LSTM(4, return_state=True, name="lstm")(inputs)
        return tf_keras.Model(inputs, [layers.ReLU(name="relu")(outputs[number]), outputs[0]])

    report = compared(model(1), model(2))
    (difference,) = [d for d in report.differences if d.code == "LS904"]
    assert (difference.before, difference.after) == ("lstm:1", "lstm:2")


def test_the_interface():
    def model(size, swapped=False):
        inputs = layers.Input((size,), name="in")
        ends = [layers.ReLU(name="a")(inputs), layers.Softmax(name="b")(inputs)]
        return tf_keras.Model(inputs, ends[::-1] if swapped else ends)

    assert told(compared(model(3), model(4))) == [("LS905", "in")]
    assert told(compared(model(3), model(3, True))) == [("LS905", "(the model)")]


def test_layers_that_only_one_has():
    a, b, c = (lambda: layers.Dense(4, name="a"), lambda: layers.Dense(4, name="b"), layers.ReLU)
    one, other = named(a(), c(name="c"), b()), named(a(), b())
    assert told(compared(one, other)) == [("LS903", "c")]
    assert told(compared(other, one)) == [("LS902", "c")]
    nested = named(a(), named(b(), c(name="c")), b())
    assert told(compared(nested, other)) == [("LS903", "model")]  # and not what is inside, too
    assert ("LS904", "(the model)") in told(compared(named(a(), b()), named(b(), a())))


def test_the_order_of_layers_that_keras_named():
    def model(*kinds):
        return tf_keras.Sequential([layers.Input((4,)), *(kind() for kind in kinds)])

    report = compared(model(layers.ReLU, layers.Softmax), model(layers.Softmax, layers.ReLU))
    assert told(report) == [("LS904", "(the model)")]


def test_another_class():
    report = compared(named(layers.ReLU(name="a")), named(layers.Softmax(name="a")))
    assert ("ReLU", "Softmax") in [(d.before, d.after) for d in report.differences]
    assert {d.code for d in report.differences} == {"LS904"}


@every_pair
def test_weights_with_their_norms(suffixes):
    one, other = graph(), graph()
    rng = np.random.default_rng(0)
    before = one.layers[1].get_weights()
    after = [(w + rng.normal(size=w.shape) * 0.01).astype(np.float32) for w in before]
    other.layers[1].set_weights(after)
    report = compared(one, other, suffixes)
    assert told(report) == [("LS906", "conv2d/kernel"), ("LS906", "conv2d/bias")]
    for difference, a, b in zip(report.differences, before, after, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        norm, distance = np.linalg.norm(a), np.linalg.norm(b - a)
        assert difference.norms == pytest.approx(
            {
                "before": norm,
                "after": np.linalg.norm(b),
                "difference": distance,
                "relative": distance / norm if norm else np.inf,
                "largest": np.abs(b - a).max(),
            },
            rel=1e-12,
        )


def sharing():
    """Two models in one that share a layer, with others of its class before and behind it."""
    tf_keras.utils.set_random_seed(0)
    shared = layers.Dense(4, name="shared")

    def part(name):
        inputs = layers.Input((4,), name=f"{name}_in")
        x = shared(layers.Dense(4, name=f"{name}_1")(inputs))
        return tf_keras.Model(inputs, layers.Dense(4, name=f"{name}_2")(x), name=name)

    inputs = layers.Input((4,), name="in")
    return tf_keras.Model(inputs, part("second")(part("first")(inputs)))


@every_pair
def test_a_layer_that_two_nested_models_share(suffixes):
    assert told(compared(sharing(), sharing(), suffixes)) == []
    other = sharing()
    other.get_layer("second").get_layer("second_2").kernel.assign_add(np.ones((4, 4)))
    assert told(compared(sharing(), other, suffixes)) == [("LS906", "second/second_2/kernel")]
    other = sharing()
    other.get_layer("first").get_layer("shared").kernel.assign_add(np.ones((4, 4)))
    assert told(compared(sharing(), other, suffixes)) == [
        ("LS906", "first/shared/kernel"),
        ("LS906", "second/shared/kernel"),
    ]


@every_suffix
def test_one_weight_of_a_wrapped_layer(suffix):
    one, other = wrapped(), wrapped()
    saved(one, f"a{suffix}")
    for number, weight in enumerate(one.get_weights()):
        weights = one.get_weights()
        weights[number] = weight + 1
        other.set_weights(weights)
        report = ls.diff(f"a{suffix}", saved(other, f"b{suffix}"))
        assert [d.code for d in report.differences] == ["LS906"]
        assert report.differences[0].norms["largest"] == pytest.approx(1.0)


def test_weights_of_a_model_s_own():
    class Own(tf_keras.Model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.own = self.add_weight("own", (3,), initializer="ones")

    def model(value):
        inputs = layers.Input((4,), name="in")
        result = Own(inputs, layers.ReLU(name="relu")(inputs))
        result.own.assign([value] * 3)
        return result

    for suffix in SUFFIXES:
        report = compared(model(1.0), model(2.0), (suffix, suffix))
        assert [d.code for d in report.differences] == ["LS906"]
        assert report.differences[0].norms["relative"] == 1.0


def test_how_it_is_trained():
    one, other = named(layers.Dense(2, name="a")), named(layers.Dense(2, name="a"))
    one.compile("adam", "mse")
    other.compile("adam", "mae")
    assert told(compared(one, other)) == [("LS909", "compile_config/loss")]


# --- BatchNormalization → GroupNormalization ----------------------------------------------------


@every_pair
def test_a_swap_is_told_as_that_and_as_nothing_else(suffixes):
    model = graph()
    rng = np.random.default_rng(0)
    weights = [rng.uniform(0.5, 2.0, w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    source = saved(model, f"bn{suffixes[0]}")
    assert ls.convert(source, f"gn{suffixes[1]}").ok
    report = ls.diff(source, f"gn{suffixes[1]}")
    assert [d.code for d in report.differences] == ["LS901", "LS901"]
    group = tf_keras.models.load_model(f"gn{suffixes[1]}", compile=False)
    nested = next(x for x in group.layers if isinstance(x, tf_keras.Sequential))
    inner = model.get_layer(nested.name).layers[-1]
    pairs = [(model.layers[2], group.layers[2]), (inner, nested.layers[-1])]
    for difference, (batch, own) in zip(report.differences, pairs, strict=True):
        assert f"{own.groups} group" in difference.message
        before, after = (
            np.concatenate([np.asarray(x.gamma), np.asarray(x.beta)]).astype(np.float64)
            for x in (batch, own)
        )
        assert difference.norms["before"] == pytest.approx(np.linalg.norm(before), rel=1e-12)
        distance = np.linalg.norm(after - before)
        assert difference.norms["difference"] == pytest.approx(distance, rel=1e-12)


# --- files that are damaged, or made to do harm -------------------------------------------------


def plain(path, value=1.0):
    model = named(layers.Dense(3, name="a"))
    model.set_weights([np.full((4, 3), value), np.zeros(3)])
    return saved(model, path)


def inside(path, change):
    """Changes the HDF5 file that holds the weights."""
    if path.endswith(".h5"):
        with h5py.File(path, "r+") as file:
            change(file["model_weights/a/a"], "kernel:0")
        return
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with open("inner.h5", "wb") as file:
        file.write(parts["model.weights.h5"])
    with h5py.File("inner.h5", "r+") as file:
        change(next(g for n, g in groups(file) if n.endswith("a/vars") or "dense" in n), "0")
    with open("inner.h5", "rb") as file:
        parts["model.weights.h5"] = file.read()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def groups(file):
    found = []
    file.visititems(lambda name, item: found.append((name, item)))
    return [(n, g) for n, g in found if isinstance(g, h5py.Group) and "0" in g]


def _external(group, name):
    del group[name]
    group[name] = h5py.ExternalLink("other.h5", "/secret")


def _soft(group, name):
    del group[name]
    group[name] = h5py.SoftLink("/nowhere")


def _outside(group, name):
    del group[name]
    group.create_dataset(name, (4, 3), "f4", external=[("raw.bin", 0, 48)])


def _virtual(group, name):
    del group[name]
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 3))
    group.create_virtual_dataset(name, layout)


def _text(group, name):
    del group[name]
    group[name] = "text"


def _huge(group, name):
    del group[name]
    group.create_dataset(name, (1 << 20, 1 << 20), "f4", chunks=(1 << 10, 1 << 10))


@every_suffix
@pytest.mark.parametrize("change", [_external, _soft, _outside, _virtual, _text, _huge])
def test_nothing_is_read_from_elsewhere_or_beyond_the_file(suffix, change):
    with h5py.File("other.h5", "w") as file:
        file["secret"] = np.ones((4, 3), np.float32)
    with open("raw.bin", "wb") as file:
        file.write(bytes(48))
    path = plain(f"a{suffix}")
    shutil.copy(path, f"b{suffix}")
    inside(path, change)
    for pair in ((path, f"b{suffix}"), (f"b{suffix}", path), (path, path)):
        with pytest.raises(LoadError):
            ls.diff(*pair)


def test_a_group_that_is_a_link():
    path = plain("a.h5")
    with h5py.File(path, "r+") as file:
        file.copy("model_weights/a", "moved")
        del file["model_weights/a"]
        file["model_weights/a"] = h5py.SoftLink("/moved")
    with pytest.raises(LoadError, match="link"):
        ls.diff(path, path)


def test_a_list_of_weights_too_long_for_one_attribute():
    """Keras goes on in `weight_names0`, `weight_names1` and so on."""
    for path, value in (("a.h5", 1.0), ("b.h5", 2.0)):
        plain(path, value)
        with h5py.File(path, "r+") as file:
            attributes = file["model_weights/a"].attrs
            names = attributes["weight_names"]
            del attributes["weight_names"]
            for number, name in enumerate(names):
                attributes[f"weight_names{number}"] = [name]
    assert told(ls.diff("a.h5", "b.h5")) == [("LS906", "a/kernel")]


@pytest.mark.parametrize("start", [4096, 8192, 16384])
def test_an_archive_whose_weights_begin_where_hdf5_looks_for_its_mark(start):
    """`h5py.is_hdf5` takes the whole archive for HDF5 then."""
    plain("a.keras")
    with zipfile.ZipFile("a.keras") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights = parts.pop("model.weights.h5")
    header = 30  # of each entry, and its name behind it
    with zipfile.ZipFile("b.keras", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        rest = start - archive.fp.tell() - len("padding") - len("model.weights.h5") - 2 * header
        archive.writestr("padding", b"-" * rest)
        archive.writestr("model.weights.h5", weights)
    assert h5py.is_hdf5("b.keras")
    assert told(ls.diff("a.keras", "b.keras")) == []
    assert ls.check("b.keras").ok
    try:
        tf_keras.models.load_model("b.keras")
    except EOFError:  # zipfile of Python 3.13.0 loses its place when it seeks
        pytest.skip("this Python's zipfile can't seek in the archive, so tf_keras can't load it")
    assert ls.load("b.keras").count_params() == 15


@every_suffix
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_that_was_cut_off(suffix, share):
    path = plain(f"a{suffix}")
    with open(path, "rb") as file:
        content = file.read()
    with open(f"b{suffix}", "wb") as file:
        file.write(content[: int(len(content) * share)])
    with pytest.raises(LoadError):
        ls.diff(path, f"b{suffix}")


@pytest.mark.parametrize("depth", [50, 200, 400, 100_000])
def test_a_configuration_that_is_nested_too_deep(depth):
    """In a setting, and in models that hold each other."""
    plain("a.keras")
    for number, text in enumerate(('{"class_name": "A", "config": {"b": %s}}', "[%s]")):
        before, _, after = text.partition("%s")
        value = before * depth + "0" + after * depth
        with zipfile.ZipFile("a.keras") as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        config = parts["config.json"].decode().replace('"units": 3', f'"units": {value}')
        assert config != parts["config.json"].decode()
        parts["config.json"] = config.encode()
        path = f"b{number}.keras"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        if depth <= 50:
            assert told(ls.diff("a.keras", path)) == [("LS904", "a")]
            assert told(ls.diff(path, path)) == []
        for pair in (("a.keras", path), (path, path)):
            with contextlib.suppress(LoadError):
                ls.diff(*pair)
