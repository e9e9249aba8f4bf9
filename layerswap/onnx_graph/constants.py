"""Values that are in a model, or beside it: initializers and Constant nodes alike."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from layerswap.records import Array

# Up to so many integers a constant is a setting, such as axes or a shape, and no weight.
_SETTING_SIZE = 64
_NUMBERS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _bits(name: str, number: int) -> int:
    """How much an element of a type takes in a file: what NumPy has no type for is packed."""
    own = re.match(r"U?(?:INT|FLOAT)(2|4)(?!\d)", name)
    size = np.dtype(helper.tensor_dtype_to_np_dtype(number)).itemsize
    return int(own[1]) if own else size * 8


# Text is never outside the file.
_BITS = {
    number: _bits(name, number)
    for name, number in onnx.TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}


class Constant:
    """A constant of a graph.

    Args:
        name: of the tensor.
        tensor: its message.
        folder: where external data may be.
    """

    def __init__(self, name: str, tensor: onnx.TensorProto, folder: Path) -> None:
        self.name = name
        self.shape = tuple(tensor.dims)
        self._tensor = tensor
        self._folder = folder

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @cached_property
    def type(self) -> str:
        """Its type and shape."""
        number = self._tensor.data_type
        known = number in onnx.TensorProto.DataType.values()
        name = onnx.TensorProto.DataType.Name(number).lower() if known else f"type {number}"
        name = {"float": "float32", "double": "float64"}.get(name, name)
        return f"{name}[{', '.join(map(str, self.shape))}]"

    @cached_property
    def missing(self) -> str:
        """Why its value can't be read; empty where it can."""
        outside = self._tensor.data_location == onnx.TensorProto.EXTERNAL
        known = not outside or self._tensor.data_type in _BITS
        try:
            if known and min(self.shape, default=0) >= 0:
                return self._missing_outside() if outside else self._missing_inside()
        except (OSError, RuntimeError, ValueError):  # no name of a file, or a circle of links
            pass
        return f"the weight '{self.name}' contradicts itself"

    def _missing_inside(self) -> str:
        try:
            self.value()
        except Exception as error:  # whatever numpy_helper makes of types, sizes and bytes
            raise ValueError from error
        return ""

    def _missing_outside(self) -> str:
        file, offset, length = self._external
        if not file.resolve().is_relative_to(self._folder.resolve()):
            return f"{file.name} is outside the model's folder and is not read"
        if not file.is_file():
            return f"{file.name} is missing"
        if offset < 0 or offset + length > file.stat().st_size or length != self._expected:
            return f"{file.name} doesn't hold the weight '{self.name}' as the model says"
        return ""

    @cached_property
    def _external(self) -> tuple[Path, int, int]:
        entries = {entry.key: entry.value for entry in self._tensor.external_data}
        numbers = [entries.get(key, "") for key in ("offset", "length")]
        offset, length = (int(n) if n.isdecimal() else -1 if n else None for n in numbers)
        place = self._folder / entries.get("location", "")
        return place, offset or 0, self._expected if length is None else length

    @property
    def _expected(self) -> int:
        return (self.size * _BITS[self._tensor.data_type] + 7) // 8

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self._tensor.data_type))

    @cached_property
    def digest(self) -> str:
        """Stands for type, shape and value; for type and shape alone where there is no value."""
        if self.missing:
            return self.type
        return f"{self.type} {hashlib.blake2b(_bytes(self.value()), digest_size=16).hexdigest()}"

    @property
    def is_setting(self) -> bool:
        """Whether it says what an operator does rather than what it learned."""
        kinds = ("int", "uint", "bool", "string")
        return self.type.startswith(kinds) and self.size <= _SETTING_SIZE and not self.missing

    def value(self) -> Array:
        """Its value; of external data a view of the file.

        Raises:
            ValueError: it doesn't hold what it claims to.
        """
        if self._tensor.data_location != onnx.TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(self._tensor))
        file, offset, length = self._external
        little = self._dtype.newbyteorder("<")
        if not self.size or length != self.size * little.itemsize:  # packed: a few bits each
            whole = onnx.TensorProto()
            whole.CopyFrom(self._tensor)
            whole.ClearField("external_data")
            whole.data_location = onnx.TensorProto.DEFAULT
            with file.open("rb") as stream:
                stream.seek(offset)
                whole.raw_data = stream.read(length)
            return np.asarray(numpy_helper.to_array(whole))
        data = np.memmap(file, np.uint8, "r", offset, (length,))
        result: Array = data.view(little).reshape(self.shape)
        return result

    def text(self) -> str:
        """Its value for people; of a setting."""
        return str(self.value().tolist())


def of_attributes(
    name: str, attributes: Iterable[onnx.AttributeProto], folder: Path
) -> Constant | None:
    """The constant that a Constant node stands for; None where it has none that is a tensor."""
    for attribute in attributes:
        if attribute.name == "value":
            return Constant(name, attribute.t, folder)
        if attribute.name in _NUMBERS:
            value = helper.get_attribute_value(attribute)
            tensor = numpy_helper.from_array(np.array(value, _NUMBERS[attribute.name]))
            return Constant(name, tensor, folder)
    return None


def _bytes(value: Array) -> memoryview | bytes:
    if value.dtype.hasobject:
        return repr(value.tolist()).encode()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
