"""Runtimes that execute an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import onnx

from layerswap.errors import MissingExtraError
from layerswap.onnx_graph.opencv import OpenCv
from layerswap.onnx_graph.openvino import OpenVino
from layerswap.records import Array
from layerswap.references import data_path
from layerswap.runtimes import Runtime

# From this size of a model on, what running it needs in memory counts more than speed.
LARGE_BYTES = 1_000_000_000


class OnnxRuntime(Runtime):
    """onnxruntime on the CPU."""

    name = "onnxruntime"

    def __init__(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "runtime", "running an ONNX file") from error
        self._module = onnxruntime
        self.version: str = onnxruntime.__version__

    def _load(self, path: str) -> Any:
        return self._module.InferenceSession(
            path, self._options(path), providers=["CPUExecutionProvider"]
        )

    def _options(self, path: str) -> Any:
        options = self._module.SessionOptions()
        options.log_severity_level = 4
        files = (path, data_path(path))
        if sum(os.path.getsize(file) for file in files if os.path.isfile(file)) > LARGE_BYTES:
            # Prepacking keeps the weights a second time, in the layout of the kernels: for a
            # few runs that is memory spent for nothing.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in loaded.get_outputs()]
        return dict(zip(names, loaded.run(names, dict(inputs)), strict=True))


class Reference(Runtime):
    """onnx's own evaluator in NumPy: slow, and without any optimization."""

    name = "reference"
    version: str = onnx.__version__

    def _load(self, path: str) -> Any:
        from onnx.reference import ReferenceEvaluator

        onnx.checker.check_model(path)  # an empty file is a valid message
        return ReferenceEvaluator(onnx.load(path))

    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(loaded.output_names, loaded.run(None, dict(inputs)), strict=True))


_RUNTIMES: Mapping[str, Callable[[], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "opencv": OpenCv,
    "reference": Reference,
}


def open_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Args:
        name: one of `FILE_RUNTIMES`.

    Raises:
        MissingExtraError: its package isn't installed.
    """
    return _RUNTIMES[name]()
