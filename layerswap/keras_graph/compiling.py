"""Carries the compile configuration and the optimizer's state to a copied or changed model.

In two steps, so that what can't be carried is known before anything is changed: `prepare` makes
the new optimizer and metrics, `Recipe.apply` compiles with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tf_keras.callbacks import Callback
from tf_keras.metrics import Metric
from tf_keras.models import Model
from tf_keras.optimizers import Optimizer, legacy
from tf_keras.src.engine.compile_utils import Container
from tf_keras.src.engine.training_utils import RespectCompiledTrainableState
from tf_keras.src.optimizers.legacy.optimizer_v2 import _var_key

from layerswap.errors import UnsupportedModelError, reason_of

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


def is_compile_state(value: Any) -> bool:
    """Whether an object is of the kinds that `compile`, `fit` and `predict` leave on a model."""
    kinds = (
        Optimizer,
        legacy.Optimizer,
        Container,
        Callback,
        tf.types.experimental.GenericFunction,
    )
    return (
        isinstance(value, kinds)
        or type(value).__name__ == "_SignatureMap"  # a SavedModel's
        or getattr(value, "__qualname__", "").startswith("Model.make_")  # under run_eagerly
    )


@dataclass(slots=True)
class Recipe:
    """How to compile a model as another one is compiled.

    `arguments` are those of `compile`, None for a model that isn't compiled; `trainable` are the
    layers' flags when it was compiled, by which `fit` trains.
    """

    source: Any
    arguments: dict[str, Any] | None
    optimizer: Any
    trainable: list[tuple[Any, bool]]

    def apply(self, target: Any, twins: Any, variables: Pairs) -> None:
        """Compiles `target`; its traced functions, which know the old layers, are dropped.

        Args:
            target: the model that stands for the source; may be the source itself.
            twins: which layer of the target stands for which of the source.
            variables: (variable of the source, variable of the target that stands for it). The
                optimizer's slots of these are carried; those of other variables start at zero.
        """
        for name in _OF_THE_RUN:
            vars(target).pop(name, None)
        if "signatures" in vars(target):  # a SavedModel's: traces with the old layers
            del target.signatures
        target._reset_compile_cache()
        if self.arguments is None:
            return
        target.compile(**self.arguments)
        for layer, flag in self.trainable:
            target._compiled_trainable_state[twins.of(layer)] = flag
        if self.optimizer is not None:
            with RespectCompiledTrainableState(target):
                _carry_state(self.optimizer, target.optimizer, variables, target)


def prepare(source: Any) -> Recipe:
    """What is needed to compile another model like this one.

    Raises:
        UnsupportedModelError: the optimizer or a metric can't be made anew from its configuration.
    """
    if not getattr(source, "_is_compiled", False):
        return Recipe(source, None, None, [])
    arguments = source._get_compile_args()
    old, steps = source.optimizer, source._steps_per_execution
    try:
        arguments["optimizer"] = None if old is None else type(old).from_config(old.get_config())
        for name in ("metrics", "weighted_metrics"):
            if arguments[name] is not None:
                arguments[name] = tf.nest.map_structure(
                    lambda metric: _fresh_metric(metric, source), arguments[name]
                )
    except Exception as error:  # whatever a user's class raises
        raise UnsupportedModelError(
            f"its optimizer or metrics can't be made anew: {reason_of(error)}",
            where=str(source.name),
            hint="Swap the model uncompiled (load it with compile=False) and compile the result.",
        ) from error
    if type(source).compile is not Model.compile:
        raise UnsupportedModelError(
            f"'{type(source).__name__}' has a compile() of its own, which can't be repeated",
            where=str(source.name),
            hint="Swap the model before it is compiled, and compile the result.",
        )
    arguments |= {
        "run_eagerly": source._run_eagerly,
        "jit_compile": source._jit_compile,
        "steps_per_execution": None if steps is None else int(steps.numpy()),
    }
    trainable = list((source._compiled_trainable_state or {}).items())
    return Recipe(source, arguments, old, trainable)


def _fresh_metric(metric: Any, source: Any) -> Any:
    if not isinstance(metric, Metric):
        return metric
    config = metric.get_config()
    outputs = getattr(source, "output_names", None) or []
    if source.compiled_metrics.built and len(outputs) > 1:
        # Keras put the output's name before it and will do so again.
        prefix = next((f"{o}_" for o in outputs if metric.name.startswith(f"{o}_")), "")
        config["name"] = metric.name.removeprefix(prefix)
    return type(metric).from_config(config)


def _carry_state(old: Any, new: Any, variables: Pairs, target: Any) -> None:
    if hasattr(old, "inner_optimizer"):  # a LossScaleOptimizer
        _carry_state(old.inner_optimizer, new.inner_optimizer, variables, target)
        if old.dynamic:
            for name in ("current_loss_scale", "counter"):
                getattr(new._loss_scale, name).assign(getattr(old._loss_scale, name))
    elif isinstance(old, legacy.Optimizer):
        _carry_legacy_state(old, new, variables, target)
    else:
        if getattr(old, "_built", False):
            _carry_slots(old, new, variables, target)
        for name, value in vars(old).items():  # the step, and what else isn't kept per variable
            fresh = vars(new).get(name)
            if isinstance(value, tf.Variable) and isinstance(fresh, tf.Variable):
                fresh.assign(value)
        _carry_exclusions(old, new, variables)


def _carry_exclusions(old: Any, new: Any, variables: Pairs) -> None:
    """`exclude_from_weight_decay` isn't part of an optimizer's configuration."""
    if hasattr(old, "_exclude_from_weight_decay"):
        keys = {old._var_key(theirs): new._var_key(mine) for theirs, mine in variables}
        new._exclude_from_weight_decay = [
            keys[key] for key in old._exclude_from_weight_decay or [] if key in keys
        ]
        new._exclude_from_weight_decay_names = old._exclude_from_weight_decay_names


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
