"""Unlabelled samples of a model's inputs: read, checked, and divided into a fit and a test.

NumPy only; what needs TensorFlow to be read (datasets, images) comes as an iterable of elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerswap.errors import LayerswapError, LoadError, UsageError, reason_of
from layerswap.records import Array, Finding

Arrays = Mapping[str, Array]

# With fewer the held-out quarter says nothing.
FEWEST = 8
ADVISED = 64
MOST = 256
BATCH = 32
# The order is shuffled: a set sorted by class would hold out classes instead of samples.
SEED = 0


@dataclass(frozen=True, slots=True)
class Input:
    """An input that the model takes: its name, its shape, the batch first, and its dtype.

    None stands for an open axis.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Batches of inputs by name.

    Attributes:
        fit: to fit with.
        held_out: to judge by: the last quarter of the shuffled samples.
        findings: what there is to say about them.
    """

    fit: tuple[Arrays, ...]
    held_out: tuple[Arrays, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def counts(self) -> tuple[int, int]:
        """How many samples there are of each."""
        return _count(self.fit), _count(self.held_out)


def read_arrays(path: Path) -> Array | dict[str, Array]:
    """What a `.npy` or `.npz` file holds; a `.npz` by name.

    Raises:
        LoadError: it can't be read as numbers.
    """
    try:
        if path.suffix == ".npy":
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # whatever NumPy raises for a damaged file
        raise LoadError(
            f"can't be read as samples: {reason_of(error)}",
            where=str(path),
            hint="Write it with numpy.save or numpy.savez, without objects.",
        ) from error


def from_arrays(source: Any, inputs: Sequence[Input], limit: int = MOST) -> Samples:
    """Samples from whole arrays: one, a list in the order of the inputs, or a dict by name.

    Of more than `limit`, evenly spaced ones are taken.

    Raises:
        UsageError, LoadError: they don't fit the inputs; see `from_elements`.
    """
    arrays = _by_name(source, inputs)
    count = _size(arrays)
    if count > limit:
        chosen = spaced(count, limit)
        arrays = {name: array[chosen] for name, array in arrays.items()}
    return _divide([_checked(arrays, inputs, 0)] if count else [], inputs)


def spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spaced: sets are often sorted by class."""
    if count <= limit:
        return list(range(count))
    return [int(index) for index in np.linspace(0, count - 1, limit)]


def from_elements(elements: Iterable[Any], inputs: Sequence[Input], limit: int = MOST) -> Samples:
    """Samples from an iterable of single samples or batches, up to `limit` of them.

    An element is an array, a list in the order of the inputs, a dict by name, or, as in Keras, a
    tuple that begins with one of these; labels behind it are ignored.

    Raises:
        UsageError: shapes or dtypes don't fit the inputs.
        LoadError: values are NaN or infinite, there are fewer than 8 samples, or the iterable
            raises.
    """
    chunks: list[Arrays] = []
    count = 0
    for element in _guarded(elements, chunks):
        arrays = _batch_of(element, inputs)
        room = limit - count
        room -= room % (_batch_size(inputs) or 1)  # a batch of fixed size stays whole
        if _size(arrays) and not room:
            break
        arrays = {name: array[:room] for name, array in arrays.items()}
        if _size(arrays):
            chunks.append(_checked(arrays, inputs, count))
        count = _count(chunks)
        if count >= limit:
            break
    return _divide(chunks, inputs)


