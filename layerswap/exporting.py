"""Writes a model in one of four formats and proves that what was written computes the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerswap import destinations
from layerswap.atomic import StrPath, followed, staging
from layerswap.comparison import measure_drift
from layerswap.errors import (
    ExportError,
    LoadError,
    MissingExtraError,
    ParityError,
    UsageError,
)
from layerswap.options import ExportOptions
from layerswap.records import (
    TRACED_OPSET,
    Artifact,
    Calibration,
    Drift,
    Finding,
    Parity,
    SwapPlan,
    TransferLog,
)
from layerswap.references import (
    Reference,
    fingerprint,
    is_storable,
    reference_path,
    save_reference,
    sha256_of,
)

if TYPE_CHECKING:
    from layerswap.keras_graph.bridge import Traced
    from layerswap.keras_graph.interface import Interface

# Called with the name of each stage; in calibration and distillation also with how many of how
# many steps are done.
Progress = Callable[..., None]


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A swapped model with the record of how it came about.

    Attributes:
        model: the GN model, a tf_keras model like the source.
        plan: the decision on every BatchNormalization.
        transfer: where every variable's value comes from.
        source: the BN model; None after `inplace=True`.
        calibration: what samples changed, where there were any.
        findings: what they showed.
    """

    model: Any
    plan: SwapPlan
    transfer: TransferLog
    source: Any | None
    calibration: Calibration | None = None
    findings: tuple[Finding, ...] = ()


