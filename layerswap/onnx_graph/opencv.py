"""OpenCV's `dnn` module on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from layerswap.errors import MissingExtraError
from layerswap.onnx_graph.signatures import read_signature
from layerswap.records import Array
from layerswap.runtimes import Runtime

_PLACE = re.compile(r"OpenCV\([^)]*\) \S+ error: \([^)]*\) ")


class OpenCv(Runtime):
    """OpenCV with its default engine."""

    name = "opencv"

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise MissingExtraError(
                "opencv-python-headless", "opencv", "running an ONNX file in OpenCV"
            ) from error
        self._module: Any = cv2
        self.version: str = cv2.__version__

    def _load(self, path: str) -> Any:
        signature = read_signature(path)
        with self._silence():
            return self._module.dnn.readNetFromONNX(path), signature

    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        net, signature = loaded
        signature.check(inputs)
        with self._silence():
            for name, array in inputs.items():
                net.setInput(array, name)
            arrays = net.forward(signature.outputs)
        results = dict(zip(signature.outputs, arrays, strict=True))
        for name, array in results.items():
            if array is None:
                raise ValueError(f"output '{name}' is empty")
        return results

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Its log goes to stderr, and the level is that of the whole process."""
        logging = self._module.utils.logging
        level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            logging.setLogLevel(level)

    def _reason(self, error: Exception) -> str:
        text = str(getattr(error, "err", "") or error)
        lines = [line.lstrip("> ").strip() for line in text.splitlines()]
        telling = [_PLACE.sub("", line) for line in lines if line]
        return telling[0] if telling else type(error).__name__
