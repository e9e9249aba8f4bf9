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
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph
from tf_keras.layers import GroupNormalization

Replacement = Callable[[Any, Any], Any]

_LOCK = threading.RLock()
_active = threading.local()
stock_call = GroupNormalization.call


@contextmanager
def groupnorm_call(replacement: Replacement) -> Iterator[None]:
    """Within the block, `replacement(layer, inputs)` stands in for `GroupNormalization.call`.

    Acts in the calling thread alone: another thread that predicts meanwhile gets the stock
    computation. `begin` confines it to one graph. Masked calls and subclasses that override
    `call` keep their own computation. The class is restored when the last block ends, also when
    the tracing inside fails.

    Args:
        replacement: takes the layer and its input tensor, returns a tensor of the same shape
            and dtype as the stock layer would.
    """
    with _LOCK:
        outer = getattr(_active, "replacement", None), getattr(_active, "graph", None)
        _active.replacement, _active.graph = replacement, None
        GroupNormalization.call = _traced_call
        try:
            yield
        finally:
            _active.replacement, _active.graph = outer
            if _active.replacement is None:
                GroupNormalization.call = stock_call


def begin() -> None:
    """Confines the replacement to the graph that is being traced now; called inside of it.

    A `tf.function` inside the model keeps what is traced here for later calls, which would then
    run the replacement instead of GroupNormalization: it gets the stock form. Bodies of loops
    and branches belong to this trace alone.
    """
    _active.graph = tf.compat.v1.get_default_graph()


def _acts_here() -> bool:
    if _active.graph is None:
        return True
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, ControlFlowFuncGraph):
        graph = graph.outer_graph
    return graph is _active.graph


def _dispatch(self: Any, inputs: Any, mask: Any = None) -> Any:
    replacement = getattr(_active, "replacement", None)
    if replacement is None or mask is not None or not _acts_here():
        return stock_call(self, inputs, mask)
    return replacement(self, inputs)


# Wears the stock signature: Keras reads it off the class when it builds or wraps a layer.
_traced_call = tf.__internal__.decorator.make_decorator(
    stock_call, tf.autograph.experimental.do_not_convert(_dispatch)
)
