"""What runs an artifact: the runtimes by name, and what they have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerswap.atomic import followed
from layerswap.errors import ExportError, LoadError

if TYPE_CHECKING:
    from layerswap.records import Array

# What runs an ONNX file, and what runs a SavedModel folder; the first of each is the default.
FILE_RUNTIMES = ("onnxruntime", "openvino", "opencv", "reference")
FOLDER_RUNTIMES = ("savedmodel",)
RUNTIMES = (*FILE_RUNTIMES, *FOLDER_RUNTIMES)
# Stands for every runtime that takes the artifact and is installed.
ALL = "all"

# Runs a loaded artifact once: arrays by the names of the inputs, then of the outputs.
Session = Callable[[Mapping[str, "Array"]], "dict[str, Array]"]


class Runtime(ABC):
    """Runs artifacts. A subclass says how to load one, how to call it, and how it complains.

    Attributes:
        name: one of `RUNTIMES`.
        version: of the package that does the work.
    """

    name: str
    version: str

    def session(self, path: str | os.PathLike[str]) -> Session:
        """Loads an artifact, to be run as often as wanted.

        Args:
            path: the `.onnx` file or the SavedModel folder.

        Returns:
            What runs it once: takes one array per input, by name, and gives one per output, in the
            artifact's order. Raises ExportError where the runtime fails on the graph or on these
            inputs.

        Raises:
            LoadError: the artifact can't be loaded.
        """
        place = os.fspath(followed(path))  # external data lies beside the file, not the link
        try:
            place.encode()
        except UnicodeEncodeError as error:  # OpenCV would take the process down
            raise LoadError(
                f"{self.name} {self.version} can't open it: its path is not valid Unicode",
                where=place,
                hint="Rename it.",
            ) from error
        try:
            loaded = self._load(place)
        except Exception as error:
            reason = f"{self.name} {self.version} can't load it: {self._reason(error)}"
            raise LoadError(reason, where=place) from error

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            try:
                return self._call(loaded, inputs)
            except Exception as error:
                failure = f"{self.name} {self.version} failed to run the model"
                raise ExportError(f"{failure}: {self._reason(error)}", where=place) from error

        return run

    @abstractmethod
    def _load(self, path: str) -> Any:
        """Whatever `_call` needs."""

    @abstractmethod
    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for these inputs."""

    def _reason(self, error: Exception) -> str:
        """The line of an error's text that says what is wrong."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
