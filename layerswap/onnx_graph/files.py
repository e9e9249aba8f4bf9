"""Writes a light model and its constants to disk, one weight at a time.

Neither a complete `ModelProto` nor its serialized form is ever in memory: both would be a copy
of all weights, and both end at 2 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.options import ExternalData
from layerswap.records import Array
from layerswap.references import data_path

# A protobuf message ends at 2 GiB; beyond this the weights go beside the file.
SINGLE_FILE_BYTES = 1_900_000_000
# Smaller tensors stay in the file: shapes and scalars that tools read without the weights.
_EXTERNAL_BYTES = 1_024
# Lets runtimes map the weights into memory.
_ALIGNMENT = 4_096


def write(
    light: onnx.ModelProto,
    constants: Mapping[str, Array],
    path: str | os.PathLike[str],
    *,
    external_data: ExternalData = "auto",
) -> list[Path]:
    """Writes a model; its larger weights go into `NAME.onnx.data` where they must or shall.

    Args:
        light: a model without initializers; not changed.
        constants: value of each initializer, in order.
        path: the `.onnx` file, in a folder of its own until it is proven (`atomic.staging`).
        external_data: `always`, `never`, or `auto`: where a single file could not hold them.

    Returns:
        The files written, the model's first.

    Raises:
        ExportError: the weights don't fit into a single file, which was asked for.
        OSError: a file can't be written.
    """
    target = Path(path)
    size = sum(value.nbytes for value in constants.values())
    too_large = size > SINGLE_FILE_BYTES
    if too_large and external_data == "never":
        raise ExportError(
            f"{size / 1e9:.1f} GB of weights don't fit into a single ONNX file, which ends at 2 GB",
            where=os.fspath(path),
            hint="Let them go beside the file: --external-data auto.",
        )
    outside: dict[str, onnx.TensorProto] = {}
    written = [target]
    if too_large or external_data == "always":
        written.append(data_path(target))
        with written[1].open("wb") as stream:
            outside = dict(_write_data(constants, stream, written[1].name))
    with target.open("wb") as stream:
        _write_model(light, constants, outside, stream)
    return written


def _write_data(
    constants: Mapping[str, Array], stream: BinaryIO, location: str
) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Writes the large constants; yields what stands for each in the model."""
    for name, value in constants.items():
        if value.nbytes <= _EXTERNAL_BYTES or not graphs.is_raw(value):
            continue
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        entry = graphs.tensor_header(name, value)
        entry.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": location, "offset": str(stream.tell()), "length": str(value.nbytes)}
        for key, text in place.items():
            entry.external_data.add(key=key, value=text)
        stream.write(graphs.raw_bytes(value))
        yield name, entry


def _write_model(
    light: onnx.ModelProto,
    constants: Mapping[str, Array],
    outside: Mapping[str, onnx.TensorProto],
    stream: BinaryIO,
) -> None:
    """Writes the message of the complete model piece by piece.

    The wire format (Protocol Buffers, "Encoding"): a field that has a length is its key, that
    length and its bytes; a message is its fields one behind the other.
    """
    graph = light.graph.SerializeToString(deterministic=True)
    pieces = [_initializer(name, value, outside.get(name)) for name, value in constants.items()]
    size = len(graph) + sum(len(start) + (0 if v is None else v.nbytes) for start, v in pieces)
    rest = onnx.ModelProto()
    rest.CopyFrom(light)
    rest.ClearField("graph")
    stream.write(rest.SerializeToString(deterministic=True))
    stream.write(_field(onnx.ModelProto, "graph", size))
    stream.write(graph)
    for start, value in pieces:
        stream.write(start)
        if value is not None:
            stream.write(graphs.raw_bytes(value))


def _initializer(
    name: str, value: Array, whole: onnx.TensorProto | None
) -> tuple[bytes, Array | None]:
    """The beginning of an initializer's field, and the weight whose bytes end it, if any."""
    if whole is None and graphs.is_raw(value):
        start = graphs.tensor_header(name, value).SerializeToString(deterministic=True)
        start += _field(onnx.TensorProto, "raw_data", value.nbytes)
        field = _field(onnx.GraphProto, "initializer", len(start) + value.nbytes)
        return field + start, value
    start = (whole or graphs.tensor(name, value)).SerializeToString(deterministic=True)
    return _field(onnx.GraphProto, "initializer", len(start)) + start, None


def _field(message: Any, name: str, length: int) -> bytes:
    """Key and length of a field: its number · 8 + 2, which stands for "has a length"."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))
