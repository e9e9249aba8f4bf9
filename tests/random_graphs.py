"""Graphs that nobody made on purpose, for tests with Hypothesis."""

import onnx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from layerswap import catalog

CODES = {rule.code for rule in catalog.RULES}
OPERATORS = (
    *("Add", "BatchNormalization", "Cast", "Concat", "Constant", "Conv", "Div", "Expand", "Gemm"),
    *("GroupNormalization", "Identity", "If", "InstanceNormalization", "LayerNormalization"),
    *("Loop", "MatMul", "MeanVarianceNormalization", "Mul", "Pow", "Reciprocal", "ReduceMean"),
    *("Relu", "Reshape", "Scan", "Sqrt", "Squeeze", "Sub", "Transpose", "Mystery"),
)
NAMES = st.sampled_from(["", "x", "y", "a", "b", "c", "w", "s"])
NUMBERS = st.integers(-3, 5)
LIMITS = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def tensors(draw, name=None):
    dims = draw(st.lists(st.integers(-1, 4), max_size=3))
    kind = draw(st.sampled_from([*TensorProto.DataType.values(), 99]))
    tensor = TensorProto(name=name or draw(NAMES), data_type=kind, dims=dims)
    how = draw(st.sampled_from(["raw", "floats", "ints", "outside", "none"]))
    if how == "raw":
        tensor.raw_data = draw(st.binary(max_size=64))
    elif how == "floats":
        tensor.float_data.extend(draw(st.lists(st.floats(width=32), max_size=8)))
    elif how == "ints":
        tensor.int64_data.extend(draw(st.lists(NUMBERS, max_size=8)))
    elif how == "outside":
        tensor.data_location = TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            value = draw(st.sampled_from(["", "w.bin", "../w.bin", "0", "64", "-1", "1e9"]))
            tensor.external_data.add(key=key, value=value)
    return tensor


@st.composite
def attributes(draw, depth):
    names = ["axes", "axis", "epsilon", "num_groups", "to", "training_mode", "value", "body"]
    name = draw(st.sampled_from(names))
    kinds = [NUMBERS, st.floats(width=32), st.lists(NUMBERS, min_size=1, max_size=3), tensors()]
    if depth:
        kinds.append(graphs(depth - 1))
    return helper.make_attribute(name, draw(st.one_of(kinds)))


@st.composite
def nodes(draw, depth):
    node = helper.make_node(
        draw(st.sampled_from(OPERATORS)),
        draw(st.lists(NAMES, max_size=5)),
        draw(st.lists(NAMES, max_size=2)),
        domain=draw(st.sampled_from(["", "", "", "ai.onnx", "mine", "com.microsoft"])),
    )
    node.attribute.extend(draw(st.lists(attributes(depth), max_size=2)))
    return node


@st.composite
def graphs(draw, depth=2):
    graph = onnx.GraphProto(name=draw(NAMES))
    graph.node.extend(draw(st.lists(nodes(depth), max_size=6)))
    graph.initializer.extend(draw(st.lists(tensors(), max_size=3)))
    for values in (graph.input, graph.output, graph.value_info):
        for name in draw(st.lists(NAMES, max_size=2)):
            shape = draw(st.none() | st.lists(st.integers(-1, 4) | st.just("N"), max_size=4))
            kind = draw(st.integers(0, 17))
            values.append(helper.make_tensor_value_info(name, kind, shape))
    return graph


@st.composite
def models(draw):
    model = onnx.ModelProto(ir_version=draw(st.sampled_from([1, 3, 8, 10, 99])))
    model.graph.CopyFrom(draw(graphs()))
    for domain in draw(st.lists(st.sampled_from(["", "ai.onnx", "mine"]), max_size=3)):
        model.opset_import.add(domain=domain, version=draw(st.sampled_from([-1, 0, 7, 17, 99])))
    for _ in range(draw(st.integers(0, 2))):
        function = model.functions.add(domain="mine", name=draw(st.sampled_from(OPERATORS)))
        function.input.extend(draw(st.lists(NAMES, max_size=2)))
        function.output.extend(draw(st.lists(NAMES, max_size=2)))
        function.node.extend(draw(st.lists(nodes(1), max_size=3)))
    for key in draw(st.lists(st.sampled_from(["layerswap.model", "layerswap.groupnorms"]))):
        text = draw(st.sampled_from(["", "3", "[]", "[1]", '[{"groups": null, "epsilon": "x"}]']))
        model.metadata_props.add(key=key, value=text)
    return model
