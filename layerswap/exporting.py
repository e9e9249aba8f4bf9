"""Writes a model in one of four formats and proves that what was written computes the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layerswap.atomic import StrPath, check_target, publish, staging
from layerswap.comparison import measure_drift
from layerswap.errors import ExportError, MissingExtraError, ParityError, UsageError
from layerswap.records import (
    HIGHEST_OPSET,
    LOWEST_OPSET,
    Artifact,
    Drift,
    Parity,
    SwapPlan,
    TransferLog,
)
from layerswap.references import Reference, reference_path, save_reference, sha256_of

if TYPE_CHECKING:
    from layerswap.onnx_graph.runtimes import Runtime

Format = Literal["keras", "h5", "savedmodel", "onnx"]
Progress = Callable[[str], None]

SUFFIXES: Mapping[str, Format] = {
    ".keras": "keras",
    ".h5": "h5",
    ".hdf5": "h5",
    ".onnx": "onnx",
    "": "savedmodel",
}
DEFAULT_OPSET = HIGHEST_OPSET
# A reference that is never written to a file belongs to no artifact.
NO_CHECKSUM = "0" * 64


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A swapped model with the record of how it came about.

    Attributes:
        model: the GN model, a tf_keras model like the source.
        plan: the decision on every BatchNormalization.
        transfer: where every variable's value comes from.
        source: the BN model; None after `inplace=True`.
    """

    model: Any
    plan: SwapPlan
    transfer: TransferLog
    source: Any | None


def export(
    model: Any,
    path: StrPath,
    *,
    format: Format | None = None,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
    verify: bool = True,
    keep_failed: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Writes a model and proves that what was written computes the same.

    Args:
        model: a `Converted`, or any tf_keras model.
        path: where to. With ONNX goes a reference file, `NAME.onnx.ref.npz`.
        format: "keras", "h5", "savedmodel" or "onnx"; by default from the suffix (none means
            SavedModel).
        opset: of an ONNX file, 13 to 18.
        overwrite: replace an existing artifact.
        verify: run what was written (ONNX in ONNX Runtime, the others reloaded in tf_keras) and
            compare it with the model.
        keep_failed: keep an ONNX file that fails as `NAME.failed`.
        progress: called with the name of each stage.

    Raises:
        UsageError: unknown suffix or format, or the target exists.
        ExportError: the model can't be written in that format, or the file system refuses.
        ParityError: what was written doesn't compute the same; nothing is left at `path`.
        MissingExtraError: a package is missing; said before the work starts.
    """
    require_keras()
    kind = format or format_of(path)
    check_output(path, kind, overwrite, opset)
    say = progress or (lambda stage: None)
    if kind == "onnx":
        runtime = open_runtime() if verify else None
        return _export_onnx(model, path, opset, overwrite, runtime, keep_failed, say)
    return _export_keras(model, path, kind, overwrite, verify, say)


def format_of(path: StrPath) -> Format:
    """The artifact's format from its suffix; none means SavedModel.

    Raises:
        UsageError: the suffix is unknown.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"unknown suffix '{suffix}'",
            where=str(path),
            hint="Use .keras, .h5, .onnx or no suffix (SavedModel), or say which with --format.",
        )
    return SUFFIXES[suffix]


def check_output(path: StrPath, kind: Format, overwrite: bool, opset: int) -> None:
    """Says that an artifact couldn't be written before any work starts.

    Raises:
        UsageError: unknown format or opset, a suffix that doesn't fit, or the target exists.
        ExportError: the folder is missing or can't be written to.
    """
    if kind not in SUFFIXES.values():
        raise UsageError(f"unknown format '{kind}'; there is keras, h5, savedmodel, onnx")
    if kind in ("keras", "h5") and SUFFIXES.get(Path(path).suffix) != kind:
        raise UsageError(
            f"a file in the format {kind} needs the suffix .{kind}",
            where=str(path),
            hint="It would not be read back under another.",
        )
    check_target(path, overwrite, folder=kind == "savedmodel")
    if kind == "onnx":
        if not isinstance(opset, int) or not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
            raise UsageError(
                f"opset {opset} is not supported; there is {LOWEST_OPSET} to {HIGHEST_OPSET}"
            )
        check_target(reference_path(path), overwrite)


def require_keras() -> None:
    """Says that the extra `keras` is missing before any work starts.

    Raises:
        MissingExtraError: tensorflow, tf_keras or tf2onnx isn't installed.
    """
    for package in ("tensorflow", "tf_keras", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "keras", "reading and writing Keras models")


