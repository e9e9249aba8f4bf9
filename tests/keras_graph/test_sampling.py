"""Samples from what Keras users have: files, folders, datasets, generators, functions."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

from layerswap.errors import LayerswapError, LoadError, UsageError
from layerswap.keras_graph.sampling import inputs_of, read_samples
from layerswap.samples import Input

COUNT = 20


def numbered(count=COUNT, *shape):
    """Each sample holds its own number."""
    each = np.arange(count, dtype="float32").reshape(count, *[1] * len(shape))
    return np.broadcast_to(each, (count, *shape)).copy()


def model_of(*inputs):
    """A model that takes these (name → shape), and does next to nothing."""
    given = [layers.Input(shape, name=name) for name, shape in inputs]
    outputs = [layers.Flatten()(tensor) for tensor in given]
    return tf_keras.Model(given if len(given) > 1 else given[0], outputs)


@pytest.fixture(scope="module")
def plain():
    return model_of(("x", (4,)))


@pytest.fixture(scope="module")
def double():
    return model_of(("left", (4,)), ("right", (2,)))


@pytest.fixture(scope="module")
def image():
    return model_of(("image", (6, 5, 3)))


def batches(samples):
    return (*samples.fit, *samples.held_out)


def numbers(samples, name="x"):
    return sorted(
        int(sample.reshape(-1)[0]) for batch in batches(samples) for sample in batch[name]
    )


def assert_all(samples, name="x", count=COUNT):
    assert numbers(samples, name) == list(range(count))
    assert samples.counts == (count - count // 4, count // 4)


def refusal(kind, model, source):
    with pytest.raises(kind) as caught:
        read_samples(model, source)
    return caught.value


# What the model takes.


def test_inputs_are_named_and_shaped_as_keras_has_them(double):
    assert inputs_of(double) == [
        Input("left", (None, 4), "float32"),
        Input("right", (None, 2), "float32"),
    ]


def test_the_batch_is_open_unless_the_model_fixes_it():
    given = layers.Input(batch_shape=(5, 4), dtype="int32", name="ids")
    fixing = tf_keras.Model(given, tf.reshape(given, (5, 2, 2)))
    assert inputs_of(fixing) == [Input("ids", (5, 4), "int32")]
    assert inputs_of(tf_keras.Model(given, given + 1)) == [Input("ids", (None, 4), "int32")]


class Called(tf_keras.Model):
    def call(self, x):
        return x * 2.0


def test_a_subclassed_model_is_asked_what_it_was_called_with():
    model = Called()
    error = refusal(UsageError, model, numbered(COUNT, 4))
    assert "inputs are unknown" in str(error)
    assert "Call the model once" in str(error)
    model(np.ones((2, 4), "float32"))
    assert_all(read_samples(model, numbered(COUNT, 4)), inputs_of(model)[0].name)


# Arrays.


def test_arrays_tensors_lists_and_dicts(plain, double):
    x, y = numbered(COUNT, 4), numbered(COUNT, 2)
    for source in (x, tf.constant(x), [x], [tf.constant(x)], x.tolist(), {"x": x}, {"other": x}):
        assert_all(read_samples(plain, source))
    for source in ([x, y], {"right": y, "left": x}, [tf.constant(x), y], ([x, y], "labels")):
        samples = read_samples(double, source)
        assert_all(samples, "left")
        assert_all(samples, "right")


def test_labels_behind_the_inputs_are_ignored(plain):
    x, labels = numbered(COUNT, 4), np.full(3, np.nan)
    for source in ((x,), (x, labels), (x, labels, labels)):
        assert_all(read_samples(plain, source))


def test_samples_that_were_read_already_are_taken_as_they_are(plain):
    samples = read_samples(plain, numbered(COUNT, 4))
    assert read_samples(plain, samples) is samples


def test_what_holds_no_samples_is_refused_by_its_class(plain):
    for source, name in ((3, "int"), (object(), "object"), (None, "NoneType")):
        error = refusal(UsageError, plain, source)
        assert f"a {name}" in str(error)
        assert "tf.data.Dataset" in str(error)


# Datasets, sequences, generators, functions.


@pytest.mark.parametrize("batch", [None, 1, 7])
@pytest.mark.parametrize("labels", [False, True])
def test_datasets(plain, batch, labels):
    x = numbered(COUNT, 4)
    dataset = tf.data.Dataset.from_tensor_slices((x, np.arange(COUNT)) if labels else x)
    assert_all(read_samples(plain, dataset if batch is None else dataset.batch(batch)))


def test_datasets_of_several_inputs(double):
    x, y = numbered(COUNT, 4), numbered(COUNT, 2)
    labels = np.zeros(COUNT)
    for given in ({"left": x, "right": y}, ({"right": y, "left": x}, labels), ((x, y), labels)):
        dataset = tf.data.Dataset.from_tensor_slices(given)
        for source in (dataset, dataset.batch(6)):
            samples = read_samples(double, source)
            assert_all(samples, "left")
            for part in batches(samples):
                np.testing.assert_array_equal(part["left"][:, 0], part["right"][:, 0])


def test_two_parts_of_an_element_are_inputs_and_labels_as_in_keras(double):
    dataset = tf.data.Dataset.from_tensor_slices((numbered(COUNT, 4), numbered(COUNT, 2)))
    assert "a dict by name" in str(refusal(UsageError, double, dataset))


def test_an_endless_dataset_is_read_up_to_the_limit(plain):
    dataset = tf.data.Dataset.from_tensor_slices(numbered(COUNT, 4)).repeat().batch(6)
    assert sum(read_samples(plain, dataset, limit=50).counts) == 50


class Batches(tf_keras.utils.Sequence):
    """Labelled batches, as for `fit`."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index >= 4:
            raise ValueError("beyond the end")
        return numbered(COUNT, 4)[5 * index : 5 * index + 5], np.zeros(5)


