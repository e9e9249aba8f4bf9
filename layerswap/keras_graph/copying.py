"""Copies a built tf_keras model object by object, so that nothing is rebuilt or renamed.

Keras's own copies go through the configuration and lose what isn't in it: trainable flags, tied
weights, preprocessing state, non-default initializers. Here every layer, node, symbolic tensor
and variable is copied as the object it is, once, so that sharing survives by construction. Two
things need help: Keras keys its graph by the `id` of symbolic tensors, and a compiled model
holds traced functions, which belong to the original (`compiling` makes new ones).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
from tf_keras.metrics import Metric
from tf_keras.models import Model
from tf_keras.src.engine.functional import Functional
from tf_keras.src.engine.node import Node
from tf_keras.src.mixed_precision.autocast_variable import (
    AutoCastVariable,
    create_autocast_variable,
)

from layerswap.errors import UnsupportedModelError
from layerswap.keras_graph import compiling
from layerswap.keras_graph.graph_functions import fresh_function, own_functions
from layerswap.keras_graph.walk import captured_by_functions, find_layers

# What the loader of a SavedModel leaves behind: traces of the original.
_OF_A_SAVED_MODEL = ("signatures", "_serialized_attributes")


class Twins:
    """Which object of the copy stands for which of the original."""

    def __init__(self, by_id: dict[int, Any] | None = None) -> None:
        self._by_id = by_id

    def of(self, original: Any) -> Any:
        """The copy of a layer or variable; the object itself where nothing was copied."""
        return original if self._by_id is None else self._by_id.get(id(original), original)


def models_in(model: Any) -> list[Any]:
    """The model and every model inside it."""
    inner = (found.layer for found in find_layers(model))
    return [model, *(layer for layer in inner if isinstance(layer, Model))]


def copy_model(model: Any) -> tuple[Any, Twins]:
    """A copy that shares no variable with `model` and computes the same.

    The copy still refers to the original's compile state: apply a `compiling.Recipe` to it.

    Args:
        model: any tf_keras model; it is left as it is.

    Returns:
        The copy, and which of its objects stands for which of the original's.

    Raises:
        UnsupportedModelError: the model holds something that can't be copied.
    """
    _refuse_distributed(model)
    memo: dict[int, Any] = {}
    originals = _connected_layers(model)
    _refuse_captured(model, originals)
    strategy = tf.distribute.get_strategy()
    shared = [strategy, strategy.extended]
    for layer in originals:
        shared.append(vars(layer).get("_adapt_function"))
        if isinstance(layer, Model):
            shared += compiling.compile_state(layer)
    memo.update({id(value): value for value in shared})
    # Empty shells first: whatever refers to a layer finds its copy, so that neither Keras's own
    # `Model.__deepcopy__` (a save and a load) nor the depth of the graph comes into play.
    shells = [object.__new__(type(layer)) for layer in originals]
    memo.update({id(layer): shell for layer, shell in zip(originals, shells, strict=True)})
    for layer in originals:
        _copy_metrics(layer, memo)
        _copy_functions(layer, memo)
    for layer, shell in zip(originals, shells, strict=True):
        _copy_autocast_variables(layer, memo)
        shell.__setstate__(_copy_state(model, layer, memo))
    for shell in shells:
        if vars(shell).get("_adapt_function") is not None:
            shell._adapt_function = None  # the original's; made anew when adapting again
    _rekey(memo)
    return memo[id(model)], Twins(memo)


def _copy_state(model: Any, layer: Any, memo: dict[int, Any]) -> dict[str, Any]:
    # Symbolic losses are of one past call; Keras collects them anew in each.
    state = {**layer.__getstate__(), "_losses": []}
    for name in _OF_A_SAVED_MODEL:
        state.pop(name, None)
    copied = {}
    for name, value in state.items():
        try:
            copied[name] = copy.deepcopy(_without_compile_state(name, value, memo), memo)
        except Exception as error:  # whatever a user's object raises when it is copied
            reason = f"'{name}' of '{layer.name}': {type(error).__name__}: {error}"
            raise _uncopyable(model, reason) from error
    return copied


def _stays_behind(item: Any, memo: dict[int, Any]) -> bool:
    return memo.get(id(item), item) is item and compiling.is_compile_state(item)


def _without_compile_state(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """Keras's account of a model's attributes, less what earlier compilations left in it."""
    if name == "_obj_reference_counts_dict":
        kept = type(value)()
        for item, count in value.items():
            if not _stays_behind(item, memo):
                kept[item] = count
        return kept
    if name == "_self_unconditional_checkpoint_dependencies":
        return [item for item in value if not _stays_behind(item.ref, memo)]
    if name == "_self_unconditional_dependency_names":
        return {k: item for k, item in value.items() if not _stays_behind(item, memo)}
    return value


def _refuse_distributed(model: Any) -> None:
    if (
        model.distribute_strategy is not tf.distribute.get_strategy()
        or tf.distribute.has_strategy()
    ):
        raise UnsupportedModelError(
            f"the model lives in a {type(model.distribute_strategy).__name__}",
            where=str(model.name),
            hint="Save it, load it outside of the strategy's scope and swap it there.",
        )


def _refuse_captured(model: Any, originals: list[Any]) -> None:
    """Functions are copied by reference: what they captured would still be the original's."""
    for layer in originals:
        for path in captured_by_functions(layer):
            raise _uncopyable(model, f"'{path}' of '{layer.name}' is held by a function")


