"""The reference file beside an artifact: what its Keras model answered to which inputs.

With it a CI job verifies the artifact, and judges its drift, without TensorFlow. The file is
a plain `.npz` without pickles, `inputs/0/NAME` being input NAME of the first batch, plus a
member `reference.json`; the same reference always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerswap.atomic import StrPath, followed, replacing
from layerswap.errors import LoadError, UsageError
from layerswap.records import Array, Tolerance

SCHEMA_VERSION = 1
# What is wrong with a reference whose checksum isn't the artifact's.
OTHER_FILE = "was made for another file (SHA-256 differs)"

Arrays = dict[str, Array]
InputSpec = tuple[str, Sequence[int | None], str]

_HEADER = "reference.json"
_STORABLE = "biufc"


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Inputs and the answers of the Keras models, one mapping per batch size.

    Attributes:
        inputs: input name to array, the batch axis first.
        outputs: output name to array, as the GN Keras model computed them.
        source_outputs: the same outputs of the BN model, None where it isn't known.
        sha256: the checksum of the artifact that the reference belongs to, in hexadecimal.
        tolerance: what parity is judged by.
        seed: what the inputs were drawn with.
        layerswap_version: the version that wrote the reference.

    Raises:
        ValueError: the fields don't fit together: no batch or an empty one, mappings of different
            names, inputs of one batch that differ in batch size, a malformed checksum or tolerance.
    """

    inputs: tuple[Arrays, ...]
    outputs: tuple[Arrays, ...]
    source_outputs: tuple[Arrays, ...] | None
    sha256: str
    tolerance: Tolerance
    seed: int
    layerswap_version: str

    def __post_init__(self) -> None:
        """Checks that the fields fit together."""
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError("inputs and outputs need the same number of batches, at least one")
        for batches in (self.inputs, self.outputs):
            if not batches[0] or any(batch.keys() != batches[0].keys() for batch in batches):
                raise ValueError("the batches have different names, or none")
        for batch in self.inputs:
            sizes = {array.shape[:1] for array in batch.values()}
            if len(sizes) != 1 or sizes & {(), (0,)}:
                raise ValueError("the inputs of one batch differ in batch size, or have none")
        if self.source_outputs is not None:
            ours, theirs = map(_shapes, (self.outputs, self.source_outputs))
            if ours != theirs:
                raise ValueError("outputs and source outputs differ in names or shapes")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("the checksum is not 64 hexadecimal digits")
        limits = (self.tolerance.absolute, self.tolerance.relative)
        if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
            raise ValueError("the tolerance is not two finite numbers, zero or above")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes."""
        return tuple(next(iter(batch.values())).shape[0] for batch in self.inputs)


def reference_path(artifact: StrPath) -> Path:
    """Where the reference of an artifact lies: `model.onnx.ref.npz` beside `model.onnx`."""
    path = followed(artifact)
    if path.name in ("", ".."):  # `.` and the like: it lies beside that folder, not inside
        path = Path(os.path.abspath(path))
    return path.parent / f"{path.name}.ref.npz"


def data_path(artifact: StrPath) -> Path:
    """Where an ONNX file's external data lies: `model.onnx.data` beside `model.onnx`."""
    path = followed(artifact)
    return path.with_name(f"{path.name}.data")


