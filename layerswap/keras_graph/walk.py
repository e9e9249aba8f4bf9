"""Finds every layer of a model, wherever it lives.

Functional and Sequential models name their layers; every other layer is crawled by attribute,
through containers, plain objects and the closures of functions, so that nothing hides.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
from tf_keras.layers import Bidirectional, Layer
from tf_keras.metrics import Metric
from tf_keras.models import Sequential
from tf_keras.src.engine.functional import Functional
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from layerswap.keras_graph.storage import is_revived

TRAINING_FIXED = (
    "it is called with training=True, so it uses the batch's statistics at inference, too; from "
    "its moving statistics nothing can be fitted"
)


@dataclass(slots=True)
class Found:
    """A layer with its path and how it is used.

    Attributes:
        path: names of the containers and of the layer, joined by `/`; unique.
        layer: the object.
        calls: at how many places of the graph it is called, as far as graphs record it.
        nodes: those records.
        host: the outermost layer around it whose own code decides how it is called; None where
            graphs alone do.
        other_hosts: further ones, where several hold the layer.
        is_output: whether an output of a graph is the layer's own.
        obstacles: code → reason: what rules out a change because of where the layer lives.
    """

    path: str
    layer: Any
    calls: int = 0
    nodes: list[Any] = field(default_factory=list)
    host: Found | None = None
    other_hosts: list[Found] = field(default_factory=list)
    is_output: bool = False
    obstacles: dict[str, str] = field(default_factory=dict)


def find_layers(model: Any) -> list[Found]:
    """Every layer inside a model, each object once, parents before children.

    Args:
        model: a tf_keras model.

    Returns:
        In the order of the walk: a graph's layers in the order of `model.layers`. An object that
        is reached several times keeps its first path and adds up its calls.
    """
    walk = _Walk()
    walk.descend(Found("", model, calls=1), parents=())
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, BatchNormalizationBase) and id(layer) not in walk.found:
            reason = "Keras tracks it, but no attribute of the model leads to it"
            walk.register(Found(layer.name, layer, calls=1, obstacles={"unreached": reason}))
    return list(walk.found.values())


def find_batchnorms(model: Any) -> list[Found]:
    """The BatchNormalization objects among `find_layers`."""
    return [f for f in find_layers(model) if isinstance(f.layer, BatchNormalizationBase)]


def variables(model: Any) -> list[Any]:
    """`model.weights`; of a model that isn't built yet, those that its layers have already."""
    if model.built:
        weights = model.weights
    else:
        layers = (found.layer for found in find_layers(model))
        weights = [v for x in layers for v in (*x._trainable_weights, *x._non_trainable_weights)]
    # Lookup layers list their tables among the weights, which are no variables.
    return list({id(v): v for v in weights if isinstance(v, tf.Variable)}.values())


class _Walk:
    """Collects layers by identity; paths stay unique."""

    def __init__(self) -> None:
        self.found: dict[int, Found] = {}
        self._paths: set[str] = set()

    def register(self, found: Found) -> None:
        path, number = found.path, 1
        while found.path in self._paths:
            number += 1
            found.path = f"{path}#{number}"
        self._paths.add(found.path)
        self.found[id(found.layer)] = found

    def visit(self, found: Found, parents: tuple[int, ...]) -> None:
        if id(found.layer) in parents:
            return  # a layer that leads back to its own parent
        known = self.found.get(id(found.layer))
        if known is None:
            self.register(found)
            self.descend(found, parents)
            return
        known.calls += found.calls
        known.nodes += found.nodes
        known.host = known.host or found.host
        if found.host and known.host and found.host.layer is not known.host.layer:
            known.other_hosts.append(found.host)
        known.is_output |= found.is_output
        known.obstacles |= found.obstacles
        if runs_its_graph(found.layer):  # the calls inside it count once more
            again = replace(known, calls=found.calls, nodes=[], obstacles=found.obstacles)
            self.descend(again, parents)

    def descend(self, found: Found, parents: tuple[int, ...]) -> None:
        if not isinstance(found.layer, BatchNormalizationBase):
            for child in _children(found):
                self.visit(child, (*parents, id(found.layer)))


def runs_its_graph(layer: Any) -> bool:
    """Whether a call of the layer runs the layers of its recorded graph and nothing else."""
    return (
        isinstance(layer, Functional | Sequential)
        and type(layer).call in (Functional.call, Sequential.call)
        and bool(getattr(layer, "_network_nodes", None))
    )


def is_masked(node: Any) -> bool:
    """Whether a mask comes with an input of a recorded call."""
    return any(getattr(t, "_keras_mask", None) is not None for t in node.keras_inputs)


def fixes_training(node: Any) -> bool:
    """Whether a recorded call says training=True, so that inference uses the batch's statistics."""
    spec = node.layer._call_spec
    at = spec.arg_names.index("training") if "training" in spec.arg_names else 0
    values = [*(node.call_args[at : at + 1] if at else ()), node.call_kwargs.get("training")]
    return any(value is True or value == 1 for value in values if not tf.is_tensor(value))


