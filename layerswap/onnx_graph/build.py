"""From a traced graph and its weights to a file: the one way through this room."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import checker, helper

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.attach import attach
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.groupnorm import expand
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
        ExportError: the graph is not valid ONNX.
    """
    model = expand(attach(graph, arrays), profile=profile)
    model = canonicalize(model, version=version, metadata=metadata)
    check(model)
    return model


def check(model: onnx.ModelProto) -> None:
    """Runs the ONNX checker with strict shape inference, whatever the model's size.

    Raises:
        ExportError: the model is not valid; holds the checker's reason.
    """
    light = onnx.ModelProto()
    light.CopyFrom(_without_weights(model))
    for tensor in model.graph.initializer:
        if _is_large(tensor):
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            light.graph.initializer.append(tensor)
    try:
        checker.check_model(light, full_check=True)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(f"the graph is not valid ONNX: {reason[0] if reason else error}") from error


def write(model: onnx.ModelProto, path: str | os.PathLike[str]) -> list[Path]:
    """Writes a model; one too large for a single file gets its weights in `NAME.onnx.data`.

    A file that was there before is replaced only once the new one is complete.

    Args:
        model: not changed.
        path: the `.onnx` file.

    Returns:
        The files written, the model's first.

    Raises:
        ExportError: a file can't be written.
    """
    target = Path(path)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    data = target.with_name(f"{target.name}.data") if size > SINGLE_FILE_BYTES else None
    partial = target.with_name(f".{target.name}.partial")
    partial_data = target.with_name(f".{target.name}.data.partial")
    try:
        if data is not None:
            model = _externalized(model, partial_data, data.name)
        partial.write_bytes(model.SerializeToString(deterministic=True))
        if data is not None:
            os.replace(partial_data, data)
        os.replace(partial, target)
    except OSError as error:
        raise ExportError(f"can't write: {error.strerror or error}", where=str(target)) from error
    finally:
        for leftover in (partial, partial_data):
            leftover.unlink(missing_ok=True)
    return [target] if data is None else [target, data]


def _externalized(model: onnx.ModelProto, data: Path, location: str) -> onnx.ModelProto:
    result = _without_weights(model)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            entry = result.graph.initializer.add()
            if not _is_large(tensor):
                entry.CopyFrom(tensor)
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            file.write(tensor.raw_data)
            entry.name, entry.data_type = tensor.name, tensor.data_type
            entry.dims.extend(tensor.dims)
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", location),
                ("offset", str(offset)),
                ("length", str(len(tensor.raw_data))),
            ):
                entry.external_data.add(key=key, value=value)
    return result


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the initializers; never holds them even for a moment."""
    result = onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        opset_import=model.opset_import,
        metadata_props=model.metadata_props,
    )
    result.graph.name = model.graph.name
    graphs.replace_all(result.graph.node, model.graph.node)
    graphs.replace_all(result.graph.input, model.graph.input)
    graphs.replace_all(result.graph.output, model.graph.output)
    return result


def _is_large(tensor: onnx.TensorProto) -> bool:
    return len(tensor.raw_data) > _EXTERNAL_BYTES
