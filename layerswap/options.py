"""What the user wants of an artifact: one validated, immutable set of fields.

The same fields are the keyword arguments of `export` and `convert` and the options of the
command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError

from layerswap.atomic import StrPath
from layerswap.errors import UsageError
from layerswap.policy import explain
from layerswap.records import LOWEST_OPSET, PROFILE_OPSETS, TRACED_OPSET

Format = Literal["keras", "h5", "savedmodel", "onnx"]
GroupNormForm = Literal["portable", "plain", "precise", "primitive", "native"]
ExternalData = Literal["auto", "always", "never"]
Shape = tuple[int | None, ...]

SUFFIXES: Mapping[str, Format] = {
    ".keras": "keras",
    ".h5": "h5",
    ".hdf5": "h5",
    ".onnx": "onnx",
    "": "savedmodel",
}
# The name of the only input, of all inputs and of all outputs.
ANY = "all"

# Fields that say something of one format only.
_ONLY: Mapping[str, Format] = {
    "opset": "onnx",
    "groupnorm": "onnx",
    "target_runtime": "onnx",
    "inputs_as_nchw": "onnx",
    "outputs_as_nchw": "onnx",
    "input_shape": "onnx",
    "fp16": "onnx",
    "external_data": "onnx",
    "keep_failed": "onnx",
    "serving_only": "savedmodel",
}


def _to_opset(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < LOWEST_OPSET:
        raise ValueError(f"must be an integer, {LOWEST_OPSET} or above, not {value!r}")
    return value


def _to_names(value: Any) -> Any:
    if value is True:
        return (ANY,)
    if not value:
        return ()
    return (value,) if isinstance(value, str) else value


def _to_shapes(value: Any) -> Any:
    """A shape, or a mapping of input names to shapes, as a mapping."""
    shapes = value if isinstance(value, Mapping) else {} if value is None else {ANY: value}
    return {str(name): _to_shape(shape) for name, shape in shapes.items()}


def _to_shape(value: Any) -> Shape:
    if isinstance(value, Iterable) and not isinstance(value, str):
        sizes = tuple(value)
        if sizes and all(
            n is None or (isinstance(n, int) and not isinstance(n, bool) and n > 0) for n in sizes
        ):
            return sizes
    raise ValueError(
        f"must hold one positive integer, or None where it stays open, per axis, not {value!r}"
    )


class ExportOptions(BaseModel):
    """How a model is written.

    Args:
        format: "keras", "h5", "savedmodel" or "onnx"; by default from the path's suffix (none
            means SavedModel).
        opset: of an ONNX file, 13 to the newest that onnx and the installed onnxruntime know.
        groupnorm: the operators that GroupNormalization becomes: "portable", "plain" (no
            BatchNormalization operator), "precise" (whatever the input's mean), "primitive"
            (reductions and arithmetic) or "native" (GroupNormalization, opset 21).
        target_runtime: "onnxruntime" tunes the "portable" form for its blocked convolutions on
            x86; it stays right everywhere, but may be slower elsewhere.
        inputs_as_nchw, outputs_as_nchw: names of inputs and outputs, or "all" (also True) for
            all of rank 4, that are channels first in the ONNX file though not in Keras.
        input_shape: shape that an input is fixed to, the batch first and None where an axis
            stays open; for several inputs a mapping from their names.
        fp16: convolutions and products of an ONNX file with weights, and what lies between
            them, in float16; normalisation, reductions, inputs and outputs stay as they are.
        external_data: whether large weights go beside an ONNX file, into `NAME.onnx.data`:
            "auto" (where one file can't hold them), "always" or "never".
        serving_only: leave the Keras part out of a SavedModel; TensorFlow runs it, tf_keras
            doesn't load it.
        overwrite: replace an existing artifact.
        verify: run what was written and compare it with the model.
        keep_failed: keep an ONNX file that fails, with all that belongs to it, in the folder
            `NAME.failed`.

    Raises:
        UsageError: unknown field, wrong type or value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format | None = None
    opset: Annotated[int, BeforeValidator(_to_opset)] = TRACED_OPSET
    groupnorm: GroupNormForm = "portable"
    target_runtime: Literal["onnxruntime"] | None = None
    inputs_as_nchw: Annotated[tuple[str, ...], BeforeValidator(_to_names)] = ()
    outputs_as_nchw: Annotated[tuple[str, ...], BeforeValidator(_to_names)] = ()
    input_shape: Annotated[dict[str, Shape], BeforeValidator(_to_shapes)] = {}
    fp16: StrictBool = False
    external_data: ExternalData = "auto"
    serving_only: StrictBool = False
    overwrite: StrictBool = False
    verify: StrictBool = True
    keep_failed: StrictBool = False

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(explain(error, ExportOptions.model_fields)) from None

    def for_path(self, path: StrPath) -> ExportOptions:
        """The options with the format resolved.

        Raises:
            UsageError: the suffix is unknown or doesn't fit the format, or an option says
                something of another format.
        """
        kind = self.format or format_of(path)
        if kind in ("keras", "h5") and SUFFIXES.get(Path(path).suffix) != kind:
            raise UsageError(
                f"a file in the format {kind} needs the suffix .{kind}",
                where=str(path),
                hint="It would not be read back under another.",
            )
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        given = ExportOptions(**{**fields, "format": kind})
        for name, only in _ONLY.items():
            idle = getattr(self, name) in (False, None, (), {})
            if kind != only and name in fields and not idle:
                raise UsageError(
                    f"{name} is an option for the format {only}, not for {kind}", where=str(path)
                )
        if self.keep_failed and not self.verify:
            raise UsageError("keep_failed has nothing to keep where verify is off")
        if self.target_runtime and self.fp16:
            raise UsageError("target_runtime tunes computation in float32, not fp16")
        if self.target_runtime and self.groupnorm != "portable":
            raise UsageError(f"target_runtime tunes the form 'portable', not '{self.groupnorm}'")
        least = PROFILE_OPSETS[self.groupnorm]
        if self.opset >= least:
            return given
        if "opset" in fields:
            raise UsageError(
                f"groupnorm '{self.groupnorm}' needs opset {least} or above, not {self.opset}"
            )
        return ExportOptions(**{**fields, "format": kind, "opset": least})


def split_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments that are fields of `ExportOptions`, and all others."""
    known = ExportOptions.model_fields
    ours = {name: value for name, value in fields.items() if name in known}
    return ours, {name: value for name, value in fields.items() if name not in known}


def format_of(path: StrPath) -> Format:
    """The artifact's format from its suffix; none means SavedModel.

    Raises:
        UsageError: the suffix is unknown.
    """
    suffix, name = Path(path).suffix.lower(), Path(path).name.lower()
    if name in SUFFIXES:
        raise UsageError(f"'{name}' is a suffix without a name before it", where=str(path))
    if suffix not in SUFFIXES:
        raise UsageError(
            f"unknown suffix '{suffix}'",
            where=str(path),
            hint="Use .keras, .h5, .onnx or no suffix (SavedModel), or say which with --format.",
        )
    return SUFFIXES[suffix]
