"""Deals with the graph functions (`tf.function`) that layers have of their own.

Once traced, such a function goes on computing with the layers that it saw: after a swap it has to
be traced anew, and how it calls its layers can only be seen in a fresh trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

# Made by Keras, which makes them anew.
_OF_KERAS = {
    *("train_function", "test_function", "predict_function", "train_tf_function"),
    "_adapt_function",
}
GenericFunction = tf.types.experimental.GenericFunction


@contextmanager
def untraced(layers: Sequence[Any]) -> Iterator[None]:
    """Within the block the layers' own graph functions (`tf.function`) have no traces.

    Afterwards they have those from before again.
    """
    caches = [(cache, layer) for layer in layers for cache in _caches(layer)]
    kept = [(cache, layer, cache.pop(layer, None)) for cache, layer in caches]
    replaced = [(vars(x), name, value) for x in layers for name, value in own_functions(x)]
    for attributes, name, value in replaced:
        attributes[name] = fresh_function(value, value.python_function)
    try:
        yield
    finally:
        for attributes, name, value in replaced:
            attributes[name] = value
        for cache, layer, bound in kept:
            cache.pop(layer, None)
            if bound is not None:
                cache[layer] = bound


def forget_traces(layer: Any) -> None:
    """Makes a layer's graph functions trace anew: their traces know the layers of before."""
    for cache in _caches(layer):
        cache.pop(layer, None)
    for name, value in list(own_functions(layer)):
        vars(layer)[name] = fresh_function(value, value.python_function)


def fresh_function(function: Any, python_function: Any) -> Any:
    """A `tf.function` with the options of another one, not traced yet."""
    return function._clone(python_function)


def _caches(layer: Any) -> Iterator[Any]:
    """Where the graph functions of a layer's class keep, by layer, those bound to it."""
    for kind in type(layer).__mro__:
        for value in vars(kind).values():
            if isinstance(value, GenericFunction) and hasattr(value, "_descriptor_cache"):
                yield value._descriptor_cache


def own_functions(layer: Any) -> Iterator[tuple[str, Any]]:
    """The graph functions among a layer's attributes that can be traced anew."""
    for name, value in vars(layer).items():
        traced = isinstance(value, GenericFunction) and hasattr(value, "_clone")
        if traced and name not in _OF_KERAS:
            yield name, value