def test_a_keras_sequence_is_read_to_its_end(plain):
    assert_all(read_samples(plain, Batches()))


def test_generators_and_other_iterables(plain):
    x = numbered(COUNT, 4)
    for source in (
        iter(x),
        (row for row in x),
        map(tf.constant, x),
        (x[i : i + 3] for i in range(0, 20, 3)),
    ):
        assert_all(read_samples(plain, source))


def test_a_function_may_give_any_of_these(plain):
    x = numbered(COUNT, 4)

    def generator():
        yield from x

    for function in (
        generator,
        lambda: x,
        lambda: (x, np.zeros(3)),
        lambda: {"x": x},
        lambda: tf.data.Dataset.from_tensor_slices(x).batch(4),
        lambda: Batches(),
    ):
        assert_all(read_samples(plain, function))


def test_what_a_function_raises_is_told(plain):
    def function():
        raise OSError("no such disk")

    error = refusal(LoadError, plain, function)
    assert "OSError: no such disk" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert "TypeError" in str(refusal(LoadError, plain, lambda needed: needed))


def test_what_a_dataset_raises_is_told_with_how_far_it_came(plain):
    def broken():
        yield from numbered(10, 4)
        raise RuntimeError("the tape tore")

    spec = tf.TensorSpec((4,), tf.float32)
    dataset = tf.data.Dataset.from_generator(broken, output_signature=spec)
    error = refusal(LoadError, plain, dataset)
    assert "after 10" in str(error)
    assert "the tape tore" in str(error)


# Files.


def test_npy_and_npz_files_by_string_or_path(plain, double, tmp_path):
    x, y = numbered(COUNT, 4), numbered(COUNT, 2)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez_compressed(tmp_path / "two.npz", right=y, left=x, labels=np.zeros(9))
    for path in (tmp_path / "x.npy", str(tmp_path / "x.npy"), tmp_path / "one.npz"):
        assert_all(read_samples(plain, path))
    samples = read_samples(double, tmp_path / "two.npz")
    assert_all(samples, "left")
    assert_all(samples, "right")


def test_a_long_npy_file_is_read_at_evenly_spaced_places(plain, tmp_path):
    np.save(tmp_path / "x.npy", numbered(500, 4))
    chosen = numbers(read_samples(plain, tmp_path / "x.npy", limit=50))
    assert len(set(chosen)) == 50
    assert (chosen[0], chosen[-1]) == (0, 499)
    assert set(np.diff(chosen)) <= {10, 11}


def test_an_npz_file_without_an_input_says_what_it_holds(double, tmp_path):
    np.savez(tmp_path / "x.npz", left=numbered(COUNT, 4), rigth=numbered(COUNT, 2))
    error = refusal(UsageError, double, tmp_path / "x.npz")
    assert "lack the input right" in str(error)
    assert "left, rigth" in str(error)


def test_files_that_are_missing_damaged_or_of_another_kind_are_named(plain, tmp_path):
    error = refusal(LoadError, plain, tmp_path / "none.npy")
    assert "no such file or folder" in str(error)
    assert str(tmp_path / "none.npy") in str(error)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    error = refusal(LoadError, plain, tmp_path / "bad.npz")
    assert str(tmp_path / "bad.npz") in str(error)
    for name in ("x.csv", "x.png", "x", "x.NPY"):
        (tmp_path / name).write_bytes(b"")
        error = refusal(UsageError, plain, tmp_path / name)
        assert f"suffix '{Path(name).suffix}'" in str(error)
        assert ".npz" in error.hint


# Folders of images.


def write_images(folder, count=COUNT, shape=(6, 5, 3)):
    """PNG files in which each pixel is the file's number, in two levels of folders."""
    for i in range(count):
        path = folder / f"class_{i // 10}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(np.full(shape, i, "uint8")).numpy())


