"""Reads tensors that nobody vouches for: their type, their size, their value."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from layerswap.records import Array


def dtype_name(data_type: int) -> str:
    """A tensor's type as NumPy calls it; empty where onnx doesn't know it."""
    if data_type == onnx.TensorProto.BFLOAT16:
        return "bfloat16"  # NumPy has none, and onnx up to 1.18 says float32
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(data_type)))
    except (KeyError, TypeError, ValueError):
        return ""


def bytes_wanted(tensor: onnx.TensorProto) -> int | None:
    """How many bytes a tensor's values take as raw data; None where that isn't fixed."""
    if tensor.data_type not in onnx.TensorProto.DataType.values():
        return None
    name, count = onnx.TensorProto.DataType.Name(tensor.data_type), math.prod(tensor.dims)
    if not dtype_name(tensor.data_type) or name == "STRING" or min(tensor.dims, default=0) < 0:
        return None
    for bits in (2, 4):  # several values in a byte
        if name.startswith((f"INT{bits}", f"UINT{bits}", f"FLOAT{bits}")):
            return -(-int(count) * bits // 8)
    if name.startswith(("BFLOAT16", "FLOAT8")):  # float32 for onnx up to 1.18
        return int(count) * (2 if name == "BFLOAT16" else 1)
    return int(count * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def size_of(tensor: onnx.TensorProto) -> int:
    """About how many bytes a tensor holds, whatever its dimensions say."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return bytes_wanted(tensor) or 0
    return int(tensor.ByteSize())


def decode(tensor: onnx.TensorProto) -> Array | None:
    """A tensor's value; None where it lies outside the file or contradicts itself."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    try:
        return numpy_helper.to_array(tensor)
    except Exception:  # NumPy's or onnx's, for whatever a damaged tensor holds
        return None