def sha256_of(path: StrPath) -> str:
    """The checksum of a file in hexadecimal, read piece by piece.

    Raises:
        LoadError: the file can't be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return digest.hexdigest()


def fingerprint(artifact: StrPath) -> str:
    """Identity of an artifact of one file or more, in hexadecimal.

    Of a lone file it is the SHA-256. Of an ONNX file with external data beside it, and of a
    folder, it is the SHA-256 of one line `PATH SHA-256` per file, sorted; paths are relative.

    Raises:
        LoadError: a file can't be read.
    """
    path = followed(artifact)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    elif data_path(path).is_file():
        files = [path, data_path(path)]
    else:
        return sha256_of(path)
    root = path if path.is_dir() else path.parent
    lines = sorted(f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n" for file in files)
    # A file's name needs not be text.
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def random_inputs(
    specs: Iterable[InputSpec],
    batch: int,
    seed: int,
    *,
    free: int = 16,
    upper: int | Mapping[str, int] = 10,
) -> Arrays:
    """Draws inputs for a model, the same ones for the same arguments.

    Args:
        specs: `(name, shape, dtype)` per input. The shape's first axis is the batch; None
            stands for any size. `bfloat16` gives float32 values that bfloat16 holds exactly.
        batch: the batch size where the shape leaves it open.
        seed: of the random generator.
        free: the size of every other axis that the shape leaves open.
        upper: integers are drawn from 0 up to, not including, this; one number for all inputs
            or one per input name (10 for those that it doesn't name).

    Returns:
        Floating-point inputs standard normal, integers as said, booleans fair coins.

    Raises:
        UsageError: an input is of another type (text, complex numbers).
    """
    inputs: Arrays = {}
    for index, (name, shape, dtype) in enumerate(specs):
        # One generator per input: adding an input doesn't change the values of the others.
        generator = np.random.default_rng([seed, batch, index])
        first, *others = shape
        sizes = [
            batch if first is None else first,
            *(free if size is None else size for size in others),
        ]
        limit = upper if isinstance(upper, int) else upper.get(name, 10)
        inputs[name] = _draw(generator, name, sizes, dtype, limit)
    return inputs


def save_reference(reference: Reference, path: StrPath, *, overwrite: bool = True) -> None:
    """Writes the reference; equal references give equal bytes.

    Raises:
        UsageError: an array's dtype has no plain NumPy form (text, objects, bfloat16), or the
            file exists and `overwrite` is false.
        ExportError: the file can't be written.
    """
    header = {
        "schema": SCHEMA_VERSION,
        "sha256": reference.sha256,
        "tolerance": [reference.tolerance.absolute, reference.tolerance.relative],
        "seed": reference.seed,
        "layerswap_version": reference.layerswap_version,
    }
    members = {_HEADER: json.dumps(header, indent=2).encode()}
    for part in ("inputs", "outputs", "source_outputs"):
        for index, batch in enumerate(getattr(reference, part) or ()):
            for name in sorted(batch):
                members[f"{part}/{index}/{name}.npy"] = _to_npy(name, batch[name])
    with (
        replacing(path, overwrite) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for member, content in members.items():
            archive.writestr(_entry(member), content)


def is_storable(reference: Reference) -> bool:
    """Whether `save_reference` can write it: text has no plain NumPy form."""
    batches = (*reference.inputs, *reference.outputs)
    return all(array.dtype.kind in _STORABLE for batch in batches for array in batch.values())


def load_reference(path: StrPath) -> Reference:
    """Reads what `save_reference` wrote, trusting nothing in the file.

    Raises:
        LoadError: there is no such file, or it is damaged, incomplete or not a reference.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except FileNotFoundError as error:
        raise _unreadable(path, "there is no such file") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise _unreadable(path, f"not a complete .npz file ({error})") from error
    except Exception as error:  # whatever a hostile file makes the parsers raise
        raise _unreadable(path, f"not a layerswap reference ({error})") from error


def _read(archive: zipfile.ZipFile) -> Reference:
    parts: dict[str, dict[int, Arrays]] = {"inputs": {}, "outputs": {}, "source_outputs": {}}
    for info in archive.infolist():
        # Stored members are as long in memory as in the file, so no bomb can hide in one.
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        if info.filename != _HEADER:
            part, index, name = info.filename.removesuffix(".npy").split("/", 2)
            parts[part].setdefault(int(index), {})[name] = _from_npy(archive.read(info))
    header: dict[str, Any] = json.loads(archive.read(_HEADER))
    if header["schema"] != SCHEMA_VERSION:
        raise ValueError(f"schema {header['schema']}, expected {SCHEMA_VERSION}")
    inputs, outputs, source_outputs = (
        tuple(batches[index] for index in range(len(batches))) for batches in parts.values()
    )
    absolute, relative = map(float, header["tolerance"])
    return Reference(
        inputs=inputs,
        outputs=outputs,
        source_outputs=source_outputs or None,
        sha256=str(header["sha256"]),
        tolerance=Tolerance(absolute, relative),
        seed=int(header["seed"]),
        layerswap_version=str(header["layerswap_version"]),
    )


def _draw(
    generator: np.random.Generator, name: str, sizes: list[int], dtype: str, upper: int
) -> Array:
    if dtype == "bfloat16":
        wide: Array = generator.standard_normal(sizes).astype(np.float32)
        wide.view(np.uint32)[...] &= np.uint32(0xFFFF0000)
        return wide
    try:
        kind = np.dtype(dtype).kind
    except TypeError:
        kind = "O"
    if kind == "f":
        return generator.standard_normal(sizes).astype(dtype)
    if kind in "iu":
        return generator.integers(0, max(1, upper), sizes).astype(dtype)
    if kind == "b":
        return generator.integers(0, 2, sizes).astype(bool)
    raise UsageError(
        f"can't draw random values of type {dtype}",
        where=name,
        hint="Give sample inputs instead.",
    )


def _to_npy(name: str, array: Array) -> bytes:
    if array.dtype.kind not in _STORABLE:
        raise UsageError(
            f"arrays of type {array.dtype} can't be kept in a reference",
            where=name,
            hint="Convert bfloat16 to float32, which holds it exactly.",
        )
    portable = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, portable, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _from_npy(content: bytes) -> Array:
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array has another .npy version than 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in _STORABLE:
        raise ValueError(f"an array is of type {dtype}")
    # frombuffer sees to it that the bytes are as many as the shape says.
    flat = np.frombuffer(content, dtype, count=math.prod(shape), offset=stream.tell())
    if stream.tell() + flat.nbytes != len(content):
        raise ValueError("an array has more bytes than its shape says")
    array: Array = flat.reshape(shape, order="F" if fortran_order else "C").copy()
    return array


def _entry(member: str) -> zipfile.ZipInfo:
    """A zip entry without time stamp or traces of the system that wrote it."""
    entry = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _shapes(batches: tuple[Arrays, ...]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: array.shape for name, array in batch.items()} for batch in batches]


def _unreadable(path: StrPath, reason: str) -> LoadError:
    return LoadError(reason, where=os.fspath(path), hint="Export the model again to make it anew.")
