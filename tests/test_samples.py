"""Samples of a model's inputs: what is taken, what is refused, and how it is divided."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerswap.errors import LayerswapError, LoadError, UsageError
from layerswap.samples import Input, from_arrays, from_elements, read_arrays

ONE = [Input("x", (None, 4), "float32")]
TWO = [Input("left", (None, 4), "float32"), Input("right", (None, 2, 3), "float32")]
OPEN = [Input("image", (None, None, None, 3), "float32")]
FIXED = [Input("x", (8, 4), "float32")]


def numbered(count, *shape, start=0):
    """Each sample holds its own number."""
    each = np.arange(start, start + count, dtype="float32").reshape(count, *[1] * len(shape))
    return np.broadcast_to(each, (count, *shape)).copy()


def numbers(batches, name="x"):
    """The samples' numbers; all values of a sample are the same."""
    found = []
    for batch in batches:
        flat = batch[name].reshape(len(batch[name]), -1)
        assert (flat == flat[:, :1]).all()
        found += flat[:, 0].astype(int).tolist()
    return found


def assert_divided(samples, expected, name="x"):
    """All are there once, the last quarter held out."""
    fit, held_out = numbers(samples.fit, name), numbers(samples.held_out, name)
    assert sorted(fit + held_out) == sorted(expected)
    assert samples.counts == (len(fit), len(held_out))
    assert len(held_out) == len(expected) // 4


# What is taken.


def test_an_array_is_shuffled_and_divided_without_loss():
    samples = from_arrays(numbered(100, 4), ONE)
    assert_divided(samples, range(100))
    assert numbers(samples.fit) != sorted(numbers(samples.fit))
    assert max(len(batch["x"]) for batch in (*samples.fit, *samples.held_out)) <= 32
    assert samples.findings == ()


@given(st.integers(8, 90))
@settings(deadline=None)
def test_no_sample_is_lost_or_doubled_whatever_their_number(count):
    assert_divided(from_arrays(numbered(count, 4), ONE), range(count))


def test_a_set_sorted_by_class_holds_out_samples_of_each():
    held_out = numbers(from_arrays(numbered(64, 4), ONE).held_out)
    assert min(held_out) < 32 <= max(held_out)


def test_the_division_is_the_same_each_time():
    first, second = (from_arrays(numbered(70, 4), ONE) for _ in range(2))
    assert numbers(first.fit) == numbers(second.fit)
    assert numbers(first.held_out) == numbers(second.held_out)


def test_a_stream_is_divided_as_an_array_of_the_same_is():
    whole = from_arrays(numbered(50, 4), ONE)
    stream = from_elements((numbered(5, 4, start=i) for i in range(0, 50, 5)), ONE)
    assert numbers(stream.fit) == numbers(whole.fit)
    assert numbers(stream.held_out) == numbers(whole.held_out)


@pytest.mark.parametrize(
    "source",
    [
        [numbered(20, 4), numbered(20, 2, 3)],
        {"right": numbered(20, 2, 3), "left": numbered(20, 4), "labels": np.zeros(3)},
    ],
    ids=["list", "dict"],
)
def test_several_inputs_stay_together(source):
    samples = from_arrays(source, TWO)
    for batch in (*samples.fit, *samples.held_out):
        assert list(batch) == ["left", "right"]
        assert numbers([batch], "left") == numbers([batch], "right")
    assert_divided(samples, range(20), "left")


@pytest.mark.parametrize(
    "source",
    [
        numbered(20, 4).tolist(),
        [numbered(20, 4)],
        list(numbered(20, 4)),
        {"x": numbered(20, 4)},
        {"any_name": numbered(20, 4)},
        {"x": numbered(20, 4), "y": np.zeros(7)},
    ],
    ids=["nested list", "list of one", "list of samples", "dict", "other name", "more names"],
)
def test_a_single_input_is_found_in(source):
    assert_divided(from_arrays(source, ONE), range(20))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x,),
        lambda x: (x, np.zeros(len(x))),
        lambda x: (x, np.zeros(len(x)), np.ones(len(x))),
        lambda x: {"x": x},
        lambda x: ({"other": x}, "label"),
        lambda x: ([x], "label"),
        lambda x: x.tolist(),
    ],
    ids=["array", "list", "tuple", "x, y", "x, y, w", "dict", "dict, y", "list, y", "lists"],
)
@pytest.mark.parametrize("size", [None, 1, 3])
def test_elements_come_as_keras_has_them_single_or_batched(wrap, size):
    x = numbered(24, 4)
    elements = list(x) if size is None else [x[i : i + size] for i in range(0, 24, size)]
    assert_divided(from_elements(map(wrap, elements), ONE), range(24))


