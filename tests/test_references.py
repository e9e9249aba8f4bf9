"""The reference file: round trip, equal bytes, and distrust of what others wrote."""

import hashlib
import io
import json
import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from layerswap.errors import ExportError, LoadError, UsageError
from layerswap.records import Tolerance
from layerswap.references import (
    Reference,
    fingerprint,
    load_reference,
    random_inputs,
    reference_path,
    save_reference,
    sha256_of,
)


def batch(size, *names, seed=0, shape=(3, 2), dtype=np.float32):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(size, *shape)).astype(dtype) for name in names}


@pytest.fixture
def reference():
    return Reference(
        inputs=(batch(2, "x", "mask/in:0"), batch(3, "x", "mask/in:0")),
        outputs=(batch(2, "y", seed=1), batch(3, "y", seed=1)),
        source_outputs=(batch(2, "y", seed=2), batch(3, "y", seed=2)),
        sha256="ab" * 32,
        tolerance=Tolerance(1e-5, 1e-4),
        seed=7,
        layerswap_version="0.1.0",
    )


@pytest.fixture
def saved(reference, tmp_path):
    path = tmp_path / "m.onnx.ref.npz"
    save_reference(reference, path)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_round_trip(reference, saved):
    loaded = load_reference(saved)
    assert_same(loaded.inputs, reference.inputs)
    assert_same(loaded.outputs, reference.outputs)
    assert_same(loaded.source_outputs, reference.source_outputs)
    for field in ("sha256", "tolerance", "seed", "layerswap_version", "batches"):
        assert getattr(loaded, field) == getattr(reference, field)
    assert loaded.batches == (2, 3)
    assert loaded.inputs[0]["x"].flags.writeable


def test_round_trip_without_source_outputs(reference, tmp_path):
    save_reference(replace(reference, source_outputs=None), tmp_path / "r.npz")
    assert load_reference(tmp_path / "r.npz").source_outputs is None


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int64", "bool", "c8"])
def test_every_plain_dtype_survives(reference, tmp_path, dtype):
    outputs = tuple({"y": np.ones((size, 2), dtype)} for size in (2, 3))
    save_reference(replace(reference, outputs=outputs, source_outputs=None), tmp_path / "r.npz")
    assert_same(load_reference(tmp_path / "r.npz").outputs, outputs)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), ()])
def test_scalar_and_empty_outputs_survive(reference, tmp_path, shape):
    outputs = ({"y": np.ones(shape)}, {"y": np.ones(shape)})
    save_reference(replace(reference, outputs=outputs, source_outputs=None), tmp_path / "r.npz")
    assert_same(load_reference(tmp_path / "r.npz").outputs, outputs)


def test_numpy_reads_it_without_layerswap(reference, saved):
    with np.load(saved, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["inputs/1/x"], reference.inputs[1]["x"])


def test_equal_references_give_equal_bytes(reference, tmp_path):
    swapped = tuple(dict(reversed(list(part.items()))) for part in reference.inputs)
    fortran = tuple({"y": np.asfortranarray(part["y"])} for part in reference.outputs)
    save_reference(reference, tmp_path / "a.npz")
    save_reference(replace(reference, inputs=swapped, outputs=fortran), tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_big_endian_arrays_are_written_little_endian(reference, tmp_path):
    big = tuple({"y": part["y"].astype(">f4")} for part in reference.outputs)
    save_reference(reference, tmp_path / "a.npz")
    save_reference(replace(reference, outputs=big), tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_saving_replaces_unless_told_not_to(reference, saved):
    save_reference(replace(reference, seed=8), saved)
    assert load_reference(saved).seed == 8
    with pytest.raises(UsageError, match="exists"):
        save_reference(reference, saved, overwrite=False)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_into_a_missing_folder(reference, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        save_reference(reference, tmp_path / "absent" / "r.npz")


@pytest.mark.parametrize("values", [np.array([["a"]]), np.array([[None]]), np.zeros((1, 1), "V2")])
def test_what_is_not_a_number_is_not_saved(reference, tmp_path, values):
    outputs = ({"y": values}, {"y": values})
    with pytest.raises(UsageError, match="can't be kept"):
        save_reference(replace(reference, outputs=outputs, source_outputs=None), tmp_path / "r.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": ()},
        {"inputs": (batch(2, "x"),)},
        {"inputs": (batch(2, "x"), batch(3, "z"))},
        {"inputs": ({}, {})},
        {"inputs": ({"x": np.ones((2, 1)), "z": np.ones((3, 1))}, batch(3, "x", "z"))},
        {"inputs": ({"x": np.ones(())}, {"x": np.ones(())})},
        {"outputs": (batch(2, "y"), batch(3, "q"))},
        {"source_outputs": (batch(2, "y"),)},
        {"source_outputs": (batch(2, "y"), batch(4, "y"))},
        {"sha256": "AB" * 32},
        {"sha256": ""},
        {"tolerance": Tolerance(-1.0, 0.0)},
        {"tolerance": Tolerance(float("nan"), 0.0)},
    ],
)
def test_fields_that_do_not_fit_together(reference, changes):
    with pytest.raises(ValueError, match=r"\w"):
        replace(reference, **changes)


def test_a_missing_file(tmp_path):
    with pytest.raises(LoadError, match="no such file"):
        load_reference(tmp_path / "r.npz")


def test_a_folder(tmp_path):
    with pytest.raises(LoadError):
        load_reference(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 30, 0.5, 0.99])
