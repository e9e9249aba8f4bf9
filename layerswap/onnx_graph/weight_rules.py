"""What can be wrong with the values of weights. Reads every one of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from layerswap import catalog
from layerswap.onnx_graph import external
from layerswap.onnx_graph.subjects import Subject
from layerswap.onnx_graph.tensors import decode
from layerswap.records import Array, Finding

# At which input an operator has its kernels.
_KERNELS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gather": (0,),
    "Gemm": (1,),
    "MatMul": (1,),
    "GRU": (1, 2),
    "LSTM": (1, 2),
    "RNN": (1, 2),
}
# Kinds of NumPy's types; bfloat16 and its like are of kind V.
_NUMBERS = "fciuV"
# How many values are looked at at once: outside weights are mapped, not read as a whole.
_CHUNK = 1 << 22


def judge_weights(subject: Subject) -> Iterator[Finding]:
    """NaN, infinity and kernels that are all zero: LS601, LS602."""
    for path, tensor in subject.view.tensors:
        values = _values(tensor, subject)
        if values is None:
            continue
        bad = _count_nonfinite(values)
        if bad:
            yield catalog.find("nonfinite-weights").finding(
                path or tensor.name, f"{bad} of its {values.size} values are NaN or infinite"
            )
    for place in subject.view.places:
        for index in _KERNELS.get(place.node.op_type, ()) if place.is_a(*_KERNELS) else ():
            name = place.input(index)
            known = place.scope.tensor(name)
            values = _values(known, subject) if known is not None else None
            if values is not None and values.ndim > 1 and values.size and is_zero(values):
                yield catalog.find("zero-weights").finding(
                    place.record.path, f"all {values.size} values of {name} are 0"
                )


def _values(tensor: onnx.TensorProto, subject: Subject) -> Array | None:
    values = (
        external.read(tensor, subject.path.parent)
        if external.is_outside(tensor)
        else decode(tensor)
    )
    return values if values is not None and values.dtype.kind in _NUMBERS else None


def _count_nonfinite(values: Array) -> int:
    """How many of the values are NaN or infinite."""
    if values.dtype.kind in "iu":
        return 0
    flat = values.reshape(-1)
    parts = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return sum(int(np.count_nonzero(~np.isfinite(_widened(part)))) for part in parts)


def is_zero(values: Array) -> bool:
    """Whether all values are zero."""
    flat = values.reshape(-1)
    parts = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return not any(bool(np.any(_widened(part))) for part in parts)


def _widened(values: Array) -> Array:
    """The same in a type that NumPy itself computes with."""
    return values.astype(np.float32) if values.dtype.kind == "V" else values