def open_runtime() -> Runtime:
    """The runtime that verifies ONNX exports.

    Raises:
        MissingExtraError: it isn't installed.
    """
    from layerswap.onnx_graph.runtimes import open_runtime as open_named

    return open_named("onnxruntime")


def _export_onnx(
    model: Any,
    path: StrPath,
    opset: int,
    overwrite: bool,
    runtime: Runtime | None,
    keep_failed: bool,
    say: Progress,
) -> Artifact:
    from layerswap import __version__, checking
    from layerswap.keras_graph import bridge, running
    from layerswap.onnx_graph.build import build, write

    keras_model, source = _pair(model)
    running.refuse_text(keras_model)
    target = Path(path)
    say("export")
    traced = bridge.trace(keras_model, opset=opset)
    graph = build(traced.graph, traced.arrays, version=__version__)
    with staging(target) as folder:
        files = write(graph, folder / target.name)
        checksum = sha256_of(files[0])
        say("verify" if runtime else "reference")
        reference = None
        try:
            reference = running.make_reference(
                keras_model, source, traced.input_names, traced.output_names, checksum, __version__
            )
        except ExportError:
            if runtime is not None:
                raise
        staged = [*files[1:], files[0]]
        if reference is not None:
            staged.insert(-1, reference_path(files[0]))
            save_reference(reference, staged[-2])
        parity = None
        if runtime is not None and reference is not None:
            parity = checking.measure_parity(runtime, files[0], reference)
            if not parity.ok:
                kept = target.with_name(f"{target.name}.failed") if keep_failed else None
                if kept:
                    publish([(files[0], kept)])
                raise _disparity(parity, target, kept)
        size = sum(file.stat().st_size for file in files)
        moves = [(file, target.with_name(file.name)) for file in staged]
        for _, place in moves:
            check_target(place, overwrite)  # may have appeared meanwhile
        publish(moves)
    return Artifact(
        path=str(target),
        format="onnx",
        bytes=size,
        opset=opset,
        sha256=checksum,
        reference=None if reference is None else str(reference_path(target)),
        parity=parity,
        drift=None if reference is None else _drift(reference),
    )


def _export_keras(
    model: Any,
    path: StrPath,
    kind: Literal["keras", "h5", "savedmodel"],
    overwrite: bool,
    verify: bool,
    say: Progress,
) -> Artifact:
    from layerswap import __version__
    from layerswap.keras_graph import recreation, running, storage

    keras_model, source = _pair(model)
    recreation.refuse_recreated(keras_model)
    say("export")
    proofs: list[tuple[Parity, Drift | None]] = []

    def judge(written: Path) -> None:
        say("verify")
        reference = running.make_reference(
            keras_model, source, *running.names(keras_model), NO_CHECKSUM, __version__
        )
        parity = running.reload_parity(keras_model, written, reference)
        if not parity.ok:
            raise _disparity(parity, Path(path), None)
        proofs.append((parity, _drift(reference)))

    storage.save(keras_model, path, kind, overwrite=overwrite, judge=judge if verify else None)
    target = Path(path)
    files = [f for f in target.rglob("*") if f.is_file()] if target.is_dir() else [target]
    parity, drift = proofs[0] if proofs else (None, None)
    return Artifact(
        path=str(target),
        format=kind,
        bytes=sum(file.stat().st_size for file in files),
        sha256=None if target.is_dir() else sha256_of(target),
        parity=parity,
        drift=drift,
    )


def _drift(reference: Reference) -> Drift | None:
    if reference.source_outputs is None:
        return None
    return measure_drift(reference.source_outputs, reference.outputs)


def _disparity(parity: Parity, target: Path, kept: Path | None) -> ParityError:
    limit = parity.tolerance
    return ParityError(
        f"{parity.runtime} does not reproduce the Keras model at output '{parity.worst_output}': "
        f"largest difference {parity.max_absolute:.3g}, relative {parity.max_relative:.3g}; "
        f"tolerance {limit.absolute:g} + {limit.relative:g} of the output's largest value",
        where=str(target),
        hint=f"The file is kept as {kept}."
        if kept
        else "Nothing was written."
        + (" --keep-failed keeps the file for inspection." if target.suffix == ".onnx" else ""),
    )


def _pair(model: Any) -> tuple[Any, Any | None]:
    """The model to export, and the BN model that it comes from where that is known."""
    if isinstance(model, Converted):
        return model.model, model.source
    return model, None
