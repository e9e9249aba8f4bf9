"""What tf2onnx 1.17 leaves slow or outside of the standard, put right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from layerswap.onnx_graph import graphs
from layerswap.records import Array

_ARITHMETIC = frozenset(("Add", "Div", "Mul", "Sub"))
# Those whose axes are an input, at opset 13 or 18.
_REDUCTIONS = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"))


def repair(light: onnx.ModelProto, constants: dict[str, Array]) -> None:
    """Applies every repair to the main graph.

    Args:
        light: a graph without initializers; changed in place.
        constants: value of each initializer; extended.
    """
    producers = {name: node for node in light.graph.node for name in node.output}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in light.graph.input}
    uses = graphs.use_counts(light.graph)
    for node in reversed(light.graph.node):  # of two Transposes that cancel, the second finds it
        if node.op_type == "Transpose" and uses[node.output[0]]:
            _transpose_first(node, producers, ranks, uses, constants)
    for node in light.graph.node:
        if node.op_type in _REDUCTIONS and node.input[0] in producers:
            _reduce_in_place(node, producers[node.input[0]], constants)
        elif node.op_type == "Resize":
            _legal_resize(node, constants)
            _whole_sizes(node, constants)


def _transpose_first(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    ranks: Mapping[str, int],
    uses: Counter[str],
    constants: dict[str, Array],
) -> None:
    """Preprocessing works on whole planes of an image, not on its three channels at a time.

    input → arithmetic with constants → Transpose  ⇒  input → Transpose → the same arithmetic

    Two Transposes with arithmetic between them that cancel go in the same way.
    """
    permutation: list[int] | None = graphs.attribute(node, "perm")
    chain: list[onnx.NodeProto] = []
    x = node.input[0]
    while (maker := producers.get(x)) is not None and maker.op_type != "Transpose":
        others = [name for name in maker.input if name not in constants]
        widest = max((constants[n].ndim for n in maker.input if n in constants), default=0)
        fits = len(others) == 1 and widest <= len(permutation or ())
        if maker.op_type not in _ARITHMETIC or uses[x] != 1 or not fits:
            return
        chain.insert(0, maker)
        x = others[0]
    if not chain or permutation is None:
        return
    # Each node takes the place of the one behind it, so that the order stays right.
    steps = [helper.make_node("Transpose", [x], [f"{node.output[0]}/0"], perm=permutation)]
    value = steps[0].output[0]
    if maker is not None:
        first = graphs.attribute(maker, "perm")
        if not first or [first[axis] for axis in permutation] != sorted(permutation):
            return
        # Neither Transpose is read any more; canonical drops what is dead.
        value = maker.input[0]
        uses[maker.output[0]] = 0
    elif ranks.get(x) != len(permutation):
        return
    for number, old in enumerate(chain, 1):
        inputs = [
            _transposed(name, permutation, constants) if name in constants else value
            for name in old.input
        ]
        value = f"{node.output[0]}/{number}"
        steps.append(helper.make_node(old.op_type, inputs, [value]))
    steps[-1].output[0] = node.output[0]
    for place, step in zip((*chain, node), steps, strict=True):
        place.CopyFrom(step)


def _transposed(name: str, permutation: list[int], constants: dict[str, Array]) -> str:
    """Name of a constant as it broadcasts behind the Transpose."""
    value = constants[name]
    full = value.reshape([1] * (len(permutation) - value.ndim) + list(value.shape))
    turned = f"{name}/{''.join(map(str, permutation))}"
    constants[turned] = full.transpose(permutation)
    return turned


def _reduce_in_place(
    node: onnx.NodeProto, before: onnx.NodeProto, constants: dict[str, Array]
) -> None:
    """A reduction reads what lies before a Transpose: pooling needs no copy of its input.

    Transpose → ReduceMean(axes)  ⇒  ReduceMean(the same axes, as they were before)
    """
    permutation = graphs.attribute(before, "perm")
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    if before.op_type != "Transpose" or not isinstance(permutation, list) or axes is None:
        return
    moved = [permutation[axis] for axis in axes.tolist()]
    rest = [axis for axis in permutation if axis not in moved]
    if not moved or graphs.attribute(node, "keepdims", 1) != 0 or rest != sorted(rest):
        return
    name = f"{node.output[0]}/axes"
    constants[name] = np.array(sorted(moved), np.int64)
    graphs.replace_all(node.input, [before.input[0], name])


def _legal_resize(node: onnx.NodeProto, constants: dict[str, Array]) -> None:
    """`tf_half_pixel_for_nn` left the standard with opset 13; runtimes warn or refuse.

    It takes the pixel at ⌊(i + ½)/s⌋. That is ⌊i/s⌋ where the scale s is a whole number, the
    form that every runtime has, and otherwise (i + ½)/s − ½ rounded to nearest, ties up.
    """
    if graphs.attribute(node, "coordinate_transformation_mode") != b"tf_half_pixel_for_nn":
        return
    scales = constants.get(node.input[2]) if len(node.input) > 2 else None
    whole = scales is not None and scales.size > 0 and bool((scales == np.round(scales)).all())
    mode, rounding = ("asymmetric", "floor") if whole else ("half_pixel", "round_prefer_ceil")
    changed = {"coordinate_transformation_mode": mode, "nearest_mode": rounding}
    kept = [a for a in node.attribute if a.name not in changed]
    graphs.replace_all(
        node.attribute, [*kept, *(helper.make_attribute(k, v) for k, v in changed.items())]
    )


def _whole_sizes(node: onnx.NodeProto, constants: dict[str, Array]) -> None:
    """A size is ⌊size · scale⌋, and rounding of the scale must not make it one less.

    6 · float32(7 / 6) is 6.9999998. The next larger scale is at least 7 / 6. Not for the nearest
    pixel, which it would change where two are equally near.
    """
    scales = constants.get(node.input[2]) if len(node.input) > 2 else None
    nearest = graphs.attribute(node, "mode", b"nearest") == b"nearest"
    if scales is None or nearest or (scales == np.round(scales)).all():
        return
    name = f"{node.output[0]}/scales"
    larger = np.nextafter(scales, np.float32(np.inf))
    constants[name] = np.where(scales == np.round(scales), scales, larger)
    node.input[2] = name
