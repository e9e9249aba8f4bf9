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

from layerswap.keras_graph.interception import groupnorm_calls

Replacement = Callable[[Any, Any], Any]

_active = threading.local()
stock_call = groupnorm_calls.stock


@contextmanager
def groupnorm_call(replacement: Replacement) -> Iterator[None]:
    """Within the block, `replacement(layer, inputs)` stands in for `GroupNormalization.call`.

    Acts in the calling thread alone: another thread that predicts meanwhile gets the stock
    computation. `begin` confines it to one graph. Masked calls and subclasses that override
    `call` keep their own computation.

    Args:
        replacement: takes the layer and its input tensor, returns a tensor of the same shape
            and dtype as the stock layer would.
    """

    def stand_in(layer: Any, inputs: Any, mask: Any = None) -> Any:
        if mask is not None or not _acts_here():
            return stock_call(layer, inputs, mask)
        return replacement(layer, inputs)

    outer, _active.graph = getattr(_active, "graph", None), None
    try:
        with groupnorm_calls.by(stand_in):
            yield
    finally:
        _active.graph = outer


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
