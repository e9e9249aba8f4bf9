"""What two Keras files differ in: layers by path, what they are set to, weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from layerswap.difference_text import describe_groupnorm
from layerswap.errors import reading
from layerswap.keras_files import is_hdf5, read_config
from layerswap.keras_layers import Layer, canonical_paths, read_layers, rename, text
from layerswap.keras_weights import Weight, norms, open_weights
from layerswap.records import Difference
from layerswap.stock_names import BATCHNORM

# What both layers have; the rest says how either of them works.
_SHARED = frozenset(("trainable", "dtype", "center", "scale")) | {
    f"{variable}_{kind}" for variable in ("beta", "gamma") for kind in ("regularizer", "constraint")
}
_PROBLEM = "can't be read as a Keras model"
_HINT = "It is damaged or no Keras model: copy or save it again."
_INTERFACE = frozenset(("batch_input_shape", "input_layers", "output_layers"))


def keras_differences(first: Path, second: Path) -> list[Difference]:
    """Compares two `.keras`, `.h5` or `.hdf5` files, without loading a model.

    Layers are compared by path; where the names are those that Keras makes up, by their number
    among the layers of their class. The state of the optimizer is left out.

    Raises:
        LoadError: one of them can't be read as a model.
    """
    configs = [_reading(path, read_config, path) for path in (first, second)]
    models = [_reading(p, read_layers, c) for p, c in zip((first, second), configs, strict=True)]
    with ExitStack() as stack:
        # Before layers get other paths: the files know the old ones.
        weights = [
            _reading(path, stack.enter_context, open_weights(path, model))
            for path, model in zip((first, second), models, strict=True)
        ]
        _align(models, weights)
        found = list(_layers(*models))
        same_format = is_hdf5(first) == is_hdf5(second)
        comparer = _Weights(weights[0], weights[1], same_format)
        with reading(f"{first} or {second}", _PROBLEM, _HINT):
            found = [comparer.swapped(d) if d.code == "LS901" else d for d in found]
            found += comparer.differences(*models)
    trained = [config.get("compile_config") for config in configs]
    if all(trained) and trained[0] != trained[1]:
        for key in _changed_keys(*trained):
            before, after = (text(config.get(key)) for config in trained)
            found.append(Difference("LS909", f"compile_config/{key}", "is trained", before, after))
    return found


def _reading(path: Path, read: Any, *arguments: Any) -> Any:
    with reading(os.fspath(path), _PROBLEM, _HINT):
        return read(*arguments)


def _align(models: list[Layer], weights: list[dict[str, list[Weight]]]) -> None:
    """Gives both models the names counted from the start, if more layers meet so."""
    names = [canonical_paths(model) for model in models]
    as_is = [{(x.path, x.class_name) for x in model.all()} for model in models]
    counted = [
        {(own[x.path], x.class_name) for x in model.all()}
        for model, own in zip(models, names, strict=True)
    ]
    if len(counted[0] & counted[1]) <= len(as_is[0] & as_is[1]):
        return
    if any(len(set(own.values())) < len(own) for own in names):
        return  # somebody gave a layer of another class such a name
    for index, own in enumerate(names):
        rename(models[index], own)
        weights[index] = {own[path]: values for path, values in weights[index].items()}


# --- layers -------------------------------------------------------------------------------


def _layers(first: Layer, second: Layer) -> Iterator[Difference]:
    before = {layer.path: layer for layer in first.all()}
    after = {layer.path: layer for layer in second.all()}
    holders = [{c.path: x.path for x in m.all() for c in x.children} for m in (first, second)]
    for path in dict.fromkeys((*before, *after)):
        if path not in after:
            if holders[0].get(path) in after:  # else that the holder is gone says it all
                yield Difference("LS903", path, f"{before[path].class_name} is removed")
        elif path not in before:
            if holders[1].get(path) in before:
                yield Difference("LS902", path, f"{after[path].class_name} is added")
        else:
            yield from _layer(before[path], after[path])


def _layer(one: Layer, other: Layer) -> Iterator[Difference]:
    where = one.path or "(the model)"
    keys = list(_changed_keys(one.settings, other.settings))
    if one.class_name in BATCHNORM and other.class_name == "GroupNormalization":
        groups, epsilon = (other.settings.get(key) for key in ("groups", "epsilon"))
        groupnorm = describe_groupnorm(groups, epsilon)
        yield Difference("LS901", where, f"{one.class_name} → {groupnorm}")
        keys = [key for key in keys if key in _SHARED]
    elif one.class_name != other.class_name:
        yield Difference("LS904", where, "class", one.class_name, other.class_name)
    for key in keys:
        code = "LS905" if key in _INTERFACE else "LS904"
        settings = (one.settings, other.settings)
        before, after = (text(own[key]) if key in own else None for own in settings)
        yield Difference(code, where, key, before, after)
    if one.inputs != other.inputs:
        before, after = (_fed_by(layer) for layer in (one, other))
        yield Difference("LS904", where, "fed by", before, after)
    yield from _order(one, other, where)


def _fed_by(layer: Layer) -> str | None:
    return "; ".join(", ".join(map(str, call)) for call in layer.inputs) or None


def _order(one: Layer, other: Layer, where: str) -> Iterator[Difference]:
    """The order of a Sequential is what it computes; that of a graph means nothing."""
    if one.class_name != "Sequential" or other.class_name != "Sequential":
        return
    names = [[child.name for child in layer.children] for layer in (one, other)]
    common = set(names[0]) & set(names[1])
    before, after = ([name for name in own if name in common] for own in names)
    if before != after:
        yield Difference("LS904", where, "order", ", ".join(before), ", ".join(after))


def _changed_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*one, *other)):
        # What an older Keras didn't have yet, a newer one says is off.
        before, after = (
            own.get(key) or None if key not in (one.keys() & other.keys()) else own[key]
            for own in (one, other)
        )
        if before != after:
            yield key


# --- weights ------------------------------------------------------------------------------


class _Weights:
    """Compares the weights of layers that are in both files."""

    def __init__(
        self,
        first: Mapping[str, Sequence[Weight]],
        second: Mapping[str, Sequence[Weight]],
        same_format: bool,
    ) -> None:
        self._first, self._second = first, second
        self._same_format = same_format
        self._told: set[str] = set()

    def swapped(self, difference: Difference) -> Difference:
        """The same with the norms of γ and β taken as one, where both files have them."""
        path = difference.where
        self._told.add(path)
        before = {weight.name: weight for weight in self._first.get(path, ())}
        after = {weight.name: weight for weight in self._second.get(path, ())}
        pairs = [
            (before[name], after[name])
            for name in ("gamma", "beta")
            if name in before and name in after and before[name].comparable(after[name])
        ]
        own = norms(pairs)
        return Difference(difference.code, path, difference.message, norms=own)

    def differences(self, first: Layer, second: Layer) -> Iterator[Difference]:
        """Weights of the layers that both have under one path and class."""
        classes = {layer.path: layer.class_name for layer in second.all()}
        open_: list[str] = []
        for layer in first.all():
            path = layer.path
            if path in self._told or classes.get(path) != layer.class_name:
                continue
            before, after = (list(x.get(path, ())) for x in (self._first, self._second))
            pairs = self._pairs(before, after)
            if pairs is None:
                open_.append(path or "(the model)")
                continue
            for one, other in pairs:
                yield from _weight(path, one, other)
        if open_:
            yield Difference(
                "LS910",
                open_[0],
                f"the weights of {len(open_)} layers aren't compared: the two formats keep them "
                f"under other names and in another order ({', '.join(open_)})",
            )

    def _pairs(
        self, before: list[Weight], after: list[Weight]
    ) -> list[tuple[Weight | None, Weight | None]] | None:
        """Which weight is which; None where two formats leave it open."""
        one, other = ({weight.name: weight for weight in own} for own in (before, after))
        if one.keys() != other.keys() and _in_order(before) == _in_order(after):
            return list(zip(before, after, strict=True))  # the names in front are counted ones
        if self._same_format or one.keys() == other.keys():
            return [(one.get(name), other.get(name)) for name in dict.fromkeys((*one, *other))]
        numbered = any(all(w.name.isdecimal() for w in own) for own in (before, after))
        named = any(all("/" not in w.name for w in own) for own in (before, after))
        if numbered and named and [w.shape for w in before] == [w.shape for w in after]:
            return list(zip(before, after, strict=True))  # both in the order of creation
        return None


def _in_order(weights: list[Weight]) -> list[tuple[str, str]]:
    """The last part of each name, type and shape."""
    return [(weight.name.rpartition("/")[2], str(weight)) for weight in weights]


def _weight(path: str, one: Weight | None, other: Weight | None) -> Iterator[Difference]:
    known = one or other
    assert known is not None
    # A name says more than a number.
    named = other if other is not None and known.name.isdecimal() else known
    name = f"weight {named.name}" if named.name.isdecimal() else named.name
    where = f"{path}/{name}" if path else name
    if one is None or other is None:
        before, after = (None if x is None else str(x) for x in (one, other))
        yield Difference("LS906", where, "weight", before, after)
    elif not one.comparable(other):
        yield Difference("LS906", where, "type or shape", str(one), str(other))
    elif own := norms([(one, other)]):
        yield Difference("LS906", where, "values differ", norms=own)
