"""Replaces the computation of GroupNormalization while a model is traced.

Two exports need it: ONNX (one marked node instead of some 55) and the SavedModel's serving
signature (the affine form, 2 times faster than the stock layer). The stock layer object, its
weights and its configuration stay as they are; only what `call` emits into a graph changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tf_keras.layers import GroupNormalization

Replacement = Callable[[Any, Any], Any]

_LOCK = threading.RLock()
_active = threading.local()
stock_call = GroupNormalization.call


@contextmanager
def groupnorm_call(replacement: Replacement) -> Iterator[None]:
    """Within the block, `replacement(layer, inputs)` stands in for `GroupNormalization.call`.

    Acts in the calling thread alone: another thread that predicts meanwhile gets the stock
    computation. Masked calls and subclasses that override `call` keep their own computation.
    The class is restored when the last block ends, also when the tracing inside fails.

    Args:
        replacement: takes the layer and its input tensor, returns a tensor of the same shape
            and dtype as the stock layer would.
    """
    with _LOCK:
        outer = getattr(_active, "replacement", None)
        _active.replacement = replacement
        GroupNormalization.call = _traced_call
        try:
            yield
        finally:
            _active.replacement = outer
            if outer is None:
                GroupNormalization.call = stock_call


def _dispatch(self: Any, inputs: Any, mask: Any = None) -> Any:
    replacement = getattr(_active, "replacement", None)
    if replacement is None or mask is not None:
        return stock_call(self, inputs, mask)
    return replacement(self, inputs)


# Wears the stock signature: Keras reads it off the class when it builds or wraps a layer.
_traced_call = tf.__internal__.decorator.make_decorator(
    stock_call, tf.autograph.experimental.do_not_convert(_dispatch)
)