def test_a_truncated_file(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(LoadError):
        load_reference(saved)


def test_a_flipped_bit(reference, saved):
    content = bytearray(saved.read_bytes())
    spot = content.find(reference.inputs[0]["x"].tobytes()) + 5
    content[spot] ^= 1
    saved.write_bytes(content)
    with pytest.raises(LoadError, match="CRC"):
        load_reference(saved)


@pytest.mark.parametrize("missing", ["reference.json", "outputs/1/y.npy", "inputs/0/x.npy"])
def test_a_missing_member(saved, missing):
    contents = members(saved)
    del contents[missing]
    rewrite(saved, contents)
    with pytest.raises(LoadError):
        load_reference(saved)


@pytest.mark.parametrize("field", ["schema", "sha256", "tolerance", "seed", "layerswap_version"])
def test_a_missing_field(saved, field):
    contents = members(saved)
    header = json.loads(contents["reference.json"])
    del header[field]
    rewrite(saved, {**contents, "reference.json": json.dumps(header)})
    with pytest.raises(LoadError, match=field):
        load_reference(saved)


@pytest.mark.parametrize(
    "header",
    [
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"schema": 2}',
        b'{"schema": 1, "tolerance": 3, "sha256": "", "seed": 0, "layerswap_version": ""}',
        b'{"schema": 1, "tolerance": [0, 0], "sha256": "", "seed": Infinity}',
    ],
)
def test_a_broken_header(saved, header):
    rewrite(saved, {**members(saved), "reference.json": header})
    with pytest.raises(LoadError):
        load_reference(saved)


class Bomb:
    """Would leave a mark if it were ever unpickled."""

    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_pickles_are_never_opened(saved):
    evil = npy(np.array([[Bomb()]], dtype=object), allow_pickle=True)
    rewrite(saved, {**members(saved), "outputs/0/y.npy": evil})
    with pytest.raises(LoadError, match="object"):
        load_reference(saved)
    assert not Bomb.exploded


def array_claiming(shape, payload=b""):
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing like an array",
        npy(np.ones((2, 2)), version=(2, 0)),
        npy(np.array([["text"]])),
        array_claiming((2, 3), b"\0" * 20),
        array_claiming((2, 3), b"\0" * 28),
        array_claiming((1 << 40, 1 << 40)),
        array_claiming((-1, 2)),
    ],
)
def test_a_broken_array(saved, content):
    rewrite(saved, {**members(saved), "outputs/0/y.npy": content})
    with pytest.raises(LoadError):
        load_reference(saved)


def test_arrays_of_the_wrong_shape(saved):
    rewrite(saved, {**members(saved), "source_outputs/1/y.npy": npy(np.ones((3, 9), "f4"))})
    with pytest.raises(LoadError, match="differ"):
        load_reference(saved)


@pytest.mark.parametrize("stray", ["x.npy", "else/0/x.npy", "inputs/x/y.npy", "inputs/9/x.npy"])
def test_stray_members(saved, stray):
    rewrite(saved, {**members(saved), stray: npy(np.ones((2, 2)))})
    with pytest.raises(LoadError):
        load_reference(saved)


def test_a_zip_bomb(saved):
    rewrite(saved, {**members(saved), "reference.json": b" " * 10**7}, zipfile.ZIP_DEFLATED)
    with pytest.raises(LoadError, match="compressed"):
        load_reference(saved)


def test_an_ordinary_npz_is_no_reference(tmp_path):
    np.savez(tmp_path / "r.npz", x=np.ones(3))
    with pytest.raises(LoadError, match="not a layerswap reference"):
        load_reference(tmp_path / "r.npz")


def test_reference_path(tmp_path):
    assert reference_path("a/model.onnx").as_posix() == "a/model.onnx.ref.npz"
    assert reference_path(tmp_path / "m") == tmp_path / "m.ref.npz"