def _uncopyable(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model can't be copied: {reason}",
        where=str(model.name),
        hint="Swap in place with inplace=True (this changes the given model).",
    )


def _copy_autocast_variables(layer: Any, memo: dict[int, Any]) -> None:
    """Under a mixed policy a variable sits in a wrapper, which its own `__deepcopy__` drops."""
    for variable in (*layer._trainable_weights, *layer._non_trainable_weights):
        if isinstance(variable, AutoCastVariable) and id(variable) not in memo:
            inner = copy.deepcopy(variable._variable, memo)
            memo[id(variable)] = create_autocast_variable(inner)


def _copy_metrics(layer: Any, memo: dict[int, Any]) -> None:
    """A metric makes its copy of its configuration: its variables find theirs through the memo."""
    for value in list(vars(layer).values()):
        held = value if isinstance(value, list | tuple) else [value]
        for metric in held:
            if isinstance(metric, Metric) and id(metric) not in memo:
                twin = copy.deepcopy(metric, memo)
                memo.update({id(a): b for a, b in zip(metric.weights, twin.weights, strict=True)})


def _copy_functions(layer: Any, memo: dict[int, Any]) -> None:
    """A traced function can't be copied; the Python function in it can, to be traced anew."""
    for _, function in own_functions(layer):
        if id(function) not in memo:
            python_function = copy.deepcopy(function.python_function, memo)
            memo[id(function)] = fresh_function(function, python_function)


def _connected_layers(model: Any) -> list[Any]:
    """The model, every layer inside it and every one that its graph's nodes lead to."""
    layers: dict[int, Any] = {}
    queue = [model]
    while queue:
        layer = queue.pop()
        if layer is None or id(layer) in layers or isinstance(layer, Metric):
            continue
        layers[id(layer)] = layer
        queue += _neighbours(layer)
        if isinstance(layer, Model):
            queue += [found.layer for found in find_layers(layer)]
            queue += layer._flatten_layers(include_self=False)
    return list(layers.values())


def _neighbours(layer: Any) -> Iterator[Any]:
    for node in (*layer._inbound_nodes, *layer._outbound_nodes):
        yield node.layer
        for tensor in node.keras_inputs:
            yield tensor._keras_history.layer


def _rekey(memo: dict[int, Any]) -> None:
    """Points the graph's keys, which are `id`s of symbolic tensors, at the copies."""

    def renewed(keys: Iterable[str]) -> list[str]:
        return [str(id(memo[int(key)])) if int(key) in memo else key for key in keys]

    copies = list(memo.values())
    for node in (c for c in copies if isinstance(c, Node)):
        pairs = node._keras_inputs_ids_and_indices
        keys = renewed(key for key, _ in pairs)
        node._keras_inputs_ids_and_indices = [
            (key, index) for key, (_, index) in zip(keys, pairs, strict=True)
        ]
        node.flat_input_ids = renewed(node.flat_input_ids)
        node.flat_output_ids = renewed(node.flat_output_ids)
    for network in (c for c in copies if isinstance(c, Functional)):
        if getattr(network, "_tensor_usage_count", None):
            network._compute_tensor_usage_count()
