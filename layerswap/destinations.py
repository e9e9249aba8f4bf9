"""Where an artifact and what belongs to it go, and what may be replaced there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerswap.atomic import StrPath, check_target, followed, publish
from layerswap.errors import UsageError
from layerswap.options import ExportOptions, Format
from layerswap.references import data_path, reference_path


def check(path: StrPath, options: ExportOptions, source: Any = None) -> None:
    """Says before any work that an artifact couldn't be put there.

    Args:
        path: where the artifact goes.
        options: with the format resolved.
        source: what it is made of; if that is a path, it is never replaced.

    Raises:
        UsageError: something is there that may not be replaced.
        ExportError: the folder is missing or can't be written to.
    """
    if is_path(source) and os.path.realpath(source) == os.path.realpath(path):
        raise UsageError(
            "the result would replace the model that it is made of",
            where=os.fspath(path),
            hint="Choose another path.",
        )
    check_target(path, options.overwrite, folder=options.format == "savedmodel")
    for companion in _companions(path, options.format):
        check_target(companion, options.overwrite)
    if options.keep_failed:
        _check_failed(path, options.overwrite)


def is_path(value: Any) -> bool:
    """Whether a model was given by its path."""
    return isinstance(value, str | os.PathLike)


def place(files: Sequence[Path], path: StrPath, options: ExportOptions) -> None:
    """Moves staged files to where they belong, all or none, the artifact last.

    Companions of an artifact that is replaced go where it has none of its own.

    Args:
        files: the artifact first, under the names that they are to have.
        path: where the artifact goes; of a symbolic link, all go where it leads.
        options: with the format resolved.

    Raises:
        UsageError, ExportError: as `check`; something may have appeared meanwhile.
        OSError: the file system refuses.
    """
    target = followed(path)
    artifact, *others = files
    moves = [(file, target.with_name(file.name)) for file in (*others, artifact)]
    for file, there in moves:
        check_target(there, options.overwrite, folder=file.is_dir())
    publish(moves)
    for stale in set(_companions(path, options.format)) - {there for _, there in moves}:
        stale.unlink(missing_ok=True)


def keep(files: Sequence[Path], path: StrPath) -> Path:
    """Puts what failed into the folder `NAME.failed`, complete, so that `verify` runs on it there.

    Args:
        files: the staged artifact first.
        path: where it would have gone.

    Returns:
        The artifact's path.
    """
    folder = _failed_folder(path)
    folder.mkdir(exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    artifact, *others = files
    publish([(file, folder / file.name) for file in (*others, artifact)])
    return folder / artifact.name


def _companions(path: StrPath, kind: Format | None) -> tuple[Path, ...]:
    """What may lie beside an artifact and belong to it."""
    if kind == "onnx":
        return (data_path(path), reference_path(path))
    return (reference_path(path),) if kind == "savedmodel" else ()


def _failed_folder(path: StrPath) -> Path:
    target = followed(path)
    return target.with_name(f"{target.name}.failed")


def _check_failed(path: StrPath, overwrite: bool) -> None:
    """Whether a file that fails could be kept: over nothing, or over an earlier one's folder."""
    folder = _failed_folder(path)
    known = {file.name for file in (followed(path), *_companions(path, "onnx"))}
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or any(file.name not in known for file in folder.iterdir()):
        raise UsageError(
            "is in the way of what --keep-failed may keep",
            where=str(folder),
            hint="Move it, or choose another path.",
        )
    if not overwrite:
        raise UsageError(
            "exists already, from an earlier failure",
            where=str(folder),
            hint="Remove it, or replace it: --force on the command line, overwrite=True in Python.",
        )