def test_reference_path_of_a_folder_named_by_a_dot(tmp_path, monkeypatch):
    """It lies beside the folder, not inside."""
    folder = tmp_path / "model" / "variables"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert reference_path(".") == tmp_path / "model" / "variables.ref.npz"
    assert reference_path("..") == tmp_path / "model.ref.npz"
    assert reference_path("../").as_posix() == reference_path("..").as_posix()
    assert reference_path("/").as_posix() == "/.ref.npz"


def test_sha256_of(tmp_path):
    content = bytes(range(256)) * 8000
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    with pytest.raises(LoadError):
        sha256_of(tmp_path / "absent")


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_of_a_lone_file_is_its_checksum(tmp_path):
    (tmp_path / "m.onnx").write_text("graph")
    assert fingerprint(tmp_path / "m.onnx") == sha256("graph")
    with pytest.raises(LoadError, match="No such file"):
        fingerprint(tmp_path / "absent.onnx")


def test_fingerprint_covers_the_external_data(tmp_path):
    (tmp_path / "m.onnx").write_text("graph")
    (tmp_path / "m.onnx.data").write_text("weights")
    expected = sha256(f"m.onnx {sha256('graph')}\nm.onnx.data {sha256('weights')}\n")
    assert fingerprint(tmp_path / "m.onnx") == expected
    (tmp_path / "m.onnx.ref.npz").write_text("is no part of it")
    assert fingerprint(str(tmp_path / "m.onnx")) == expected
    (tmp_path / "m.onnx.data").write_text("Weights")
    assert fingerprint(tmp_path / "m.onnx") != expected


def test_fingerprint_of_a_folder_covers_every_file_and_no_place(tmp_path, monkeypatch):
    names = ["b", "a/z", "a.txt", "a/b/c"]
    for folder in ("one", "two"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"of {name}")
        names.reverse()  # the order on the disk doesn't matter
    lines = sorted(f"{name} {sha256(f'of {name}')}\n" for name in names)
    expected = sha256("".join(lines))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two") == expected
    monkeypatch.chdir(tmp_path / "one" / "a")
    assert fingerprint("..") == expected
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "B")
    assert fingerprint(tmp_path / "two") != expected
    (tmp_path / "one" / "a" / "new").touch()
    assert fingerprint(tmp_path / "one") != expected


def test_fingerprint_of_a_name_that_is_not_text(tmp_path):
    (tmp_path / os.fsdecode(b"\xff")).write_text("x")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(tmp_path))


SPECS = [
    ("image", (None, None, None, 3), "float32"),
    ("ids", (None, 5), "int32"),
    ("flag", (None,), "bool"),
    ("fixed", (4, 2), "float16"),
]


def test_random_inputs_follow_the_specs():
    inputs = random_inputs(SPECS, 2, seed=0, free=6, upper=3)
    assert {name: (array.shape, array.dtype.name) for name, array in inputs.items()} == {
        "image": ((2, 6, 6, 3), "float32"),
        "ids": ((2, 5), "int32"),
        "flag": ((2,), "bool"),
        "fixed": ((4, 2), "float16"),
    }
    assert set(np.unique(inputs["ids"])) <= {0, 1, 2}


def test_random_floats_are_standard_normal():
    values = random_inputs([("x", (None, 1000), "float32")], 20, seed=3)["x"]
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05


def test_random_inputs_are_determined_by_the_seed():
    ours, again = (random_inputs(SPECS, 2, seed=5) for _ in range(2))
    assert_same([ours], [again])
    assert not np.array_equal(ours["image"], random_inputs(SPECS, 2, seed=6)["image"])
    first, second = (random_inputs([(n, (None, 9), "float32")], 2, 5)[n] for n in "ab")
    np.testing.assert_array_equal(first, second)
    pair = random_inputs([("a", (None, 9), "float32"), ("b", (None, 9), "float32")], 2, 5)
    assert not np.array_equal(pair["a"], pair["b"])


def test_integer_bounds_per_input():
    specs = [("a", (None, 500), "int64"), ("b", (None, 500), "uint8"), ("c", (None, 500), "int8")]
    inputs = random_inputs(specs, 2, seed=0, upper={"a": 1000, "c": 1})
    assert 100 < inputs["a"].max() < 1000
    assert inputs["b"].max() == 9
    assert inputs["c"].max() == 0


def test_bfloat16_values_are_exact_in_bfloat16():
    values = random_inputs([("x", (None, 8), "bfloat16")], 4, seed=0)["x"]
    assert values.dtype == np.float32
    assert not (values.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("dtype", ["string", "complex64", "object", "str", "resource"])
def test_types_without_random_values(dtype):
    with pytest.raises(UsageError, match="random"):
        random_inputs([("x", (None,), dtype)], 2, seed=0)
