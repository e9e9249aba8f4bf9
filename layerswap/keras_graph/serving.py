"""The SavedModel's serving signature: the model with GroupNormalization in its fast form.

The stock layer weights its moments with a mask of ones and reshapes dynamically: twice the
time of an unfused BN, and LiteRT converts it but fails when running it. The form here costs
little more than the BN did:

    m = mean over the positions, averaged within each group
    v = mean over the positions of (x − m)², averaged within each group
    A = γ / √(v + ε),    y = x·A + (β − m·A)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from layerswap.errors import ExportError
from layerswap.keras_graph import tracing
from layerswap.keras_graph.interface import call_arguments, has_fixed_batch, refuse_arguments


def affine_group_norm(layer: Any, x: Any) -> Any:
    """What `layer` computes from `x`, as two moments and one multiply-add.

    Works in float32 where `x` has 16 bits: the variance would overflow in float16.

    Args:
        layer: a built `GroupNormalization`; its `axis`, `groups` (also -1), `epsilon` and
            weights count.
        x: a tensor of rank 2 or more with a static channel axis, any batch size.

    Returns:
        A tensor of the same shape and dtype as `x`.
    """
    rank = x.shape.rank
    axis = layer.axis % rank
    channels = x.shape[axis]
    groups = channels if layer.groups == -1 else layer.groups
    positions = [i for i in range(1, rank) if i != axis]
    wide = tf.cast(x, tf.float32) if x.dtype.size < 4 else x

    def along_channels(value: Any) -> Any:
        return tf.reshape(value, [channels if i == axis else 1 for i in range(rank)])

    def pooled(value: Any) -> Any:
        per_channel = tf.reduce_mean(value, positions, keepdims=True)
        if groups == channels:
            return per_channel
        shape = [channels if i == axis else 1 for i in range(rank)]
        grouped = tf.reshape(per_channel, [-1, groups, channels // groups])
        averaged = tf.reduce_mean(grouped, 2, keepdims=True)
        # Not broadcast_to: LiteRT fails on it when the batch size is open.
        repeated = tf.tile(averaged, [1, 1, channels // groups])
        return tf.reshape(repeated, [-1, *shape[1:]])

    mean = pooled(wide)
    variance = pooled(tf.math.squared_difference(wide, mean))
    factor = tf.math.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        factor *= along_channels(tf.cast(layer.gamma, wide.dtype))
    shift = -mean * factor
    if layer.beta is not None:
        shift += along_channels(tf.cast(layer.beta, wide.dtype))
    return tf.cast(wide * factor + shift, x.dtype)


def serving_signature(model: tf_keras.Model) -> Any:
    """A concrete function of the model at inference, to be saved as `serving_default`.

    Its arguments are named by `model.input_names`, its results by `model.output_names`, or as
    Keras counts where a subclassed model has no names. Open are the axes that the model leaves
    open, the batch among them unless its `inputs` fix it. It reads the model's own variables.

    Args:
        model: a built model; it isn't changed.

    Returns:
        A concrete function from tensors to a dictionary of tensors.

    Raises:
        ExportError: the model's input shape isn't known, it takes tensors by keyword, or two
            inputs or outputs would have the same name.
    """
    if model.save_spec() is None:
        raise ExportError(
            "the shape of the model's input isn't known",
            where=model.name,
            hint="Call the model on a sample once before exporting it.",
        )
    refuse_arguments(model)
    specs = call_arguments(model)
    if has_fixed_batch(model):
        specs = model.save_spec(dynamic_batch=False)[0]
    flat = tf.nest.flatten(specs)
    names = _names(model.input_names or [spec.name for spec in flat], len(flat), "input")
    parameters = inspect.signature(model.call).parameters.values()
    takes_training = any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)

    def by_name(results: Any) -> dict[str, Any]:
        tensors = tf.nest.flatten(results)
        return dict(zip(_names(model.output_names, len(tensors), "output"), tensors, strict=True))

    def serve(*tensors: Any) -> Any:
        tracing.begin()
        arguments = tf.nest.pack_sequence_as(specs, tensors)
        keywords = {"training": False} if takes_training else {}
        return unconverted(model(*arguments, **keywords))

    # Layers may rely on autograph, so `serve` has it on; plain Python here does not need it.
    unconverted = tf.autograph.experimental.do_not_convert(by_name)

    named = [_renamed(spec, name) for spec, name in zip(flat, names, strict=True)]
    with tracing.groupnorm_call(affine_group_norm):
        return tf.function(serve).get_concrete_function(*named)


def _names(names: Sequence[str | None] | None, count: int, kind: str) -> list[str]:
    """The given names if there are as many as needed, else `input_1`, `input_2` and so on."""
    found = [name for name in names or () if name]
    if len(found) != count:
        return [f"{kind}_{index + 1}" for index in range(count)]
    if len(set(found)) != count:
        raise ExportError(f"the model's {kind}s have the same name twice: {', '.join(found)}")
    return found


def _renamed(spec: Any, name: str) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        raise ExportError(
            f"a serving signature can't take a {type(spec).__name__}",
            where=name,
            hint="Only dense inputs can be exported.",
        )
    return tf.TensorSpec(spec.shape, spec.dtype, name)
