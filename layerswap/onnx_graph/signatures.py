"""What a file takes and gives, for runtimes that don't check what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from layerswap.records import Array


@dataclass(frozen=True, slots=True)
class Signature:
    """Names of an ONNX file's inputs and outputs, in order."""

    inputs: list[str]
    outputs: list[str]

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Sees to it that nothing is missing and that nothing is cut off.

        Raises:
            ValueError: names differ from those of the file, or an integer needs more than the
                32 bits that OpenVINO and OpenCV keep of it.
        """
        if inputs.keys() != set(self.inputs):
            names = (", ".join(sorted(each)) or "none" for each in (self.inputs, inputs))
            raise ValueError("the file's inputs are {}, but given are {}".format(*names))
        limits = np.iinfo(np.int32)
        for name, array in inputs.items():
            long = array.dtype.kind in "iu" and array.dtype.itemsize > 4 and array.size
            if long and not (limits.min <= array.min() and array.max() <= limits.max):
                raise ValueError(f"input '{name}' holds integers of more than 32 bits")


def read_signature(path: str) -> Signature:
    """The names in a file; its external data isn't read.

    Raises:
        Exception: of whatever kind, where the file is no ONNX model.
    """
    graph = onnx.load(path, load_external_data=False).graph
    if not graph.output:
        raise ValueError("there is no graph in it")  # an empty file is a valid message
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    return Signature(inputs, [value.name for value in graph.output])
