"""Carries the compile configuration and the optimizer's state to a copied or changed model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tf_keras.metrics import Metric
from tf_keras.optimizers import legacy
from tf_keras.src.optimizers.legacy.optimizer_v2 import _var_key

# Made by `compile`, `fit` and `predict` for one model and its variables.
_COMPILED = ("optimizer", "compiled_loss", "compiled_metrics", "loss")
_TRACED = ("train_function", "test_function", "predict_function", "train_tf_function")
_OF_THE_RUN = ("history",)

Pairs = Sequence[tuple[Any, Any]]


def compile_state(model: Any) -> Iterator[Any]:
    """The objects that `compile`, `fit` and `predict` left on a model."""
    for name in (*_COMPILED, *_TRACED, *_OF_THE_RUN):
        value = vars(model).get(name)
        if value is not None:
            yield value


def recompile(source: Any, target: Any, variables: Pairs) -> None:
    """Compiles `target` as `source` is compiled, with an optimizer and metrics of its own.

    Traced functions are dropped: they would go on computing with the old layers.

    Args:
        source: the model to take the configuration from; may be `target` itself.
        target: the model to compile; only its traces are dropped where `source` isn't compiled.
        variables: (variable of `source`, variable of `target` that stands for it). The
            optimizer's slots of these are carried; those of other variables start at zero.
    """
    for name in _OF_THE_RUN:
        vars(target).pop(name, None)
    target._reset_compile_cache()
    if not getattr(source, "_is_compiled", False):
        return
    arguments = source._get_compile_args()
    old = source.optimizer
    new = None if old is None else type(old).from_config(old.get_config())
    arguments["optimizer"] = new
    for name in ("metrics", "weighted_metrics"):
        if arguments[name] is not None:
            arguments[name] = tf.nest.map_structure(_fresh_metric, arguments[name])
    steps = source._steps_per_execution
    target.compile(
        **arguments,
        run_eagerly=source._run_eagerly,
        jit_compile=source._jit_compile,
        steps_per_execution=None if steps is None else int(steps.numpy()),
    )
    if old is not None:
        _carry_state(old, new, variables, target)


def _fresh_metric(metric: Any) -> Any:
    return type(metric).from_config(metric.get_config()) if isinstance(metric, Metric) else metric


def _carry_state(old: Any, new: Any, variables: Pairs, target: Any) -> None:
    if hasattr(old, "inner_optimizer"):  # a LossScaleOptimizer
        _carry_state(old.inner_optimizer, new.inner_optimizer, variables, target)
    elif isinstance(old, legacy.Optimizer):
        _carry_legacy_state(old, new, variables, target)
    else:
        new.iterations.assign(old.iterations)
        if getattr(old, "_built", False):
            _carry_slots(old, new, variables, target)


def _carry_slots(old: Any, new: Any, variables: Pairs, target: Any) -> None:
    """Slots live in lists on the optimizer, at the position that `_index_dict` gives."""
    positions = {
        id(mine): old._index_dict[old._var_key(theirs)]
        for theirs, mine in variables
        if old._var_key(theirs) in old._index_dict
    }
    # In the order in which Keras builds it when it loads the model: files rely on it. Variables
    # frozen since keep their slots behind, in case that they are unfrozen again.
    trained = {id(v): v for v in target.trainable_variables}
    frozen = {id(mine): mine for _, mine in variables if id(mine) in positions}
    order = list({**trained, **frozen}.values())
    new.build(order)
    for name, slots in vars(old).items():
        fresh = vars(new).get(name)
        if not (isinstance(slots, list) and isinstance(fresh, list)):
            continue
        if len(slots) != len(old._index_dict) or len(fresh) != len(order):
            continue
        for place, variable in enumerate(order):
            position = positions.get(id(variable))
            if position is not None and isinstance(slots[position], tf.Variable):
                fresh[place].assign(slots[position])


def _carry_legacy_state(old: Any, new: Any, variables: Pairs, target: Any) -> None:
    new.iterations.assign(old.iterations)
    if not old.weights[1:]:
        return  # never applied: no slots yet
    new._create_all_weights(target.trainable_variables)
    for name in old.get_slot_names():
        for theirs, mine in variables:
            before = old._slots.get(_var_key(theirs), {}).get(name)
            after = new._slots.get(_var_key(mine), {}).get(name)
            if before is not None and after is not None:
                after.assign(before)
