"""Reads an ONNX file's message; weights outside the file stay where they are."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from layerswap.errors import LoadError


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, without external data.

    Raises:
        LoadError: it is no ONNX file.
    """
    where = os.fspath(path)
    if not path.is_file():
        raise LoadError("there is no such file", where=where)
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's, or that of the file system
        raise LoadError(
            f"is no ONNX file, or damaged: {type(error).__name__}",
            where=where,
            hint="Copy or export it again.",
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise LoadError("is no ONNX file: it has no graph", where=where, hint="Export it again.")
    return model