def from_indexed(source: Any, inputs: Sequence[Input], limit: int = MOST) -> Samples:
    """Samples from what has a length and gives single samples or batches by index.

    Raises:
        UsageError, LoadError: as `from_elements` says.
    """
    first = next(_guarded((source[i] for i in range(min(len(source), 1))), []), None)
    size = 1 if first is None else max(_size(_batch_of(first, inputs)), 1)
    chosen = spaced(len(source), -(-limit // size))
    return from_elements((source[i] for i in chosen), inputs, limit)


def _batch_of(element: Any, inputs: Sequence[Input]) -> dict[str, Array]:
    """The arrays of an element by input; a single sample becomes a batch of one."""
    arrays = _by_name(without_labels(element), inputs)
    ranks = {entry.name: len(entry.shape) for entry in inputs}
    if all(array.ndim == ranks[name] - 1 for name, array in arrays.items()):
        arrays = {name: array[None] for name, array in arrays.items()}
    return arrays


def without_labels(element: Any) -> Any:
    """Of a tuple the first: as in Keras, labels and weights follow.

    Raises:
        UsageError: it is empty.
    """
    if not isinstance(element, tuple):
        return element
    if not element:
        raise UsageError("samples that are an empty tuple", hint="Give the inputs in it.")
    return element[0]


def _guarded(elements: Iterable[Any], chunks: Sequence[Arrays]) -> Iterator[Any]:
    """The elements; what the user's code raises becomes one message."""
    try:
        yield from elements
    except LayerswapError:
        raise
    except Exception as error:
        raise LoadError(
            f"the samples ended with {type(error).__name__} after {_count(chunks)}: "
            f"{reason_of(error)}",
            hint="Repair what yields them.",
        ) from error


def _batch_size(inputs: Sequence[Input]) -> int | None:
    """The batch size that an input is fixed to."""
    return next((entry.shape[0] for entry in inputs if entry.shape and entry.shape[0]), None)


def _size(arrays: Arrays) -> int:
    """How many samples there are, the same for all inputs."""
    sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise UsageError(f"the inputs have different numbers of samples: {listed}")
    return next(iter(sizes.values()))


def _array(value: Any) -> Array:
    if np.ma.is_masked(value):
        raise UsageError("samples with masked values", hint="Fill them, or leave them out.")
    try:
        array = np.asarray(value)
    except Exception as error:  # NumPy raises several kinds for what has no shape
        raise UsageError(
            f"samples that make no array: {reason_of(error)}",
            hint="Samples of different shapes come one by one, from a generator or dataset.",
        ) from error
    if array.dtype == object and not array.ndim:
        raise UsageError(
            f"samples that make no array of numbers: a {type(value).__name__}",
            hint="Give arrays, lists or dicts of arrays.",
        )
    return array


def _by_name(source: Any, inputs: Sequence[Input]) -> dict[str, Array]:
    names = [entry.name for entry in inputs]
    if isinstance(source, Mapping):
        if len(names) == 1 and len(source) == 1:
            return {names[0]: _array(next(iter(source.values())))}
        missing = [name for name in names if name not in source]
        if missing:
            raise UsageError(
                f"the samples lack the input {', '.join(missing)}; they hold "
                + (", ".join(map(str, source)) or "nothing"),
                hint=f"The model's inputs are {', '.join(names)}.",
            )
        return {name: _array(source[name]) for name in names}
    if len(names) == 1:
        single = isinstance(source, list) and len(source) == 1
        return {names[0]: _array(source[0] if single else source)}
    if not isinstance(source, list | tuple) or len(source) != len(names):
        raise UsageError(
            f"the model has {len(names)} inputs, so samples are a dict by name or a list of "
            f"{len(names)} arrays",
            hint=f"The inputs are {', '.join(names)}.",
        )
    return {name: _array(item) for name, item in zip(names, source, strict=True)}


def _checked(arrays: Arrays, inputs: Sequence[Input], before: int) -> Arrays:
    """The arrays in the dtypes that the inputs have, once it is sure that they fit."""
    checked = {}
    for entry in inputs:
        array = arrays[entry.name]
        fits = array.ndim == len(entry.shape) and all(
            wanted in (None, size)
            for size, wanted in zip(array.shape[1:], entry.shape[1:], strict=True)
        )
        if not fits:
            raise UsageError(
                f"samples of shape {_text(array.shape[1:])}, but input '{entry.name}' takes "
                f"{_text(entry.shape[1:])}",
                hint="The first axis counts the samples; resize or reshape them before.",
            )
        checked[entry.name] = _cast(array, entry, before)
    return checked


def _cast(array: Array, entry: Input, before: int) -> Array:
    if entry.dtype == "string":
        if array.dtype.kind in "OS":
            texts = [t.decode() if isinstance(t, bytes) else str(t) for t in array.flat]
            return np.array(texts, np.str_).reshape(array.shape)
        return array.astype(np.str_)
    kind = array.dtype.kind
    if kind not in "biuf":
        raise UsageError(
            f"samples of dtype {array.dtype}, but input '{entry.name}' takes {entry.dtype}",
            hint="Give numbers.",
        )
    if kind == "f":
        bad = ~np.isfinite(array)
        if bad.any():
            first = before + int(np.argwhere(bad)[0][0])
            raise LoadError(
                f"{int(bad.sum())} values of the samples for input '{entry.name}' are NaN or Inf, "
                f"the first in sample {first}",
                hint="Leave such samples out.",
            )
    dtype = np.dtype("float32" if entry.dtype == "bfloat16" else entry.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    whole = dtype.kind in "biu"
    if (whole and not np.array_equal(cast, array)) or not (whole or np.isfinite(cast).all()):
        what = "fractions" if whole and kind == "f" else "values out of range"
        raise UsageError(
            f"samples with {what}, but input '{entry.name}' takes {entry.dtype}",
            hint="Give whole numbers in its range." if whole else "Scale them.",
        )
    return cast


def _divide(chunks: Sequence[Arrays], inputs: Sequence[Input]) -> Samples:
    count = _count(chunks)
    if count < FEWEST:
        raise LoadError(
            f"too few samples: {count}; at least {FEWEST} are needed, {ADVISED} or more advised"
        )
    findings: tuple[Finding, ...] = ()
    if count < ADVISED:
        findings = (
            Finding(
                "few-samples",
                "warning",
                "",
                f"{count} samples leave much to chance",
                f"Give {ADVISED} or more.",
            ),
        )
    rng = np.random.default_rng(SEED)
    fixed = _batch_size(inputs)
    shapes = {tuple(array.shape[1:] for array in chunk.values()) for chunk in chunks}
    if len(shapes) > 1:  # open axes that differ: what came together stays together
        order = [chunks[i] for i in rng.permutation(len(chunks))]
        border = len(order) - max(1, len(order) // 4)
        if border < 1 or (fixed and any(_count([chunk]) != fixed for chunk in chunks)):
            raise UsageError("samples of different shapes must come in batches of the model's size")
        return Samples(tuple(order[:border]), tuple(order[border:]), findings)
    whole = {e.name: np.concatenate([chunk[e.name] for chunk in chunks]) for e in inputs}
    permutation = rng.permutation(count)
    border = count - count // 4
    parts = []
    for chosen in (permutation[:border], permutation[border:]):
        batches = [chosen[i : i + (fixed or BATCH)] for i in range(0, len(chosen), fixed or BATCH)]
        full = [batch for batch in batches if fixed in (None, len(batch))]
        if not full:
            raise LoadError(
                f"too few samples: {count}; the model takes batches of {fixed}, and a quarter of "
                "the samples must fill one"
            )
        parts.append(tuple({n: array[batch] for n, array in whole.items()} for batch in full))
    return Samples(parts[0], parts[1], findings)


def _count(batches: Iterable[Arrays]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def _text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
