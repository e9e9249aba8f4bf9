"""What two models take and give: names, types and shapes of their inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx

from layerswap.onnx_graph.flat import graph_inputs
from layerswap.records import Difference

Values = Sequence[onnx.ValueInfoProto]


def matched_names(first: Values, second: Values) -> dict[str, str]:
    """The second's name of each input or output of the first, as far as it has one.

    Equal names belong together; of the others, if as many are left on both sides, those in the
    same place.
    """
    ones, others = ([value.name for value in values] for values in (first, second))
    left = [[n for n in own if n not in ot] for own, ot in ((ones, others), (others, ones))]
    renamed = dict(zip(*left, strict=True)) if len(left[0]) == len(left[1]) else {}
    pairs = {name: name if name in others else renamed.get(name) for name in ones}
    return {one: other for one, other in pairs.items() if other is not None}


def interface_differences(
    one: onnx.ModelProto,
    other: onnx.ModelProto,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
) -> Iterator[Difference]:
    """Inputs and outputs that only one has, or that have another name, type, shape or place."""
    ends = (
        ("input", graph_inputs(one.graph), graph_inputs(other.graph), inputs),
        ("output", one.graph.output, other.graph.output, outputs),
    )
    texts = [_types(model) for model in (one, other)]
    for kind, first, second, pairs in ends:
        yield from _ends(kind, first, second, pairs, texts)


def _ends(
    kind: str, first: Values, second: Values, pairs: Mapping[str, str], texts: list[_Types]
) -> Iterator[Difference]:
    for value in first:
        if value.name not in pairs:
            yield Difference("LS903", value.name, f"{kind} {texts[0][value.name][0]} is removed")
    back = {other: one for one, other in pairs.items()}
    for value in second:
        if value.name not in back:
            yield Difference("LS902", value.name, f"{kind} {texts[1][value.name][0]} is added")
    for name, twin in pairs.items():
        if name != twin:
            yield Difference("LS905", name, f"name of the {kind}", name, twin)
        (before, plain), (after, plain_after) = texts[0][name], texts[1][twin]
        if plain != plain_after:
            yield Difference("LS905", name, f"type or shape of the {kind}", before, after)
    order = [v.name for v in first if v.name in pairs]
    order_after = [v.name for v in second if v.name in back]
    if [pairs[name] for name in order] != order_after:
        before, after = ", ".join(order), ", ".join(order_after)
        yield Difference("LS905", f"{kind}s", f"order of the {kind}s", before, after)


_Types = dict[str, tuple[str, str]]


def _types(model: onnx.ModelProto) -> _Types:
    """Type and shape of every input and output: for people, and without what axes are called.

    An open axis is the same under any name; which axes are of one size is what their names say.
    """
    values = {v.name: v for v in (*graph_inputs(model.graph), *model.graph.output)}
    used = Counter(
        axis.dim_param
        for value in values.values()
        for axis in value.type.tensor_type.shape.dim
        if axis.HasField("dim_param")
    )
    numbers: dict[str, str] = {}
    for axis_name, count in used.items():
        numbers[axis_name] = f"?{len(numbers)}" if count > 1 else "?"
    result = {}
    for name, value in values.items():
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            whole = value.type.SerializeToString(deterministic=True).hex()
            result[name] = (str(value.type.WhichOneof("value")), whole)
            continue
        kinds = onnx.TensorProto.DataType
        known = tensor.elem_type in kinds.values()
        dtype = kinds.Name(tensor.elem_type).lower() if known else str(tensor.elem_type)
        axes = [
            (str(a.dim_value),) * 2
            if a.HasField("dim_value")
            else (a.dim_param or "?", numbers.get(a.dim_param, "?"))
            for a in tensor.shape.dim
        ]
        own, plain = (
            f"{dtype}[{', '.join(a[i] for a in axes)}]"
            if tensor.HasField("shape")
            else f"{dtype}[…]"
            for i in (0, 1)
        )
        result[name] = (own, plain)
    return result
