"""From a traced graph and its weights to a file: the one way through this room."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx
from onnx import checker, helper

from layerswap.atomic import replacing
from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.attach import attach
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.groupnorm import expand
from layerswap.onnx_graph.repairs import repair
from layerswap.records import Array

# A protobuf message ends at 2 GiB; beyond this the weights go beside the file.
SINGLE_FILE_BYTES = 1_900_000_000
# Smaller tensors stay in the file: shapes and scalars that tools read without the weights.
_EXTERNAL_BYTES = 1_024
# Lets runtimes map the weights into memory.
_ALIGNMENT = 4_096


def build(
    graph: onnx.ModelProto,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    *,
    version: str = "",
    profile: str = "portable",
) -> onnx.ModelProto:
    """A complete, checked and canonical model.

    Args:
        graph: as the bridge made it; not changed.
        arrays: value of each graph input that stands for a weight.
        metadata: properties to write into the model.
        version: producer version to write.
        profile: how GroupNormalization is spelled, a key of `groupnorm.PROFILES`.

    Raises:
        ExportError: the graph is not valid ONNX, or a weight isn't what the graph expects.
    """
    light, constants = graphs.lighten(graph)
    attach(light, constants, arrays)
    repair(light, constants)
    expand(light, constants, profile=profile)
    canonicalize(light, constants, version=version, metadata=metadata)
    check(light, constants)
    return graphs.complete(light, constants)


def check(light: onnx.ModelProto, constants: Mapping[str, Array]) -> None:
    """Runs the ONNX checker with strict shape inference, whatever the weights' size.

    Args:
        light: a model without initializers; not changed.
        constants: value of each initializer.

    Raises:
        ExportError: the model is not valid; holds the checker's reason.
    """
    small = {name: value for name, value in constants.items() if value.nbytes <= _EXTERNAL_BYTES}
    model = graphs.complete(light, small)
    for name, value in constants.items():
        if name not in small:
            dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, dtype, value.shape))
    try:
        checker.check_model(model, full_check=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"the graph is not valid ONNX: {reason[0]}") from error


def write(
    model: onnx.ModelProto, path: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Writes a model; one too large for a single file gets its weights in `NAME.onnx.data`.

    A file that was there before is replaced only once the new one is complete.

    Args:
        model: not changed.
        path: the `.onnx` file.
        overwrite: whether existing files may be replaced.

    Returns:
        The files written, the model's first.

    Raises:
        UsageError: a file exists and `overwrite` is false.
        ExportError: a file can't be written.
    """
    target = Path(path)
    size = sum(map(graphs.byte_size, model.graph.initializer))
    data = target.with_name(f"{target.name}.data") if size > SINGLE_FILE_BYTES else None
    with ExitStack() as files:
        partial = files.enter_context(replacing(target, overwrite))
        if data is not None:
            partial_data = files.enter_context(replacing(data, overwrite))
            model = _externalized(model, partial_data, data.name)
        partial.write_bytes(model.SerializeToString(deterministic=True))
    return [target] if data is None else [target, data]


def _externalized(model: onnx.ModelProto, data: Path, location: str) -> onnx.ModelProto:
    """Writes the large initializers to `data`; a model that refers to them at `location`."""
    result = graphs.without_initializers(model)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            entry = result.graph.initializer.add()
            if graphs.byte_size(tensor) <= _EXTERNAL_BYTES or not tensor.HasField("raw_data"):
                entry.CopyFrom(tensor)
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            length = file.write(tensor.raw_data)
            entry.name, entry.data_type = tensor.name, tensor.data_type
            entry.dims.extend(tensor.dims)
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", location),
                ("offset", str(offset)),
                ("length", str(length)),
            ):
                entry.external_data.add(key=key, value=value)
    return result
