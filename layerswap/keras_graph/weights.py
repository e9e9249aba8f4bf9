"""Accounts for every variable of a converted model, and proves the copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from layerswap.errors import TransferError
from layerswap.keras_graph.copying import Twins
from layerswap.keras_graph.walk import find_layers, variables
from layerswap.records import Array, Swap, SwapPlan, TransferLog


def view(tensor: Any) -> Array:
    """The values of an eager tensor, without the copy that its `numpy` makes.

    They stay as they are whatever becomes of the variable that the tensor was read from.
    """
    if tensor.dtype == tf.bfloat16:  # which NumPy's buffers don't know
        return np.asarray(tensor.numpy())
    values: Array = np.asarray(memoryview(tensor))
    return values


def snapshot(model: Any) -> list[tuple[Any, Any]]:
    """Every variable of a model with its bits, to prove later that they were carried.

    They are views: a variable that changes gets new memory.
    """
    return [(variable, view(tf.convert_to_tensor(variable))) for variable in variables(model)]


@contextmanager
def preserved(model: Any, but: Iterable[Any] = ()) -> Iterator[None]:
    """Puts back, when the block ends, what calls of the model changed in its state.

    Counters, running metrics, states: whatever code assigns to variables while it computes.

    Args:
        model: any model.
        but: variables that the block is meant to change.
    """
    meant = {id(variable) for variable in but}
    metrics = [v for metric in getattr(model, "metrics", ()) for v in metric.variables]
    before = [
        *((v, bits) for v, bits in snapshot(model) if id(v) not in meant),
        *((v, v.numpy()) for v in metrics),
    ]
    try:
        yield
    finally:
        for variable, bits in before:
            if not _same_bits(np.asarray(variable), bits):
                variable.assign(bits)


def surviving(before: list[tuple[Any, Any]], target: Any, twins: Twins) -> list[tuple[Any, Any]]:
    """(variable of the source, the target's that stands for it), for those still in use."""
    live = {id(variable) for variable in variables(target)}
    pairs = ((variable, twins.of(variable)) for variable, _ in before)
    return [(theirs, mine) for theirs, mine in pairs if id(mine) in live]


def account(
    before: list[tuple[Any, Any]], target: Any, twins: Twins, plan: SwapPlan
) -> TransferLog:
    """Partitions the target's variables into copied, fitted and fresh ones.

    Args:
        before: `snapshot` of the source.
        target: the converted model.
        twins: which variable of the target stands for which of the source.
        plan: the plan that was applied.

    Raises:
        TransferError: a variable is unaccounted for, or a copied one differs in its bits.
    """
    swaps = {swap.site.path: swap for swap in plan.swaps}
    source = {id(twins.of(variable)): values for variable, values in before}
    kinds: dict[str, list[str]] = {"copied": [], "fitted": [], "fresh": []}
    for path, owner, variable in named_variables(target):
        swap = swaps.get(owner)
        if swap is not None:
            kinds[_kind(swap, path)].append(path)
        elif id(variable) not in source:
            raise TransferError("the variable has no counterpart in the source", where=path)
        elif not _same_bits(np.asarray(variable), source[id(variable)]):
            raise TransferError("the variable differs from the source's", where=path)
        else:
            kinds["copied"].append(path)
    return TransferLog(**{kind: tuple(paths) for kind, paths in kinds.items()})


def _same_bits(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == object:  # strings
        return bool(a.tolist() == b.tolist())
    # As bytes: NaN equals itself, -0.0 isn't 0.0; quicker than two strings of bytes.
    return np.array_equal(_bytes(a), _bytes(b))


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _kind(swap: Swap, path: str) -> str:
    if swap.weights == "reset":
        return "fresh"
    switch = "scale" if path.endswith("gamma") else "center"
    had = swap.site.config.get(switch, True)
    return "copied" if swap.weights == "copy" and had else "fitted"


def named_variables(model: Any) -> list[tuple[str, str, Any]]:
    """(unique path, path of the owning layer, variable) for all of a model's weights."""
    owners: dict[int, str] = {}
    for found in find_layers(model):
        layer = found.layer
        for variable in (*layer._trainable_weights, *layer._non_trainable_weights):
            owners.setdefault(id(variable), found.path)
    named, taken = [], set()
    for variable in variables(model):
        owner = owners.get(id(variable), "")
        short = variable.name.rpartition("/")[2].removesuffix(":0")
        path = unique = f"{owner}/{short}" if owner else variable.name.removesuffix(":0")
        number = 1
        while unique in taken:
            number += 1
            unique = f"{path}#{number}"
        taken.add(unique)
        named.append((unique, owner, variable))
    return named
