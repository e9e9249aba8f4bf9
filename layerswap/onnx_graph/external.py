"""Weights outside an ONNX file: where they should be, and whether they are there.

ONNX, "External data": `location` is a path relative to the model's folder, `offset` and `length`
count bytes. A file from elsewhere may name any path, so nothing outside the folder is opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
from onnx import helper

from layerswap.onnx_graph.tensors import bytes_wanted, dtype_name
from layerswap.records import Array


@dataclass(frozen=True, slots=True)
class Entry:
    """What a tensor says of where its values are.

    Attributes:
        location: the file, relative to the model's folder.
        offset: the first byte.
        length: number of bytes; None: as many as the tensor's shape takes.
    """

    location: str
    offset: int
    length: int | None


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values are in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def read_entry(tensor: onnx.TensorProto) -> Entry | None:
    """Where a tensor's values are; None where what it says makes no sense."""
    said = {item.key: item.value for item in tensor.external_data}
    try:
        length = int(said["length"]) if said.get("length") else None
        entry = Entry(said["location"], int(said.get("offset") or 0), length)
    except (KeyError, ValueError):
        return None
    sensible = entry.offset >= 0 and (length is None or length >= 0) and "\0" not in entry.location
    return entry if sensible and entry.location else None


def is_within(location: str, folder: Path) -> bool:
    """Whether a location lies in the model's folder, links followed."""
    windows = PureWindowsPath(location)
    if Path(location).is_absolute() or windows.drive or windows.root:
        return False
    try:
        return (folder / location).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False


def read(tensor: onnx.TensorProto, folder: Path) -> Array | None:
    """A tensor's values, mapped, not copied; None where they aren't there or aren't numbers.

    Args:
        tensor: one whose values are outside the file.
        folder: the model's.
    """
    entry, wanted = read_entry(tensor), bytes_wanted(tensor)
    name = dtype_name(tensor.data_type)
    if entry is None or wanted is None or not name or not is_within(entry.location, folder):
        return None
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
    count = math.prod(tensor.dims)
    if wanted != count * dtype.itemsize:  # several values in a byte
        return None
    place = folder / entry.location
    try:
        if entry.offset + wanted > place.stat().st_size:
            return None
        if not count:
            return np.empty(tuple(tensor.dims), dtype)
        return np.memmap(place, dtype, "r", entry.offset, tuple(tensor.dims))
    except (OSError, ValueError):
        return None
