"""Copies a built tf_keras model object by object, so that nothing is rebuilt or renamed.

Keras's own copies go through the configuration and lose what isn't in it: trainable flags, tied
weights, preprocessing state, non-default initializers. Here every layer, node, symbolic tensor
and variable is copied as the object it is, once, so that sharing survives by construction. Two
things need help: Keras keys its graph by the `id` of symbolic tensors, and a compiled model
holds traced functions, which belong to the original (`compiling.recompile` makes new ones).
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
from layerswap.keras_graph.walk import find_layers


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

    The copy still refers to the original's compile state: call `compiling.recompile` on it.

    Args:
        model: any tf_keras model; it is left as it is.

    Returns:
        The copy, and which of its objects stands for which of the original's.

    Raises:
        UnsupportedModelError: the model holds something that can't be copied.
    """
    memo: dict[int, Any] = {}
    originals = _connected_layers(model)
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
    try:
        for layer in originals:
            _copy_autocast_variables(layer, memo)
        for layer, shell in zip(originals, shells, strict=True):
            # Symbolic losses of one past call; Keras collects them anew in each.
            state = {**layer.__getstate__(), "_losses": []}
            shell.__setstate__({name: copy.deepcopy(value, memo) for name, value in state.items()})
    except Exception as error:  # whatever a user's object raises when it is copied
        raise _uncopyable(model, f"{type(error).__name__}: {error}") from error
    for shell in shells:
        if vars(shell).get("_adapt_function") is not None:
            shell._adapt_function = None  # the original's; made anew when adapting again
    _rekey(memo)
    copied = memo[id(model)]
    shared_layers = {id(layer) for layer in originals}
    for found in find_layers(copied):
        if id(found.layer) in shared_layers:  # functions are copied by reference
            raise _uncopyable(model, f"'{found.path}' is held by a function")
    return copied, Twins(memo)


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
