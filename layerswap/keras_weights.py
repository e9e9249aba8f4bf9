"""Reads the weights of `.keras` and `.h5` files without TensorFlow, one array at a time."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from layerswap.errors import LoadError
from layerswap.records import Array

_WEIGHTS = "model.weights.h5"
# What an optimizer keeps is no weight of the model.
_OPTIMIZER = re.compile(r"(optimizer|optimizer_weights)(/|$)")


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """The HDF5 file with a Keras file's weights, as h5py gives it.

    Raises:
        LoadError: there is none, or it is damaged.
    """
    import h5py

    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                yield file
        else:
            # Stored, not packed, so that it can be read in place and no bomb hides in it.
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo(_WEIGHTS).compress_type != zipfile.ZIP_STORED:
                    raise LoadError(f"its {_WEIGHTS} is packed", where=str(path))
                with archive.open(_WEIGHTS) as stream, h5py.File(stream, "r") as file:
                    yield file
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LoadError(
            f"its weights can't be read: {type(error).__name__}",
            where=str(path),
            hint="It is damaged: copy or save it again.",
        ) from error


def names_of(file: Any) -> list[str]:
    """The paths of all weights, in order; those of the optimizer are left out."""
    import h5py

    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not _OPTIMIZER.match(name):
            found.append(name)

    file.visititems(visit)
    return found


def read_weight(file: Any, name: str) -> Array | None:
    """A weight's values; None where they lie outside the file or aren't numbers."""
    dataset = file[name]
    if dataset.external or dataset.is_virtual or dataset.dtype.kind not in "fiub":
        return None  # bfloat16, for one, is a type of HDF5's own
    values: Array = np.asarray(dataset[()])
    return values


def is_gamma(name: str, siblings: int) -> bool:
    """Whether a weight is the γ of a normalization layer.

    Args:
        name: its path in the file.
        siblings: how many weights the layer has. `.keras` files number weights: γ is the first of
            two (γ, β) or of four (γ, β, mean, variance).
    """
    if re.search(r"(^|/)gamma(:0)?$", name):
        return True
    numbered = re.search(r"(^|/)(batch|group|layer|sync_batch)_normalization(_\d+)?/vars/0$", name)
    return numbered is not None and siblings in (2, 4)


def is_kernel(name: str, rank: int) -> bool:
    """Whether a weight is a kernel or table: those of `.keras` files come first in their layer."""
    named = re.search(r"(kernel|embeddings)(:0)?$", name)
    numbered = re.search(r"/vars/0$", name) and not re.search(r"_normalization(_\d+)?/vars", name)
    return rank > 1 and bool(named or numbered)
