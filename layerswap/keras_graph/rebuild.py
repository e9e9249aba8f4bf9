"""Applies a plan: turns each BatchNormalization object into a stock GroupNormalization.

The object stays the same one, so that whatever refers to it (the graph, a wrapper, a list, tied
weights) needs no change; its class and state are those of a freshly built stock layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import GroupNormalization

from layerswap import rules
from layerswap.errors import PolicyError, TransferError, reason_of
from layerswap.keras_graph.graph_functions import forget_traces
from layerswap.keras_graph.walk import Found, find_batchnorms, find_layers, template_of
from layerswap.policy import PARTS
from layerswap.records import Statistics, Swap, SwapPlan

# What ties a layer to its model and to its calls, rather than saying what it computes.
_TIES = (
    "_inbound_nodes_value",
    "_outbound_nodes_value",
    "_batch_input_shape",
    "_saved_model_inputs_spec",
    "_activity_regularizer",
    "_preserve_input_structure_in_config",
    "_in_functional_construction_mode",
)


def apply_plan(model: Any, plan: SwapPlan, statistics: Mapping[str, Statistics]) -> None:
    """Turns every layer that the plan swaps, in place, and sets its γ and β.

    Args:
        model: the model that the plan was made for, or a copy of it.
        plan: without refusals.
        statistics: by path; needed for all swaps but those with weights "reset".

    Raises:
        TransferError: the model has no BatchNormalization at a path of the plan.
        PolicyError: Keras refuses a value of the plan.
    """
    sites = {found.path: found for found in find_batchnorms(model)}
    missing = [swap.site.path for swap in plan.swaps if swap.site.path not in sites]
    if missing:
        raise TransferError(f"the model has no BatchNormalization at {', '.join(missing)}")
    # All layers are built before the first is changed: a value that Keras refuses stops here.
    fresh = [_build(swap, sites[swap.site.path]) for swap in plan.swaps]
    for swap, new in zip(plan.swaps, fresh, strict=True):
        if swap.weights != "reset":
            _assign(new, swap, statistics[swap.site.path])
        _turn(sites[swap.site.path], new)
    for layer in (model, *(found.layer for found in find_layers(model))):
        if template_of(layer) is not None:
            _turn_template(layer)
        forget_traces(layer)


def _turn_template(wrapper: Any) -> None:
    """What a Bidirectional made its two layers of is never called, but holds the same."""
    run = {found.path: found.layer for found in find_layers(wrapper.forward_layer)}
    for spare in find_batchnorms(wrapper.layer):
        twin: Any = run.get(spare.path)
        if isinstance(twin, GroupNormalization) and not spare.layer.built:
            config = {**twin.get_config(), "name": spare.layer.name}
            _turn(spare, GroupNormalization.from_config(config))


def _build(swap: Swap, found: Found) -> Any:
    config = dict(swap.config)
    for part in PARTS:
        # Carried parts are BN's own objects: a function or a class that isn't registered can't
        # be made again from its serialized form.
        if config[part] == swap.site.config.get(part) and hasattr(found.layer, part):
            config[part] = getattr(found.layer, part)
    # The variables take the place of the old ones, names included: `.h5` and name-based loading
    # need them to be unique, which they are only below the layer's own scope.
    scope = found.layer.moving_mean.name.rpartition("/")[0]
    try:
        layer = GroupNormalization.from_config(config)
        with tf.init_scope(), tf.name_scope(f"{scope}/" if scope else ""):
            layer.build(tf.TensorShape(swap.site.shape))
        for part in PARTS:
            value = getattr(layer, part)
            if value is not None and not callable(value):
                raise ValueError(f"{part} '{value}' is unknown")
        _ = layer.losses  # a regularizer may refuse a vector
    except Exception as error:  # whatever Keras raises for a name or config that it doesn't know
        raise PolicyError(
            f"Keras refuses the configuration: {reason_of(error)}",
            where=swap.site.path,
            hint="Check the initializers, regularizers and constraints of the policy.",
        ) from error
    return layer


def _assign(layer: Any, swap: Swap, statistics: Statistics) -> None:
    affine = rules.fit(swap, statistics)
    for variable, values in ((layer.gamma, affine.gamma), (layer.beta, affine.beta)):
        if variable is not None:
            variable.assign(np.asarray(values).astype(variable.dtype.as_numpy_dtype))


def _turn(found: Found, new: Any) -> None:
    old = found.layer
    ties = {name: vars(old)[name] for name in _TIES if name in vars(old)}
    nodes = list(old._inbound_nodes)
    spec = vars(old).get("_saved_model_arg_spec")
    state = {**vars(new), **ties}
    if new.dtype_policy.name == old.dtype_policy.name:  # float32 in place of 16 bits needs its own
        state["_autocast"] = old._autocast
    if spec is not None:
        state["_saved_model_arg_spec"] = (spec[0][:1], {})
    # `__dict__` first: the class's own attribute hooks would track and count every assignment.
    object.__setattr__(old, "__dict__", state)
    object.__setattr__(old, "__class__", GroupNormalization)
    for node in nodes:
        _strip_arguments(node)


def _strip_arguments(node: Any) -> None:
    """Leaves a recorded call its input alone: GroupNormalization has no `training`."""
    node.call_args = tuple(node.call_args[:1]) or (node.call_kwargs["inputs"],)
    node.call_kwargs = {}
    node._flat_arguments = tf.nest.flatten((node.call_args, []))
    node._single_positional_tensor_passed = len(node._flat_arguments) == 1
    node._keras_inputs_ids_and_indices = [(node._keras_inputs_ids_and_indices[0][0], 0)]
