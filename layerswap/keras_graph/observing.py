"""Sees how code that no graph records calls its BatchNormalization layers, by tracing it.

A custom layer, a wrapper or a subclassed model is called once on symbolic inputs, for inference
and for training, while BatchNormalization notes how it is called. Nothing is computed, and no
variable is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tf_keras.backend import floatx
from tf_keras.layers import Lambda
from tf_keras.src.engine.base_layer_utils import call_context
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from layerswap.errors import reason_of
from layerswap.keras_graph.graph_functions import untraced
from layerswap.keras_graph.interception import batchnorm_calls
from layerswap.keras_graph.walk import TRAINING_FIXED, Found, find_layers, runs_its_graph

_LOCK = threading.RLock()
_active = threading.local()
# What BatchNormalization has and GroupNormalization doesn't.
_LACKING = {"moving_mean", "moving_variance", "momentum", "fused", "renorm", "virtual_batch_size"}


@dataclass(slots=True)
class Observed:
    """How a BatchNormalization is called by code.

    Attributes:
        calls: how often, for inference.
        shapes: of its inputs.
        masked: whether a mask came with an input.
        obstacles: code → reason: calls that GroupNormalization can't take.
    """

    calls: int = 0
    shapes: list[Any] = field(default_factory=list)
    masked: bool = False
    obstacles: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Observations:
    """What tracing a model's own code showed.

    Attributes:
        of: by `id` of the layer, how it is called.
        strangers: BatchNormalization layers that were called and that no walk had found.
        unseen: path of code that can't be traced → why; code around known layers is left out.
    """

    of: dict[int, Observed] = field(default_factory=dict)
    strangers: list[Found] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)


def observe(model: Any, batchnorms: Sequence[Found]) -> Observations:
    """Traces all code that isn't Keras's own, and what hosts the given layers.

    Args:
        model: the model that they were found in.
        batchnorms: those without a host are called by graphs alone.
    """
    seen = Observations({id(f.layer): Observed() for f in batchnorms if f.host is not None})
    guests_of: dict[int, list[Observed]] = {}
    hosts = {id(host.layer): host for host in _own_code(model)}
    for found in batchnorms:
        for host in (found.host, *found.other_hosts):
            if host is not None:
                hosts.setdefault(id(host.layer), host)
                guests_of.setdefault(id(host.layer), []).append(seen.of[id(found.layer)])
    known = {id(found.layer): found.layer for found in batchnorms}
    for key, host in hosts.items():
        name = host.path or type(host.layer).__name__
        try:
            for call in _recorded_calls(host):
                for training in (False, True):
                    with (
                        untraced(_layers_of(host)),
                        _noting(seen.of, known, training) as strangers,
                    ):
                        _trace(host.layer, call, training)
                    seen.strangers += [_stranger(name, layer) for layer in strangers]
        except Exception as error:  # whatever the user's code raises
            why = reason_of(error)
            if key not in guests_of:
                seen.unseen[name] = why
            for guest in guests_of.get(key, ()):
                guest.obstacles["untraceable"] = (
                    f"how '{name}' calls it can't be seen, since tracing it fails: {why}"
                )
    return seen


def _own_code(model: Any) -> Iterator[Found]:
    """The outermost layers that run code which isn't Keras's own."""
    for found in (Found("", model, calls=1), *find_layers(model)):
        own = not type(found.layer).__module__.startswith("tf_keras.src.")
        if (own or isinstance(found.layer, Lambda)) and not isinstance(
            found.layer, BatchNormalizationBase
        ):
            if found.host is not None:
                yield found.host
            elif found.nodes or not runs_its_graph(found.layer):
                yield found


def _stranger(host: str, layer: Any) -> Found:
    reason = f"'{host}' calls it, but no attribute of the model leads to it"
    return Found(f"{host}/{layer.name}", layer, calls=1, obstacles={"unreached": reason})


def _layers_of(host: Found) -> list[Any]:
    return [host.layer, *(found.layer for found in find_layers(host.layer))]


Call = tuple[Any, Any]


def _recorded_calls(host: Found) -> Iterator[Call]:
    """(positional, keyword) arguments of each call, with a TensorSpec for each tensor."""
    if host.nodes:
        for node in host.nodes:
            yield node.call_args, node.call_kwargs
        return
    layer = host.layer
    spec = layer._saved_model_arg_spec
    if spec is not None:
        yield tuple(spec[0]), dict(spec[1])
    elif layer._build_input_shape is not None:
        shapes = layer._build_input_shape
        yield (tf.nest.map_structure(_spec_of_shape, _as_shapes(shapes)),), {}


def _as_shapes(shape: Any) -> Any:
    if isinstance(shape, tf.TensorShape) or all(d is None or isinstance(d, int) for d in shape):
        return tf.TensorShape(shape)
    if isinstance(shape, dict):
        return {name: _as_shapes(item) for name, item in shape.items()}
    return [_as_shapes(item) for item in shape]


def _spec_of_shape(shape: Any) -> Any:
    return tf.TensorSpec(shape, floatx())


def _trace(layer: Any, call: Call, training: bool) -> None:
    arguments = tf.nest.flatten(call)
    symbolic = [i for i, value in enumerate(arguments) if _spec(value) is not None]
    specs = [_spec(arguments[i]) for i in symbolic]
    masks = [getattr(arguments[i], "_keras_mask", None) for i in symbolic]

    def fill(tensors: Sequence[Any], mask_tensors: Sequence[Any]) -> Any:
        filled = list(arguments)
        for index, tensor, mask in zip(symbolic, tensors, mask_tensors, strict=True):
            if mask is not None:
                tensor._keras_mask = mask
            filled[index] = tensor
        args, kwargs = tf.nest.pack_sequence_as(call, filled)
        if layer._expects_training_arg and not _says_training(layer, args, kwargs):
            kwargs = {**kwargs, "training": training}
            args = args[:1] if "training" in layer._call_spec.arg_names[1 : len(args)] else args
        return args, kwargs

    ours = tf.autograph.experimental.do_not_convert(fill)

    def run(tensors: Sequence[Any], mask_tensors: Sequence[Any]) -> int:
        args, kwargs = ours(tensors, mask_tensors)
        layer(*args, **kwargs)
        return 0

    mask_specs = [None if mask is None else tf.TensorSpec(mask.shape, mask.dtype) for mask in masks]
    # With AutoGraph: the layer's own code may branch and loop on tensors.
    tf.function(run).get_concrete_function(specs, mask_specs)


def _says_training(layer: Any, args: Any, kwargs: Any) -> bool:
    """Whether a recorded call fixes training; those of graphs alone do."""
    passed = dict(zip(layer._call_spec.arg_names, args, strict=False)) | kwargs
    return passed.get("training") is not None


def _spec(value: Any) -> Any:
    """The spec of a symbolic or concrete tensor; None for anything else."""
    if isinstance(value, tf.TypeSpec):
        return value
    return getattr(value, "type_spec", None) or (
        tf.TensorSpec.from_tensor(value) if isinstance(value, tf.Tensor) else None
    )


@contextmanager
def _noting(
    observed: dict[int, Observed], known: dict[int, Any], training: bool
) -> Iterator[list[Any]]:
    """Within the block BatchNormalization layers note how this thread calls them.

    Yields a list that takes the layers which aren't `known`.
    """
    strangers: list[Any] = []

    def note(layer: Any, inputs: Any, args: Any, kwargs: Any) -> None:
        if id(layer) not in known:
            known[id(layer)] = layer
            strangers.append(layer)
        seen = observed.get(id(layer))
        if seen is None:
            return
        seen.calls += not training
        seen.shapes.append(inputs.shape)
        seen.masked |= kwargs.get("mask") is not None
        if args:
            seen.obstacles["positional-argument"] = (
                "it is called with a second positional argument, which GroupNormalization takes "
                "for a mask; pass training by name"
            )
        if kwargs and call_context().layer is not layer:
            seen.obstacles["called-directly"] = (
                f"its call() is called directly, with {', '.join(kwargs)}, which "
                "GroupNormalization's doesn't take; call the layer instead"
            )
        if kwargs.get("training") is True and not training:
            seen.obstacles["training-fixed"] = TRAINING_FIXED
        if not inputs.dtype.is_floating:
            seen.obstacles["integer-input"] = f"its input is {inputs.dtype.name}"

    def note_read(layer: Any, name: str) -> None:
        seen = observed.get(id(layer))
        if seen is not None:
            seen.obstacles["attribute-read"] = (
                f"the code around it reads its '{name}', which GroupNormalization doesn't have"
            )

    def call(layer: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        note(layer, inputs, args, kwargs)
        _active.note_read, reading = None, _active.note_read  # its own code may read all of it
        try:
            return batchnorm_calls.stock(layer, inputs, *args, **kwargs)
        finally:
            _active.note_read = reading

    with _LOCK, batchnorm_calls.by(call, known.values()):
        _active.note_read = note_read
        BatchNormalizationBase.__getattribute__ = _read
        try:
            yield strangers
        finally:
            _active.note_read = None
            del BatchNormalizationBase.__getattribute__


def _read(self: Any, name: str) -> Any:
    if name in _LACKING:
        note_read: Callable[..., None] | None = getattr(_active, "note_read", None)
        if note_read is not None:
            note_read(self, name)
    return object.__getattribute__(self, name)
