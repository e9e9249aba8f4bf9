"""Writes files and folders so that a failure leaves nothing behind and harms nothing.

The new content goes under a hidden temporary name beside the target and takes the target's
place in one rename, once it is complete. Whatever happens before (an exception, a full disk,
Ctrl-C), the temporary is removed and the old content is intact.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layerswap.errors import ExportError, LayerswapError, UsageError

StrPath = str | os.PathLike[str]


@contextmanager
def replacing(path: StrPath, overwrite: bool = False, *, folder: bool = False) -> Iterator[Path]:
    """Yields a temporary path; what the block writes there becomes `path` when it ends.

    The temporary lies in the target's folder, is hidden and keeps the target's suffix. A
    symbolic link is followed: its target is replaced, not the link. Not for a name with more
    than one writer at a time.

    Args:
        path: the file, or with `folder` the SavedModel folder, to write.
        overwrite: whether an existing target may be replaced.
        folder: whether the block creates a folder instead of a file.

    Raises:
        UsageError: as `check_target` says.
        ExportError: the folder is missing or the file system refuses (any `OSError`).
    """
    target = check_target(path, overwrite, folder=folder)
    temporary = _beside(target)
    try:
        yield temporary
        check_target(target, overwrite, folder=folder)  # may have appeared meanwhile
        if folder:
            _replace_folder(temporary, target)
        else:
            _replace_file(temporary, target)
    except OSError as error:
        raise ExportError(
            f"can't be written: {error.strerror or error}",
            where=os.fspath(path),
            hint="Nothing was changed. Free some space or choose another place.",
        ) from error
    finally:
        _remove(temporary)


def followed(path: StrPath) -> Path:
    """The path, or where it leads if it is a symbolic link: that is replaced, not the link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def check_target(path: StrPath, overwrite: bool = False, *, folder: bool = False) -> Path:
    """Whether `replacing` could write there: the check to make before long work.

    Args:
        path: where the artifact is to be.
        overwrite: whether an existing one may be replaced.
        folder: whether the artifact is a SavedModel folder instead of a file.

    Returns:
        The real path, symbolic links followed.

    Raises:
        UsageError: the target exists and `overwrite` is false, or it's something that is never
            replaced: a folder where a file is to be, a folder that is no SavedModel, a file
            where a folder is to be, a device.
        ExportError: the parent folder is missing or can't be written to.
    """
    where = os.fspath(path)
    target = Path(os.path.realpath(path))
    try:
        _check_existing(target, where, overwrite, folder)
    except OSError as error:  # a name too long, a parent that may not be searched
        raise ExportError(f"can't be written: {error.strerror or error}", where=where) from error
    if not target.parent.is_dir():
        raise ExportError(
            f"the folder '{target.parent}' does not exist",
            where=where,
            hint="Create it first, or choose another place.",
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ExportError(
            f"the folder '{target.parent}' can't be written to",
            where=where,
            hint="Change its permissions, or choose another place.",
        )
    return target


def _check_existing(target: Path, where: str, overwrite: bool, folder: bool) -> None:
    problem = ""
    if target.is_dir():
        if not folder:
            problem = "is a folder, and a file can't replace it"
        elif not is_saved_model(target):
            problem = "is a folder but no SavedModel, and is never replaced"
    elif folder and target.is_file():
        problem = "is a file, and a SavedModel folder can't replace it"
    elif os.path.lexists(target) and not target.is_file():
        problem = "is not a regular file"
    if problem:
        raise UsageError(problem, where=where, hint="Choose another path.")
    if target.exists() and not overwrite:
        raise UsageError(
            "exists already",
            where=where,
            hint="To replace it: --force on the command line, overwrite=True in Python.",
        )


def is_saved_model(folder: Path) -> bool:
    """Whether the folder looks like a TensorFlow SavedModel."""
    return any((folder / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt"))


def _beside(target: Path) -> Path:
    return target.with_name(f".layerswap-{uuid.uuid4().hex[:12]}{target.suffix}")


def _replace_file(temporary: Path, target: Path) -> None:
    _flush(temporary)
    if target.exists():
        shutil.copymode(target, temporary)
    os.replace(temporary, target)


def _flush(file: Path) -> None:
    # Some file systems report a full disk only here; after the rename it would be too late.
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _replace_folder(temporary: Path, target: Path) -> None:
    # No system renames a folder over a full one, so the old one steps aside for a moment.
    old = _beside(target)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def staging(path: StrPath) -> Iterator[Path]:
    """Yields a hidden folder beside `path`, for an artifact of several files that name each other.

    The files are written there under their final names, judged, and moved with `publish`; what
    is left in the folder when the block ends is removed.

    Args:
        path: the main file of the artifact.

    Raises:
        ExportError: the file system refuses (any `OSError`).
    """
    folder = _beside(Path(os.path.realpath(path)).with_suffix(""))
    try:
        folder.mkdir()
        yield folder
    except LayerswapError as error:  # nobody knows the hidden name
        if error.where and Path(error.where).is_relative_to(folder):
            error.where = os.fspath(path)
        error.message = error.message.replace(f"{folder}{os.sep}", "")
        raise
    except OSError as error:
        raise ExportError(
            f"can't be written: {error.strerror or error}",
            where=os.fspath(path),
            hint="Nothing was changed. Free some space or choose another place.",
        ) from error
    finally:
        _remove(folder)


def publish(files: Sequence[tuple[Path, StrPath]]) -> None:
    """Moves staged files and folders into place, all or none, replacing what is there.

    Args:
        files: the staged file or folder and its place, the main one last: whoever sees
            it there finds what belongs to it already in place.

    Raises:
        OSError: the file system refuses; `staging` turns it into an ExportError.
    """
    moves = [(staged, Path(os.path.realpath(target))) for staged, target in files]
    for staged, _ in moves:
        for file in staged.rglob("*") if staged.is_dir() else (staged,):
            if file.is_file():
                _flush(file)
    try:
        for staged, target in moves:
            if target.exists():
                shutil.copymode(target, staged)
                os.replace(target, _aside(staged))
            os.replace(staged, target)
    except BaseException:
        for staged, target in moves:
            if _aside(staged).exists():
                if target.is_dir():  # no system renames a folder over a full one
                    _remove(target)
                os.replace(_aside(staged), target)
            elif not staged.exists():
                _remove(target)
        raise


def _aside(staged: Path) -> Path:
    """Where what a staged file replaces waits, should it have to come back."""
    return staged.with_name(f"{staged.name}.old")