def export(
    model: Any,
    path: StrPath,
    options: ExportOptions | Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Artifact:
    """Writes a model and proves that what was written computes the same.

    ONNX is proven in ONNX Runtime, a SavedModel's signature in TensorFlow, the rest by loading
    it again with tf_keras.

    Args:
        model: a `Converted`, or any tf_keras model or the path of one: its own
            GroupNormalization layers are decomposed like those that came of a swap.
        path: where to. With ONNX and SavedModel goes a reference file, `NAME.ref.npz`.
        options: how; or give its fields as keyword arguments (`format`, `opset`, `groupnorm`,
            `target_runtime`, `inputs_as_nchw`, `outputs_as_nchw`, `input_shape`, `fp16`,
            `external_data`, `serving_only`, `overwrite`, `verify`, `keep_failed`): see
            `ExportOptions`.
        progress: called with the name of each stage.

    Raises:
        UsageError: an option is wrong, the suffix is unknown, or the target exists.
        ExportError: the model can't be written in that format, or the file system refuses.
        ParityError: what was written doesn't compute the same; nothing is left at `path`.
        MissingExtraError: a package is missing; said before the work starts.
    """
    require_keras()
    wanted = prepare(path, read_options(options, fields), model)
    say = progress or (lambda stage: None)
    target = followed(path)
    made = model if isinstance(model, Converted) else None
    keras_model = _keras_model(made.model if made else model)
    from layerswap.keras_graph.running import fresh_states

    with fresh_states(keras_model), staging(target) as folder:
        say("export")
        written = _write(keras_model, made, folder / target.name, wanted)
        try:
            reference, parity = _prove(written, wanted, say)
            if parity is not None and not parity.ok:
                raise _disparity(parity, target)
        except (ExportError, LoadError, ParityError) as error:
            if wanted.keep_failed:
                error.hint = f"The file is kept as {destinations.keep(written.files, target)}."
            raise
        return _finish(written, path, wanted, reference, parity)


def read_options(
    options: ExportOptions | Mapping[str, Any] | None, fields: Mapping[str, Any]
) -> ExportOptions:
    """Options from what `export` takes.

    Raises:
        UsageError: a field is unknown or its value wrong, or keywords come with ready options.
    """
    if options is None or isinstance(options, Mapping):
        return ExportOptions(**{**{str(name): v for name, v in (options or {}).items()}, **fields})
    if fields or not isinstance(options, ExportOptions):
        raise UsageError("give ExportOptions or their fields as keyword arguments")
    return options


def prepare(path: StrPath, options: ExportOptions, source: Any = None) -> ExportOptions:
    """The options with the format resolved, once it is sure that an artifact can be written.

    Args:
        path: where the artifact goes.
        options: as the user gives them.
        source: what it is made of, if that is a path: never to be replaced.

    Raises:
        UsageError: the options don't fit the path, the opset isn't known, or the target exists.
        ExportError: the folder is missing or can't be written to.
        MissingExtraError: the runtime that is to verify it isn't installed.
    """
    wanted = options.for_path(path)
    destinations.check(path, wanted, source)
    if wanted.format == "onnx":
        if wanted.opset > TRACED_OPSET:
            from layerswap.onnx_graph.opsets import newest_opset

            if wanted.opset > (newest := newest_opset()):
                raise UsageError(
                    f"opset {wanted.opset} is not supported; the newest that the installed onnx "
                    f"and onnxruntime know is {newest}"
                )
        if wanted.verify:
            from layerswap import verifying

            verifying.open_runtime(path)
    return wanted


def require_keras() -> None:
    """Says that the extra `keras` is missing before any work starts.

    Raises:
        MissingExtraError: tensorflow, tf_keras or tf2onnx isn't installed.
    """
    for package in ("tensorflow", "tf_keras", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "keras", "reading and writing Keras models")


def _keras_model(model: Any) -> Any:
    from layerswap.keras_graph import storage

    if destinations.is_path(model):
        return storage.load(model)
    storage.check_model(model)
    return model


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """What lies in the staging folder, the artifact itself first, and what it was made of."""

    files: list[Path]
    model: Any
    source: Any | None
    interface: Interface
    findings: tuple[Finding, ...] = ()


def _write(model: Any, made: Converted | None, path: Path, options: ExportOptions) -> _Written:
    """Writes the artifact, unproven."""
    from layerswap import __version__
    from layerswap.keras_graph import bridge, identity, recreation, running, storage

    source = made.source if made else None
    if options.format != "onnx":
        assert options.format is not None
        if not options.serving_only:
            recreation.refuse_recreated(model)
        storage.save(model, path, options.format, serving_only=options.serving_only)
        return _Written([path], model, source, running.interface_of(model))

    from layerswap.onnx_graph.build import assemble
    from layerswap.onnx_graph.files import write

    running.refuse_text(model)
    traced = bridge.trace(
        model,
        opset=min(options.opset, TRACED_OPSET),
        input_shape=options.input_shape,
        inputs_as_nchw=options.inputs_as_nchw,
        outputs_as_nchw=options.outputs_as_nchw,
    )
    facts = identity.describe(model, source, made.plan if made else None, traced.groupnorms)
    light, constants = assemble(
        traced.graph,
        traced.arrays,
        facts,
        version=__version__,
        profile=options.groupnorm,
        opset=options.opset,
        float16=options.fp16,
        target=options.target_runtime,
    )
    files = write(light, constants, path, external_data=options.external_data)
    return _Written(files, model, source, traced.interface, tuple(_remarks(traced, options)))


def _remarks(traced: Traced, options: ExportOptions) -> Iterator[Finding]:
    if not traced.weight_free:
        yield Finding(
            "weights-frozen",
            "info",
            "",
            "loops, branches, lookup tables, or an operation whose ONNX form depends on a weight's "
            "value: the weights went through the graph's conversion, which takes longer and more "
            "memory and ends at 2 GB",
        )
    if options.groupnorm == "native" and traced.groupnorms:
        yield Finding(
            "native-groupnorm",
            "warning",
            "",
            "runtimes compute the operator GroupNormalization as E[x²] − E[x]²: where an input's "
            "mean is large beside its deviation the result is wrong or NaN",
            "Leave --groupnorm at its default unless you know the runtime.",
        )


def _prove(
    written: _Written, options: ExportOptions, say: Progress
) -> tuple[Reference | None, Parity | None]:
    """The reference, which joins the files where the format has one, and the parity."""
    from layerswap import __version__, verifying
    from layerswap.keras_graph import running

    kept = options.format in ("onnx", "savedmodel")
    if not (kept or options.verify):
        return None, None
    say("verify" if options.verify else "reference")
    artifact = written.files[0]
    try:
        reference = running.make_reference(
            written.model,
            written.source,
            written.interface,
            fingerprint(artifact),
            __version__,
            "float16" if options.fp16 else None,
        )
    except ExportError:
        if options.verify:
            raise
        return None, None
    if kept and is_storable(reference):
        written.files.append(reference_path(artifact))
        save_reference(reference, written.files[-1])
    if not options.verify:
        return reference, None
    if options.format == "onnx" or options.serving_only:
        runtime = verifying.open_runtime(artifact)
        return reference, verifying.measure_parity(runtime, artifact, reference)
    return reference, running.reload_parity(written.model, artifact, reference)


def _finish(
    written: _Written,
    path: StrPath,
    options: ExportOptions,
    reference: Reference | None,
    parity: Parity | None,
) -> Artifact:
    """Puts the files in their places and says what they are."""
    artifact = written.files[0]
    own = [f for file in written.files if file != reference_path(artifact) for f in _files_in(file)]
    size = sum(file.stat().st_size for file in own)
    checksum = None if artifact.is_dir() else sha256_of(artifact)
    has_reference = reference_path(artifact) in written.files
    destinations.place(written.files, path, options)
    assert options.format is not None
    return Artifact(
        path=str(path),
        format=options.format,
        bytes=size,
        opset=options.opset if options.format == "onnx" else None,
        sha256=checksum,
        reference=str(reference_path(path)) if has_reference else None,
        parity=parity,
        drift=None if reference is None else _drift(reference),
        findings=written.findings,
    )


def _files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _drift(reference: Reference) -> Drift | None:
    if reference.source_outputs is None:
        return None
    return measure_drift(reference.source_outputs, reference.outputs)


def _disparity(parity: Parity, target: Path) -> ParityError:
    limit = parity.tolerance
    return ParityError(
        f"{parity.runtime} does not reproduce the Keras model at output '{parity.worst_output}': "
        f"largest difference {parity.max_absolute:.3g}, relative {parity.max_relative:.3g}; "
        f"tolerance {limit.absolute:g} + {limit.relative:g} of the output's largest value",
        where=str(target),
        hint="Nothing was written."
        + (" --keep-failed keeps the file for inspection." if target.suffix == ".onnx" else ""),
    )
