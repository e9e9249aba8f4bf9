"""The weights of Keras files by layer, read piece by piece without TensorFlow.

Nothing in a file is trusted: other files are not followed, and nothing is read that claims to be
larger than what is there.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from layerswap import weight_norms
from layerswap.errors import LoadError
from layerswap.keras_files import is_hdf5
from layerswap.keras_layers import Layer
from layerswap.records import Array

_WEIGHTS = "model.weights.h5"
# Deflate and gzip don't do better than this.
_MOST_COMPRESSION = 1_100
_SMALL = 1 << 27
# What a `.keras` file numbers, in that order.
_NAMES = {
    "GroupNormalization": ("gamma", "beta"),
    "LayerNormalization": ("gamma", "beta"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "SyncBatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "DepthwiseConv2D": ("depthwise_kernel", "bias"),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "Dense": ("kernel", "bias"),
}
_OWN_WEIGHTS = "top_level_model_weights"  # of an .h5 file: those of no layer
_DAMAGED = "The file is damaged: copy or save it again."
_UNSET = {"gamma": "scale", "beta": "center", "bias": "use_bias"}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight in an open file.

    Attributes:
        name: its own, unique in the layer; a number where the file says no more.
        data: the HDF5 dataset.
    """

    name: str
    data: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return tuple(self.data.shape)

    def __str__(self) -> str:
        return f"{self.data.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel or a table; a weight without a name, if it is the first."""
        named = self.name.rpartition("/")[2].endswith(("kernel", "embeddings"))
        return len(self.shape) > 1 and (named or self.name == "0")

    def comparable(self, other: Weight) -> bool:
        """Whether both have one type and shape."""
        return str(self) == str(other)

    def rows(self) -> Iterator[Array]:
        """Its values in order, flat, some at a time."""
        if not self.shape:
            yield np.asarray(self.data[()]).reshape(1)
            return
        step = max(1, weight_norms.PIECE // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], step):
            yield self.data[start : start + step].reshape(-1)


def norms(pairs: Iterable[tuple[Weight, Weight]]) -> dict[str, float]:
    """The norms of a `Difference` of weights taken as one; of equal types and shapes."""
    rows = (
        part
        for one, other in pairs
        if one.data.size
        for part in zip(one.rows(), other.rows(), strict=True)
    )
    return weight_norms.compare(rows)


@contextmanager
def open_weights(path: Path, model: Layer) -> Iterator[dict[str, list[Weight]]]:
    """The weights of a file by the path of their layer, in the order of the file.

    Args:
        path: a `.keras`, `.h5` or `.hdf5` file.
        model: the layers in it, under the paths of its configuration.

    Raises:
        LoadError: there are none, or they claim to be larger than what is there.
    """
    import h5py

    with ExitStack() as stack:
        stream: Any = path
        if not is_hdf5(path):
            stream = stack.enter_context(_unzipped(path))
        file = stack.enter_context(h5py.File(stream, "r"))
        if "model_config" in file.attrs:
            yield _by_group(file, model)
        else:
            yield _by_place(file, model)


# --- .keras: weights by number, under a place for each layer -------------------------------


def _by_place(file: Any, model: Layer) -> dict[str, list[Weight]]:
    layers: dict[str, list[Layer]] = defaultdict(list)
    for layer in model.all():
        layers[layer.place].append(layer)
    found: dict[str, list[Weight]] = defaultdict(list)

    def visit(name: str, item: Any) -> None:
        if not hasattr(item, "shape"):
            _refuse_links(item)
            return
        place, _, rest = name.rpartition("vars/")
        place = place.rstrip("/")
        inner: list[str] = []
        while place not in layers:
            place, _, part = place.rpartition("/")
            inner.insert(0, part)
        if not place and inner[:1] in (["optimizer"], ["metrics"]):
            return  # how it was trained, not what it is
        for layer in layers[place]:
            own = "/".join((*inner, rest if inner else _named(layer, rest)))
            found[layer.path].append(Weight(own, _sound(item)))

    _refuse_links(file)
    file.visititems(visit)  # passes links by
    return {path: sorted(weights, key=_order) for path, weights in found.items()}


def _order(weight: Weight) -> list[tuple[int, str]]:
    parts = weight.data.name.split("/")
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _named(layer: Layer, number: str) -> str:
    """What the numbered weight of a layer is called where that is known."""
    names = _NAMES.get(layer.class_name, ())
    if re.fullmatch(r"Conv\dD(Transpose)?", layer.class_name):
        names = ("kernel", "bias")
    names = tuple(n for n in names if layer.settings.get(_UNSET.get(n, "")) is not False)
    return names[int(number)] if number.isdecimal() and int(number) < len(names) else number


# --- .h5: weights by name, under a group for each layer of the model itself -----------------


def _by_group(file: Any, model: Layer) -> dict[str, list[Weight]]:
    groups = _inside(file, "model_weights")
    found: dict[str, list[Weight]] = defaultdict(list)
    if _OWN_WEIGHTS in set(groups):
        group = _inside(groups, _OWN_WEIGHTS)
        found[""] = [
            Weight(name.removesuffix(":0"), _weight(group, name)) for name in _listed(group)
        ]
    names = set(groups)
    for layer in model.children:
        if layer.name.partition("/")[0] not in names:
            continue  # the input of a Sequential
        group = _inside(groups, layer.name)
        leaves = [inner for inner in layer.all() if not inner.children]
        for name in _listed(group):
            holder, own = _holder(layer, leaves, name.removesuffix(":0"))
            found[holder.path].append(Weight(own, _weight(group, name)))
    return {path: _apart(weights) for path, weights in found.items()}


def _listed(group: Any) -> list[str]:
    """The names of its weights, in their order; a list that is too long for HDF5 is in parts."""
    parts = [group.attrs["weight_names"]] if "weight_names" in group.attrs else []
    while (key := f"weight_names{len(parts)}") in group.attrs:
        parts.append(group.attrs[key])
    return [n.decode() if isinstance(n, bytes) else str(n) for part in parts for n in part]


def _holder(layer: Layer, leaves: list[Layer], name: str) -> tuple[Layer, str]:
    """The layer whose weight it is, as far as its name says, and what it is called there."""
    above, _, own = name.rpartition("/")
    if len(leaves) == 1 and (above in ("", layer.name) or layer is leaves[0]):
        return leaves[0], own
    matches = [leaf for leaf in leaves if above in (leaf.name, leaf.path)]
    return (matches[0], own) if len(matches) == 1 else (layer, name)


def _apart(weights: list[Weight]) -> list[Weight]:
    seen: Counter[str] = Counter()
    result = []
    for weight in weights:
        seen[weight.name] += 1
        number = seen[weight.name]
        result.append(Weight(f"{weight.name}#{number}" if number > 1 else weight.name, weight.data))
    return result


def _weight(group: Any, name: str) -> Any:
    return _sound(_inside(group, name))


def _inside(group: Any, name: str) -> Any:
    """What is in the group under this name, not what a link takes from elsewhere."""
    import h5py

    here = group
    for part in name.split("/"):
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise LoadError(f"'{name}' in it is missing, or a link to elsewhere", hint=_DAMAGED)
        here = here[part]
    return here


def _refuse_links(group: Any) -> None:
    """Keras writes none, and what isn't followed can't be compared."""
    import h5py

    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise LoadError(f"'{group.name}/{name}' in it is a link to elsewhere", hint=_DAMAGED)


# --- what is not to be trusted ------------------------------------------------------------


def _sound(data: Any) -> Any:
    """The dataset, if it is one that holds what it claims to hold."""
    shape = getattr(data, "shape", None)
    kind = None if shape is None else data.dtype
    number = kind is not None and (kind.kind in "fiubc" or kind.str == "|V2")  # bfloat16
    if not number or data.is_virtual or data.external:
        raise LoadError(f"'{data.name}' in it is no weight", hint="Copy or save it again.")
    size = data.size * data.dtype.itemsize
    if size > _SMALL and size > _MOST_COMPRESSION * data.id.get_storage_size():
        raise LoadError(
            f"its weight '{data.name}' claims {size:,} bytes that aren't there",
            hint="It is damaged, or made to fill the memory, and was not read.",
        )
    return data


@contextmanager
def _unzipped(path: Path) -> Iterator[IO[bytes]]:
    """The HDF5 file in a `.keras` file: where it lies if it is stored as it is, else unpacked."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(_WEIGHTS)
        if entry.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                yield io.BufferedReader(_Window(file, _start(file, entry), entry.file_size))
            return
        if entry.file_size > max(_SMALL, _MOST_COMPRESSION * entry.compress_size):
            raise LoadError(
                f"its {_WEIGHTS} would unpack to {entry.file_size:,} bytes",
                hint="It looks like a decompression bomb and was not opened.",
            )
        with archive.open(entry) as packed, tempfile.TemporaryFile() as unpacked:
            while part := packed.read(1 << 20):
                unpacked.write(part)
            unpacked.seek(0)
            yield unpacked


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a header with two texts of its own lengths."""
    file.seek(entry.header_offset)
    header = file.read(30)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + len(header) + lengths


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._start + self._position)
        part = self._file.read(wanted)
        view[: len(part)] = part
        self._position += len(part)
        return len(part)