def test_a_folder_of_images_gives_their_values_as_they_are(image, tmp_path):
    write_images(tmp_path)
    (tmp_path / "labels.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for source in (tmp_path, str(tmp_path)):
        samples = read_samples(image, source)
        assert_all(samples, "image")
        assert samples.fit[0]["image"].dtype == np.float32
        for batch in batches(samples):
            assert (batch["image"] == batch["image"][:, :1, :1, :1]).all()


def test_images_in_other_formats_and_with_capital_suffixes(image, tmp_path):
    pixels = np.full((6, 5, 3), 100, "uint8")
    for i in range(4):
        (tmp_path / f"{i}.PNG").write_bytes(tf.io.encode_png(pixels).numpy())
        (tmp_path / f"{i}.jpeg").write_bytes(tf.io.encode_jpeg(pixels, quality=100).numpy())
        (tmp_path / f"{i}.Jpg").write_bytes(tf.io.encode_jpeg(pixels, quality=100).numpy())
    samples = read_samples(image, tmp_path)
    assert sum(samples.counts) == 12
    for batch in batches(samples):
        np.testing.assert_allclose(batch["image"], 100, atol=2)


def test_channels_are_converted_to_what_the_model_takes(tmp_path):
    write_images(tmp_path)
    samples = read_samples(model_of(("image", (6, 5, 1))), tmp_path)
    assert samples.fit[0]["image"].shape[1:] == (6, 5, 1)
    assert_all(samples, "image")


def test_images_of_any_size_do_where_the_model_leaves_it_open(tmp_path):
    write_images(tmp_path / "a", 6, (4, 7, 3))
    write_images(tmp_path / "b", 6, (8, 3, 3))
    inputs = layers.Input((None, None, 3), name="image")
    model = tf_keras.Model(inputs, layers.GlobalMaxPool2D()(inputs))
    samples = read_samples(model, tmp_path)
    assert sum(samples.counts) == 12
    assert {batch["image"].shape[1:3] for batch in batches(samples)} == {(4, 7), (8, 3)}


def test_an_image_of_another_size_is_named_with_both_sizes(image, tmp_path):
    write_images(tmp_path)
    odd = tmp_path / "class_1" / "odd.png"
    odd.write_bytes(tf.io.encode_png(np.zeros((6, 9, 3), "uint8")).numpy())
    error = refusal(UsageError, image, tmp_path)
    assert str(odd) in str(error)
    assert "6 × 9" in str(error)
    assert "6 × 5" in str(error)
    assert "Resize" in error.hint


def test_a_damaged_image_is_named(image, tmp_path):
    write_images(tmp_path)
    bad = tmp_path / "class_0" / "bad.png"
    bad.write_bytes(tf.io.encode_png(np.zeros((6, 5, 3), "uint8")).numpy()[:40])
    assert str(bad) in str(refusal(LoadError, image, tmp_path))


def test_a_folder_without_images_or_with_too_few_is_refused(image, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    error = refusal(LoadError, image, tmp_path)
    assert "holds no image" in str(error)
    assert str(tmp_path) in str(error)
    write_images(tmp_path, 7)
    assert "too few samples: 7" in str(refusal(LoadError, image, tmp_path))


def test_images_for_a_model_that_takes_none_are_refused(plain, double, tmp_path):
    write_images(tmp_path)
    for model in (plain, double):
        assert ".npz" in str(refusal(UsageError, model, tmp_path))


def test_of_many_images_evenly_spaced_ones_are_opened_and_no_others(image, tmp_path):
    write_images(tmp_path)
    (tmp_path / "class_0" / "000b.png").write_bytes(b"damaged, and the second of 21")
    samples = read_samples(image, tmp_path, limit=8)
    assert numbers(samples, "image") == [0, 1, 4, 7, 10, 13, 16, 19]


# Text.


def test_text_from_arrays_and_datasets():
    inputs = layers.Input((1,), dtype="string", name="text")
    model = tf_keras.Model(inputs, tf.strings.length(inputs))
    words = np.array([[f"word {i}"] for i in range(COUNT)])
    for source in (words, words.tolist(), tf.data.Dataset.from_tensor_slices(words).batch(3)):
        samples = read_samples(model, source)
        got = [word for batch in batches(samples) for word in batch["text"][:, 0]]
        assert sorted(got) == sorted(words[:, 0])


def test_an_empty_tuple_is_refused(plain):
    refusal(LayerswapError, plain, ())


def test_sparse_elements_are_refused_by_their_class():
    inputs = layers.Input((16,), sparse=True, name="x")
    model = tf_keras.Model(inputs, layers.Dense(2)(inputs))
    elements = [tf.sparse.from_dense(np.eye(16, dtype="float32"))] * 2
    assert "SparseTensor" in str(refusal(UsageError, model, iter(elements)))


def test_batches_by_index_are_spread_over_all(plain):
    class Loader:
        """As PyTorch's map-style datasets: no iterator."""

        def __len__(self):
            return 100

        def __getitem__(self, index):
            return np.full((8, *plain.input_shape[1:]), index, "float32"), "label"

    samples = read_samples(plain, Loader(), limit=32)
    seen = {float(v) for b in batches(samples) for a in b.values() for v in np.unique(a)}
    assert seen == {0.0, 33.0, 66.0, 99.0}
