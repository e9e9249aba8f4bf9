"""OpenVINO on the CPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from layerswap.errors import MissingExtraError
from layerswap.onnx_graph.signatures import read_signature
from layerswap.records import Array
from layerswap.runtimes import Runtime

# Left to itself OpenVINO computes in bfloat16 where the CPU can: that is 1 % off in the bundled
# digits network, and says nothing about the file.
_CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
_TELEMETRY = "openvino_telemetry"
# Lines of its messages that say where in its source it noticed, not what is wrong.
_NOISE = re.compile(
    "Exception from |Check '|FrontEnd API failed|Model wasn't fully converted|Errors during"
    "|While validating|Summary:|.* with a message:$"
)


class OpenVino(Runtime):
    """OpenVINO on the CPU, in float32 whatever the processor."""

    name = "openvino"

    def __init__(self) -> None:
        try:
            self._module = _openvino()
        except ImportError as error:
            raise MissingExtraError(
                "openvino", "openvino", "running an ONNX file in OpenVINO"
            ) from error
        self.version: str = self._module.__version__.partition("-")[0]

    def _load(self, path: str) -> Any:
        # First, since what isn't ONNX OpenVINO takes for other formats, whose readers print.
        signature = read_signature(path)
        return self._module.Core().compile_model(path, "CPU", _CONFIG), signature

    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        compiled, signature = loaded
        signature.check(inputs)
        # It forgets inputs that its folding has made superfluous, and wants arrays of its own.
        kept = {name for port in compiled.inputs for name in port.names}
        results = compiled({n: np.require(a, None, "W") for n, a in inputs.items() if n in kept})
        return {name: results[index] for index, name in enumerate(signature.outputs)}

    def _reason(self, error: Exception) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if not _NOISE.match(line)]
        return (telling or lines or [type(error).__name__])[0].removeprefix("-- ")


def _openvino() -> Any:
    """The package, without its telemetry.

    Importing it would otherwise send a message to its maker and write an identifier into the
    home folder. Without that package it does neither, and works the same.
    """
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hidden:
            sys.modules.pop(_TELEMETRY, None)
    return openvino