@pytest.mark.parametrize("wrap", [list, tuple, lambda pair: dict(zip("ba", pair, strict=True))])
def test_elements_of_several_inputs(wrap):
    inputs = [Input("b", (None, 4), "float32"), Input("a", (None, 2), "float32")]
    pairs = list(zip(numbered(12, 4), numbered(12, 2), strict=True))
    samples = from_elements(((wrap(pair), "label") for pair in pairs), inputs)
    assert_divided(samples, range(12), "a")
    assert numbers(samples.fit, "a") == numbers(samples.fit, "b")


def test_single_samples_of_a_scalar_input():
    scalar = [Input("x", (None,), "int32")]
    assert_divided(from_elements(range(12), scalar), range(12))


def test_of_many_samples_an_array_gives_evenly_spaced_ones():
    samples = from_arrays(numbered(1000, 4), ONE, limit=100)
    chosen = sorted(numbers(samples.fit) + numbers(samples.held_out))
    assert len(set(chosen)) == 100
    assert (chosen[0], chosen[-1]) == (0, 999)
    assert set(np.diff(chosen)) <= {10, 11}


@pytest.mark.parametrize("size", [None, 7, 1000])
def test_of_many_samples_a_stream_gives_the_first_and_is_read_no_further(size):
    read = []

    def stream():
        start = 0
        while True:
            read.append(start)
            yield numbered(size or 1, 4, start=start)[0 if size is None else slice(None)]
            start += size or 1

    samples = from_elements(stream(), ONE, limit=20)
    assert_divided(samples, range(20))
    assert max(read) < 20


def test_a_limit_beyond_what_there_is_takes_all():
    assert from_arrays(numbered(12, 4), ONE, limit=500).counts == (9, 3)
    assert from_elements(iter(numbered(12, 4)), ONE, limit=500).counts == (9, 3)


def test_few_samples_are_a_warning_with_the_number_advised():
    (finding,) = from_arrays(numbered(63, 4), ONE).findings
    assert (finding.code, finding.severity) == ("few-samples", "warning")
    assert finding.message.startswith("63 samples")
    assert "64" in finding.hint
    assert from_arrays(numbered(64, 4), ONE).findings == ()


# Batch sizes and open axes.


def test_a_fixed_batch_size_fills_every_batch():
    samples = from_arrays(numbered(70, 4), FIXED)
    batches = (*samples.fit, *samples.held_out)
    assert {batch["x"].shape for batch in batches} == {(8, 4)}
    assert samples.counts == (48, 16)  # of 53 and 17
    assert len(set(numbers(batches))) == 64


def test_too_few_for_a_held_out_batch_of_fixed_size_are_refused_with_the_numbers():
    assert from_arrays(numbered(32, 4), FIXED).counts == (24, 8)
    with pytest.raises(LoadError, match=r"31; the model takes batches of 8.*a quarter"):
        from_arrays(numbered(31, 4), FIXED)


def sizes_of(batches):
    return [batch["image"].shape[1] for batch in batches]


def test_open_axes_may_differ_from_batch_to_batch():
    elements = [numbered(2, 3 + i % 4, 5, 3, start=2 * i) for i in range(12)]
    samples = from_elements(elements, OPEN)
    assert (len(samples.fit), len(samples.held_out)) == (9, 3)
    assert samples.counts == (18, 6)
    together = numbers((*samples.fit, *samples.held_out), "image")
    assert sorted(together) == list(range(24))
    assert sizes_of(samples.fit) != [3 + i % 4 for i in range(9)]  # shuffled
    assert set(sizes_of(samples.fit)) == {3, 4, 5, 6}


