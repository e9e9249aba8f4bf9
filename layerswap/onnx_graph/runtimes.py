"""Runtimes that execute an ONNX file, behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import onnx

from layerswap.errors import ExportError, LoadError, MissingExtraError, UsageError
from layerswap.records import Array


class Runtime(Protocol):
    """Executes ONNX files."""

    name: str
    version: str

    def run(self, path: str | os.PathLike[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs a file once.

        Args:
            path: the `.onnx` file.
            inputs: one array per graph input.

        Returns:
            One array per graph output, in the graph's order.

        Raises:
            LoadError: the file can't be loaded.
            ExportError: the runtime fails on the graph or on these inputs.
        """
        ...


class OnnxRuntime:
    """onnxruntime on the CPU."""

    name = "onnxruntime"

    def __init__(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "runtime", "running an ONNX file") from error
        self._module = onnxruntime
        self.version: str = onnxruntime.__version__

    def run(self, path: str | os.PathLike[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Runtime.run`."""
        options = self._module.SessionOptions()
        options.log_severity_level = 4
        try:
            session = self._module.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _load_error(self, path, error) from error
        names = [output.name for output in session.get_outputs()]
        return _outputs(self, path, names, lambda: session.run(names, dict(inputs)))


class Reference:
    """onnx's own evaluator in NumPy: slow, and by definition right."""

    name = "reference"
    version: str = onnx.__version__

    def run(self, path: str | os.PathLike[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Runtime.run`."""
        from onnx.reference import ReferenceEvaluator

        try:
            onnx.checker.check_model(os.fspath(path))  # an empty file is a valid message
            evaluator = ReferenceEvaluator(onnx.load(path))
        except Exception as error:
            raise _load_error(self, path, error) from error
        names: list[str] = list(evaluator.output_names)
        return _outputs(self, path, names, lambda: list(evaluator.run(None, dict(inputs))))


_RUNTIMES: Mapping[str, Callable[[], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "reference": Reference,
}


def open_runtime(name: str) -> Runtime:
    """The runtime of that name: `onnxruntime` or `reference`.

    Raises:
        UsageError: there is no such runtime.
        MissingExtraError: its package isn't installed.
    """
    if name not in _RUNTIMES:
        raise UsageError(f"unknown runtime '{name}'; there is {', '.join(_RUNTIMES)}")
    return _RUNTIMES[name]()


def _outputs(
    runtime: Runtime,
    path: str | os.PathLike[str],
    names: list[str],
    call: Callable[[], list[Any]],
) -> dict[str, Array]:
    try:
        return dict(zip(names, call(), strict=True))
    except Exception as error:
        message = f"{runtime.name} {runtime.version} failed to run the model: {_reason(error)}"
        raise ExportError(message, where=os.fspath(path)) from error


def _load_error(runtime: Runtime, path: str | os.PathLike[str], error: Exception) -> LoadError:
    message = f"{runtime.name} {runtime.version} can't load the file: {_reason(error)}"
    return LoadError(message, where=os.fspath(path))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
