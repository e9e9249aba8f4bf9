"""Values that are in a model, or beside it: initializers and Constant nodes alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from layerswap.onnx_graph import external
from layerswap.onnx_graph.tensors import bytes_wanted, decode
from layerswap.records import Array

# Up to so many integers a constant is a setting, such as axes or a shape, and no weight.
_SETTING_SIZE = 64
_NUMBERS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
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
        if external.is_outside(self._tensor):
            return self._missing_outside()
        readable = min(self.shape, default=0) >= 0 and decode(self._tensor) is not None
        return "" if readable else f"the weight '{self.name}' contradicts itself"

    def _missing_outside(self) -> str:
        contradiction = f"the weight '{self.name}' contradicts itself"
        entry, wanted = external.read_entry(self._tensor), bytes_wanted(self._tensor)
        if entry is None or wanted is None:
            return contradiction
        file = self._folder / entry.location
        if not external.is_within(entry.location, self._folder):
            return f"{file.name} is outside the model's folder and is not read"
        try:
            if not file.is_file():
                return f"{file.name} is missing"
            size = file.stat().st_size
        except OSError:  # no file can have such a name
            return contradiction
        if entry.offset + wanted > size or entry.length not in (None, wanted):
            return f"{file.name} doesn't hold the weight '{self.name}' as the model says"
        return ""

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
        if not external.is_outside(self._tensor):
            return np.asarray(numpy_helper.to_array(self._tensor))
        mapped = external.read(self._tensor, self._folder)
        if mapped is not None:
            return mapped
        entry, wanted = external.read_entry(self._tensor), bytes_wanted(self._tensor)
        if entry is None or wanted is None:
            raise ValueError(self.missing)
        whole = onnx.TensorProto()  # packed: a few bits each
        whole.CopyFrom(self._tensor)
        whole.ClearField("external_data")
        whole.data_location = onnx.TensorProto.DEFAULT
        with (self._folder / entry.location).open("rb") as stream:
            stream.seek(entry.offset)
            whole.raw_data = stream.read(wanted)
        return np.asarray(numpy_helper.to_array(whole))

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