def test_single_samples_may_differ_in_open_axes():
    samples = from_elements((numbered(1, 3 + i % 2, 4, 3, start=i)[0] for i in range(10)), OPEN)
    assert samples.counts == (8, 2)
    assert sorted(numbers((*samples.fit, *samples.held_out), "image")) == list(range(10))


def test_shapes_that_differ_need_batches_of_the_fixed_size():
    fixed = [Input("x", (4, None), "float32")]
    batches = [numbered(4, 3 + i % 2, start=4 * i) for i in range(8)]
    assert from_elements(batches, fixed).counts == (24, 8)
    with pytest.raises(UsageError, match="batches of the model's size"):
        from_elements([*batches, numbered(3, 9)], fixed)


# Types.


@pytest.mark.parametrize("dtype", ["float64", "uint8", "int64", "float16", "bool", ">f4"])
def test_numbers_are_cast_to_what_the_input_takes(dtype):
    x = (np.arange(64).reshape(16, 4) % 2).astype(dtype)
    samples = from_arrays(x, ONE)
    assert {batch["x"].dtype for batch in samples.fit} == {np.dtype("float32")}
    got = np.concatenate([batch["x"] for batch in (*samples.fit, *samples.held_out)])
    np.testing.assert_array_equal(np.unique(got), [0, 1])


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [("float16", "float16"), ("float64", "float64"), ("bfloat16", "float32"), ("uint8", "uint8")],
)
def test_the_dtype_is_that_of_the_input(wanted, dtype):
    samples = from_arrays(numbered(8, 4), [Input("x", (None, 4), wanted)])
    assert samples.fit[0]["x"].dtype == dtype


def test_whole_numbers_in_floating_point_do_for_integers():
    samples = from_arrays(numbered(12, 4), [Input("x", (None, 4), "int32")])
    assert samples.fit[0]["x"].dtype == np.int32
    assert_divided(samples, range(12))


def test_text_is_taken_for_text_inputs():
    text = [Input("x", (None, 1), "string")]
    words = np.array([[f"wörd {i}"] for i in range(12)])
    samples = from_arrays(words, text)
    got = [word for batch in (*samples.fit, *samples.held_out) for word in batch["x"][:, 0]]
    assert sorted(got) == sorted(words[:, 0])
    ascii_bytes = np.array([[b"cat"]] * 12, dtype=object)  # what TensorFlow gives
    assert set(from_arrays(ascii_bytes, text).fit[0]["x"][:, 0]) == {"cat"}


def test_the_samples_given_are_never_written_to():
    x = numbered(40, 4)
    x.setflags(write=False)
    before = x.copy()
    for samples in (from_arrays(x, ONE), from_elements([x[:20], x[20:]], ONE)):
        for batch in (*samples.fit, *samples.held_out):
            batch["x"][:] = -1.0  # nor are they shared
    np.testing.assert_array_equal(x, before)


# What is refused.


def refusal(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def assert_says(error, *parts):
    for part in parts:
        assert part in str(error), (part, str(error))


@pytest.mark.parametrize(
    ("shape", "text"),
    [((20, 5), "(5)"), ((20, 4, 4), "(4, 4)"), ((20, 0), "(0)")],
)
def test_a_wrong_shape_names_both_shapes_and_the_input(shape, text):
    for call in (
        lambda: from_arrays(np.zeros(shape), ONE),
        lambda: from_elements([np.zeros(shape)], ONE),
    ):
        error = refusal(UsageError, call)
        assert_says(error, f"shape {text}", "input 'x' takes (4)", "resize or reshape")


def test_a_vector_is_an_array_of_scalars_and_an_element_that_is_one_sample():
    error = refusal(UsageError, lambda: from_arrays(np.zeros(20), ONE))
    assert_says(error, "shape (), but")
    error = refusal(UsageError, lambda: from_elements([np.zeros(20)], ONE))
    assert_says(error, "shape (20), but")


def test_a_wrong_shape_shows_open_axes_as_such():
    error = refusal(UsageError, lambda: from_arrays(np.zeros((20, 8, 8, 1)), OPEN))
    assert_says(error, "(8, 8, 1)", "input 'image' takes (?, ?, 3)")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 4), "complex64"),
        np.full((20, 4), "a"),
        np.full((20, 4), None),
        np.zeros((20, 4), "M8[s]"),
    ],
    ids=["complex", "text", "objects", "dates"],
)
def test_what_is_no_number_is_refused_by_its_dtype(array):
    error = refusal(UsageError, lambda: from_arrays(array, ONE))
    assert_says(error, f"dtype {array.dtype}", "input 'x' takes float32", "Give numbers")


