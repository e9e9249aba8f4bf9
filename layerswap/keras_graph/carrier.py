"""GroupNormalization as one node: what tracing emits, and what tf2onnx makes of it.

Stock GroupNormalization traces to some 55 TensorFlow operations that no converter puts back
together. While a model is traced for ONNX each call emits one `FusedBatchNormV3` instead, the
*carrier*: tf2onnx knows its layouts and TensorFlow its shapes, but nobody runs it. Its
`exponential_avg_factor`, meaningless at inference, is 2 + the number of the call site, which
tells it from a real BatchNormalization. Before tf2onnx maps the operations, `rewriter` turns
each carrier into

    Transpose → layerswap::GroupNorm(x, γ, β) → Transpose        (x channels first)

and tf2onnx's own optimiser cancels the transposes against those of the convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tf_keras.layers import GroupNormalization

from layerswap.errors import ExportError
from layerswap.keras_graph import tracing

DOMAIN = "layerswap"
OP_TYPE = "GroupNorm"

# Methods that the stock `call` is made of. A subclass that overrides one computes something
# else, so it keeps its own computation.
_STOCK_PARTS = ("_reshape_into_groups", "_apply_normalization", "_get_reshaped_weights")
_FIRST_FACTOR = 2
# What `_emit` puts around the carrier of a layer of rank 2 or 3.
_WRAPPERS = {2: ("Reshape", ["Reshape"]), 3: ("ExpandDims", ["Squeeze"])}
_FORMATS = {4: ("NHWC", "NCHW"), 5: ("NDHWC", "NCDHW")}


@dataclass(frozen=True, slots=True)
class CallSite:
    """One call of a GroupNormalization layer in the traced graph.

    Attributes:
        path: name scope of the call without the model's own name (`block/gn`).
        groups: number of groups, always positive.
        epsilon: added to each group's variance.
        channels: size of the normalised axis.
        rank: number of axes of the input, batch included.
    """

    path: str
    groups: int
    epsilon: float
    channels: int
    rank: int


class Carriers:
    """Emits carriers for one trace and remembers their call sites.

    Args:
        model_name: first part of every name scope, left out of the paths.
    """

    def __init__(self, model_name: str) -> None:
        self.sites: list[CallSite] = []
        self.failure: ExportError | None = None
        self._model_name = model_name

    def begin(self) -> None:
        """Declares the graph that is being traced now; called inside of it."""
        self.sites.clear()
        tracing.begin()

    def __call__(self, layer: Any, inputs: Any) -> Any:
        """Stands in for `GroupNormalization.call`.

        Args:
            layer: the layer, built.
            inputs: tensor of rank 2 or more.

        Returns:
            A tensor of the shape and dtype of `inputs`.

        Raises:
            ExportError: the layer computes in a type that the ONNX form can't hold.
        """
        if not _is_stock(layer):
            return tracing.stock_call(layer, inputs)
        axis = layer.axis % inputs.shape.rank
        channels = int(inputs.shape[axis])
        scope = tf.compat.v1.get_default_graph().get_name_scope()
        path = scope.removeprefix(f"{self._model_name}/") or layer.name
        if inputs.dtype not in (tf.float32, tf.float16):
            # Kept as well as raised: Keras and AutoGraph rewrap what passes through them.
            self.failure = ExportError(
                f"GroupNormalization in {inputs.dtype.name} has no portable ONNX form",
                where=path,
                hint="Build the layer with dtype='float32' (mixed_float16 works too).",
            )
            raise self.failure
        groups = channels if layer.groups == -1 else int(layer.groups)
        self.sites.append(CallSite(path, groups, float(layer.epsilon), channels, inputs.shape.rank))
        gamma = _read(layer.gamma) if layer.scale else tf.ones([channels])
        beta = _read(layer.beta) if layer.center else tf.zeros([channels])
        attributes = {
            "scale": gamma,
            "offset": beta,
            "mean": tf.zeros([channels]),
            "variance": tf.ones([channels]),
            "epsilon": float(layer.epsilon),
            "exponential_avg_factor": float(_FIRST_FACTOR + len(self.sites) - 1),
            "is_training": False,
        }
        normal = _emit(tf.cast(inputs, tf.float32), axis, attributes)
        result = tf.cast(normal, inputs.dtype)
        result.set_shape(inputs.shape)
        return result


def rewriter(sites: Sequence[CallSite]) -> Callable[[Any, list[Any]], list[Any]]:
    """A tf2onnx `custom_rewriter` that turns every carrier into a GroupNorm node.

    Args:
        sites: the call sites of the trace, in the order of their numbers.
    """

    def rewrite(graph: Any, operations: list[Any]) -> list[Any]:
        for node in list(operations):
            factor = node.get_attr_value("exponential_avg_factor", 1.0)
            if node.type == "FusedBatchNormV3" and factor >= _FIRST_FACTOR:
                _replace(graph, node, sites[round(factor) - _FIRST_FACTOR])
        operations = graph.get_nodes()
        return list(operations)

    return rewrite


def _is_stock(layer: Any) -> bool:
    kind = type(layer)
    return all(getattr(kind, p) is getattr(GroupNormalization, p) for p in _STOCK_PARTS)


def _read(variable: Any) -> Any:
    value = tf.convert_to_tensor(variable)
    stored = getattr(variable, "true_dtype", variable.dtype)
    if value.dtype != stored:
        # Past the automatic cast of mixed precision: γ and β stay float32 in the file.
        value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=stored)
    return tf.cast(value, tf.float32)


def _emit(x: Any, axis: int, attributes: dict[str, Any]) -> Any:
    rank = x.shape.rank
    if rank in _FORMATS and axis in (1, rank - 1):
        data_format = _FORMATS[rank][axis == 1]
        return tf.raw_ops.FusedBatchNormV3(x=x, data_format=data_format, **attributes).y
    if rank == 3:
        # The axis that Conv1D adds around its own convolution, so that the pairs cancel.
        extra = 1 if axis == 2 else 2
        wide = tf.expand_dims(x, extra)
        return tf.squeeze(_emit(wide, 1 if axis == 1 else 3, attributes), [extra])
    if axis != rank - 1:
        forth = [i for i in range(rank) if i != axis] + [axis]
        back = [forth.index(i) for i in range(rank)]
        return tf.transpose(_emit(tf.transpose(x, forth), rank - 1, attributes), back)
    shape, channels = tf.shape(x), x.shape[-1]
    flat = [-1, 1, 1, channels] if rank == 2 else tf.stack([shape[0], 1, -1, channels])
    wide = tf.reshape(x, flat)
    wide.set_shape([x.shape[0], 1, 1 if rank == 2 else None, channels])
    return tf.reshape(_emit(wide, 3, attributes), [-1, channels] if rank == 2 else shape)


def _replace(graph: Any, node: Any, site: CallSite) -> None:
    """Puts the GroupNorm node, channels first, in the place of one carrier."""
    x, gamma, beta = node.input[:3]
    y, dtype = node.output[0], graph.get_dtype(x)
    channels_first = node.data_format in ("NCHW", "NCDHW")
    wrapper, unwrapper = node.inputs[0], graph.find_output_consumers(y)
    graph.remove_node(node.name)
    if _WRAPPERS.get(site.rank) == (wrapper.type, [c.type for c in unwrapper]):
        # The axes that only the carrier needed go.
        x, y = wrapper.input[0], unwrapper[0].output[0]
        graph.remove_node(unwrapper[0].name)
    rank = site.rank if site.rank in _WRAPPERS else len(node.data_format)
    shape = list(graph.get_shape(x) or [-1] * rank)
    shape[1 if channels_first else -1] = site.channels
    forth = list(range(rank)) if channels_first else [0, rank - 1, *range(1, rank - 1)]
    back = [forth.index(i) for i in range(rank)]
    channels_first = forth == back == sorted(forth)
    inner_shape = [shape[i] for i in forth]
    if not channels_first:
        x = graph.make_node(
            "Transpose", [x], attr={"perm": forth}, shapes=[inner_shape], dtypes=[dtype]
        ).output[0]
    inner = graph.make_node(
        OP_TYPE,
        [x, gamma, beta],
        attr={
            "groups": site.groups,
            "channels": site.channels,
            "epsilon": site.epsilon,
            "path": site.path,
            # Axes that aren't fixed are −1.
            "shape": [-1 if d is None else int(d) for d in inner_shape],
        },
        outputs=[y] if channels_first else None,
        shapes=[inner_shape],
        dtypes=[dtype],
        domain=DOMAIN,
    )
    if not channels_first:
        graph.make_node(
            "Transpose",
            [inner.output[0]],
            attr={"perm": back},
            outputs=[y],
            shapes=[shape],
            dtypes=[dtype],
        )
