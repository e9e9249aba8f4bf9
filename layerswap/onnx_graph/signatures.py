"""What a file takes and gives, for runtimes that don't check what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from layerswap.records import Array

Shape = tuple[int | None, ...]

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of an ONNX file.

    Attributes:
        inputs: the shape of each by name, None where an axis or all of it is open.
        outputs: their names, in order.
    """

    inputs: Mapping[str, Shape | None]
    outputs: list[str]

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Sees to it that nothing is missing, misunderstood or cut off.

        OpenVINO reads uninitialized memory for an input that isn't given; OpenCV computes
        something from shapes that don't fit; both keep 32 bits of an integer.

        Raises:
            ValueError: names or shapes are not those of the file, or an integer needs more bits.
        """
        if inputs.keys() != self.inputs.keys():
            names = (", ".join(sorted(each)) or "none" for each in (self.inputs, inputs))
            raise ValueError("the file's inputs are {}, but given are {}".format(*names))
        for name, array in inputs.items():
            shape = self.inputs[name]
            if shape is not None and not _fits(array.shape, shape):
                wanted = ", ".join("?" if size is None else str(size) for size in shape)
                raise ValueError(f"input '{name}' has the shape {array.shape}, not ({wanted})")
            long = array.dtype.kind in "iu" and array.dtype.itemsize > 4 and array.size
            if long and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
                raise ValueError(f"input '{name}' holds integers of more than 32 bits")


def read_signature(path: str) -> Signature:
    """What a file says about its inputs and outputs; external data isn't read.

    Raises:
        Exception: of whatever kind, where the file is no ONNX model.
    """
    graph = onnx.load(path, load_external_data=False).graph
    if not graph.output:
        raise ValueError("there is no graph in it")  # an empty file is a valid message
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: _shape(value) for value in graph.input if value.name not in weights}
    return Signature(inputs, [value.name for value in graph.output])


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(a.dim_value if a.HasField("dim_value") else None for a in kind.shape.dim)


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(size in (None, given) for given, size in pairs)