def test_values_that_are_not_finite_are_counted_and_the_first_sample_is_named():
    x = numbered(30, 4)
    x[17, 2], x[17, 3], x[25] = np.nan, np.inf, -np.inf
    error = refusal(LoadError, lambda: from_arrays(x, ONE))
    assert_says(error, "6 values", "input 'x'", "NaN or Inf", "sample 17", "Leave such samples out")


def test_a_stream_counts_samples_from_its_beginning():
    x = numbered(30, 4)
    x[17, 2] = np.nan
    batches = [x[i : i + 5] for i in range(0, 30, 5)]
    assert_says(refusal(LoadError, lambda: from_elements(batches, ONE)), "1 values", "sample 17")
    assert_says(refusal(LoadError, lambda: from_elements(list(x), ONE)), "1 values", "sample 17")


def test_of_two_inputs_the_bad_one_is_named():
    right = numbered(20, 2, 3)
    right[3, 1, 1] = np.inf
    error = refusal(LoadError, lambda: from_arrays([numbered(20, 4), right], TWO))
    assert_says(error, "input 'right'", "sample 3")


def test_fractions_are_refused_for_integers():
    whole = [Input("ids", (None, 4), "int32")]
    error = refusal(UsageError, lambda: from_arrays(numbered(20, 4) + 0.5, whole))
    assert_says(error, "fractions", "input 'ids' takes int32", "Give whole numbers")


@pytest.mark.parametrize("source", [{"left": numbered(20, 4), "rite": 0}, {}])
def test_a_missing_input_is_named_beside_what_is_there(source):
    error = refusal(UsageError, lambda: from_arrays(source, TWO))
    assert_says(error, "lack the input", "right", "The model's inputs are left, right")
    assert_says(error, "left, rite" if source else "nothing")


@pytest.mark.parametrize(
    "source", [numbered(20, 4), [numbered(20, 4)], [numbered(20, 4)] * 3], ids=["array", "1", "3"]
)
def test_several_inputs_need_a_dict_or_a_list_of_as_many(source):
    error = refusal(UsageError, lambda: from_arrays(source, TWO))
    assert_says(error, "2 inputs", "a list of 2 arrays", "The inputs are left, right")


def test_different_numbers_of_samples_are_listed():
    error = refusal(UsageError, lambda: from_arrays([numbered(20, 4), numbered(19, 2, 3)], TWO))
    assert_says(error, "different numbers of samples", "left: 20", "right: 19")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_samples_are_refused_with_their_number(count):
    x = numbered(count, 4)
    for call in (lambda: from_arrays(x, ONE), lambda: from_elements(iter(x), ONE)):
        assert_says(refusal(LoadError, call), f"too few samples: {count};", "at least 8", "64")


def test_eight_samples_do():
    assert from_arrays(numbered(8, 4), ONE).counts == (6, 2)
    assert from_elements(iter(numbered(8, 4)), ONE).counts == (6, 2)


def test_what_a_generator_raises_is_told_with_how_far_it_came():
    def stream():
        yield numbered(5, 4)
        yield numbered(6, 4)
        raise RuntimeError("the disk is gone")

    error = refusal(LoadError, lambda: from_elements(stream(), ONE))
    assert_says(error, "RuntimeError after 11", "the disk is gone", "Repair what yields them")
    assert isinstance(error.__cause__, RuntimeError)


def test_a_generator_that_is_not_needed_any_more_may_raise():
    def stream():
        yield numbered(12, 4)
        raise RuntimeError

    assert from_elements(stream(), ONE, limit=12).counts == (9, 3)