def _children(parent: Found) -> Iterator[Found]:
    layer = parent.layer
    prefix = f"{parent.path}/" if parent.path else ""
    inherited = dict(parent.obstacles)
    if is_revived(layer):
        inherited["revived"] = (
            f"it lives in '{type(layer).__name__}', read from a SavedModel without its class: the "
            "traced call would go on as before"
        )
    host = parent.host
    if host is None and not runs_its_graph(layer):
        host = parent
    named: set[int] = set()
    if isinstance(layer, Functional | Sequential):
        last = {id(t._keras_history.layer) for t in tf.nest.flatten(layer.outputs or [])}
        for child in layer.layers:
            named.add(id(child))
            nodes = _graph_nodes(layer, child)
            calls = parent.calls * max(len(nodes), 1)
            found = Found(prefix + child.name, child, calls, nodes, host)
            found.is_output, found.obstacles = id(child) in last, dict(inherited)
            decided = isinstance(child, BatchNormalizationBase) or runs_its_graph(child)
            if decided and any(map(fixes_training, nodes)):
                found.obstacles["training-fixed"] = TRAINING_FIXED
            if host is None and any(map(is_masked, nodes)):
                # Only running it shows how far inside a mask gets.
                found.host = found
            yield found
    for name, child in _attributes(layer):
        if id(child) not in named:
            named.add(id(child))
            yield Found(prefix + name, child, parent.calls, host=host, obstacles=dict(inherited))


def _graph_nodes(container: Any, layer: Any) -> list[Any]:
    """The calls of `layer` that belong to the graph of `container`."""
    keys = getattr(container, "_network_nodes", ())
    return [
        node
        for index, node in enumerate(layer._inbound_nodes)
        if f"{layer.name}_ib-{index}" in keys
    ]


# Attributes in which Keras keeps its own account of layers that are found elsewhere.
_BOOKKEEPING = (
    "_self_",
    "_inbound_nodes",
    "_outbound_nodes",
    "_obj_reference_counts",
    "_layer_call_argspecs",
    "_nodes_by_depth",
    "_nested_inputs",
    "_nested_outputs",
    "_compiled_trainable_state",
    "_metrics",
    "_callable_losses",
    "compiled_",
    "train_function",
    "test_function",
    "predict_function",
    "train_tf_function",
    "optimizer",
    "history",
    "inputs",
    "outputs",
    "keras_api",
    "signatures",
    "_adapt_function",
)
# Nobody hides a layer in these, and they are large.
_FOREIGN = ("tensorflow.", "keras.", "tf_keras.", "numpy.", "builtins", "h5py.", "google.")
_DEEPEST = 8


def _attributes(layer: Any) -> Iterator[tuple[str, Any]]:
    """Layers in the attributes of a layer, with the expression that leads to each."""
    seen: set[int] = {id(layer)}
    # Keras's own operator layers wrap their `call` in a function that holds the layer itself.
    ours = type(layer).__module__.startswith("tf_keras.src.")
    for name, value in vars(layer).items():
        if name == "layer" and value is template_of(layer):
            continue
        if not (name.startswith(_BOOKKEEPING) or (ours and name == "call")):
            yield from _crawl(name, value, seen, depth=0)
    for name, value in _held_by_class(layer):
        yield from _crawl(name, value, seen, depth=0)


def _held_by_class(layer: Any) -> Iterator[tuple[str, Any]]:
    """What a user's class itself keeps layers in: its attributes, and what `call` refers to."""
    for kind in type(layer).__mro__:
        for name, value in () if _is_foreign(kind) else list(vars(kind).items()):
            if name == "call" or isinstance(value, Layer | list | tuple | dict):
                yield name, value


def template_of(layer: Any) -> Any:
    """The layer that a Bidirectional made its two of and that is never called; else None."""
    return layer.layer if isinstance(layer, Bidirectional) and not layer.layer.built else None


def captured_by_functions(layer: Any) -> Iterator[str]:
    """Paths to layers and variables that functions among a layer's attributes have captured."""
    ours = type(layer).__module__.startswith("tf_keras.src.")
    pending: list[tuple[str, Any, bool, int]] = [
        (name, value, False, 0)
        for name, value in vars(layer).items()
        if name == "_callable_losses"
        or not (name.startswith(_BOOKKEEPING) or (ours and name == "call"))
    ]
    pending += [(name, value, True, 0) for name, value in _held_by_class(layer)]
    seen: set[int] = set()
    while pending:
        name, value, inside, depth = pending.pop()
        if isinstance(value, Layer | tf.Variable):
            if inside and (isinstance(value, tf.Variable) or value.weights):
                yield name
        elif id(value) not in seen and depth < _DEEPEST:
            seen.add(id(value))
            inside = inside or isinstance(value, types.FunctionType)
            pending += [(f"{name}{k}", item, inside, depth + 1) for k, item in _parts(value)]


def _crawl(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Layer):
        if not isinstance(value, Metric):
            yield name, value
        return
    for key, item in _parts(value) if depth < _DEEPEST and id(value) not in seen else ():
        seen.add(id(value))
        yield from _crawl(f"{name}{key}", item, seen, depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, function or object holds."""
    if value is None or isinstance(value, str | bytes | int | float | np.ndarray | tf.Variable):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key}]", item) for key, item in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, types.FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # the cell is empty
                yield f".{key}", cell.cell_contents
        # A script's lambda refers to its layers as globals; all else there is no part of it.
        for key in sorted(_global_names(value.__code__)):
            if isinstance(item := value.__globals__.get(key), Layer):
                yield f".{key}", item
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, tf.types.experimental.GenericFunction):
        yield "", getattr(value, "python_function", None)
    elif isinstance(value, functools.partial):
        yield from ((f".{k}", v) for k, v in _parts([value.func, value.args, value.keywords]))
    elif isinstance(value, tf.Module) or not _is_foreign(type(value)):
        for key, item in (*list(getattr(value, "__dict__", {}).items()), *_slots(value)):
            if not key.startswith(_BOOKKEEPING):
                yield f".{key}", item


@functools.cache
def _global_names(code: types.CodeType) -> frozenset[str]:
    """The globals that a function or one within it reads; `co_names` has attributes, too."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(own.union(*map(_global_names, inner)))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object keeps outside of its `__dict__`."""
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                yield name, getattr(value, name)


def _is_foreign(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_FOREIGN) or issubclass(kind, type | types.ModuleType)