def test_errors_of_the_package_and_interruptions_pass_a_generator_unchanged():
    def stream(error):
        yield numbered(5, 4)
        raise error

    for error in (LayerswapError("as it is", where="there"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            from_elements(stream(error), ONE)
        assert caught.value is error


# Files.


def test_npy_and_npz_are_read(tmp_path):
    x = numbered(12, 4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", left=x, right=x + 1)
    np.testing.assert_array_equal(read_arrays(tmp_path / "x.npy"), x)
    read = read_arrays(tmp_path / "x.npz")
    assert isinstance(read, Mapping)
    assert sorted(read) == ["left", "right"]
    np.testing.assert_array_equal(read["right"], x + 1)


def test_a_file_of_samples_is_only_read(tmp_path):
    np.save(tmp_path / "x.npy", numbered(12, 4))
    before = (tmp_path / "x.npy").read_bytes()
    from_arrays(read_arrays(tmp_path / "x.npy"), ONE).fit[0]["x"][:] = 7.0
    assert (tmp_path / "x.npy").read_bytes() == before


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("content", [b"", b"no array at all", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    error = refusal(LoadError, lambda: read_arrays(path))
    assert_says(error, str(path), "can't be read as samples", "numpy.save")


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=numbered(200, 4))
    path.write_bytes(path.read_bytes()[:-400])
    assert_says(refusal(LoadError, lambda: read_arrays(path)), str(path))


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_objects_in_a_file_are_not_unpickled(tmp_path, name):
    objects = np.array([{"a": 1}, None], dtype=object)
    (np.save if name == "x.npy" else np.savez)(tmp_path / name, objects)
    error = refusal(LoadError, lambda: read_arrays(tmp_path / name))
    assert_says(error, "without objects")


@pytest.mark.parametrize(("left", "right"), [(4, 3), (3, 4)])
def test_a_batch_with_different_numbers_of_samples_is_refused(left, right):
    elements = [[numbered(left, 4), numbered(right, 2, 3)] for _ in range(8)]
    error = refusal(UsageError, lambda: from_elements(iter(elements), TWO))
    assert_says(error, f"left: {left}", f"right: {right}")


@pytest.mark.parametrize(
    "call",
    [
        lambda: from_arrays([numbered(5 + i % 2, 6, 3) for i in range(16)], OPEN),
        lambda: from_elements(iter([[[1, 2], [3]]] * 8), ONE),
        lambda: from_elements(iter([None] * 8), ONE),
        lambda: from_elements(iter([()] * 8), ONE),
    ],
    ids=["list of images of different sizes", "ragged element", "None", "empty tuple"],
)
def test_what_makes_no_array_is_refused_by_an_error_of_the_package(call):
    refusal(LayerswapError, call)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e39, "float32"), (7e4, "float16"), (300, "uint8"), (-1, "uint8"), (2**40, "int32")],
)
def test_values_that_the_input_can_not_hold_are_refused(value, dtype):
    x = np.full((8, 4), value)
    error = refusal(LayerswapError, lambda: from_arrays(x, [Input("x", (None, 4), dtype)]))
    assert_says(error, "'x'", dtype)


def test_bytes_of_a_text_input_are_read_as_utf_8():
    words = np.array([["wörd".encode()]] * 8, dtype=object)  # what TensorFlow gives
    samples = from_arrays(words, [Input("x", (None, 1), "string")])
    assert set(samples.fit[0]["x"][:, 0]) == {"wörd"}


def test_the_limit_leaves_batches_of_a_fixed_size_whole():
    fixed = [Input("x", (4, None), "float32")]
    batches = (numbered(4, 3 + i % 2, start=4 * i) for i in range(20))
    assert from_elements(batches, fixed, limit=30).counts == (24, 4)


def test_a_batch_size_that_is_fixed_at_any_input_counts():
    inputs = [Input("left", (None, 4), "float32"), Input("right", (8, 2, 3), "float32")]
    samples = from_arrays([numbered(50, 4), numbered(50, 2, 3)], inputs)
    assert {len(batch["left"]) for batch in samples.fit} == {8}


def test_of_a_large_element_the_limit_is_taken_for_a_model_of_a_fixed_batch_size_too():
    samples = from_elements([numbered(300, 4)], FIXED, limit=64)
    assert samples.counts == (48, 16)
