"""Where ONNX Runtime fails: its CPU provider, which is what runs where nothing else does."""

from __future__ import annotations

from collections.abc import Mapping

from layerswap.onnx_graph.facts import Fact, any_dtype, dtype, number, operators, opset
from layerswap.onnx_graph.views import Place

_MEASURED = "measured with onnxruntime 1.32.0"
_NEWEST_OPSET = 28
_OPSETS = "https://onnxruntime.ai/docs/reference/compatibility.html"

# From which opset on an operator, as it is defined there, has no kernel.
_WITHOUT_KERNEL: Mapping[str, int] = {
    "Bernoulli": 22,
    "DequantizeLinear": 28,
    "ImageDecoder": 20,
    "Optional": 28,
    "OptionalGetElement": 28,
    "OptionalHasElement": 28,
    "QuantizeLinear": 28,
    "RandomNormal": 22,
    "RandomNormalLike": 22,
    "RandomUniform": 22,
    "RandomUniformLike": 22,
    "RoiAlign": 22,
    "SwiGLU": 28,
    "Swish": 25,
}
# Before opset 7 these broadcast by an attribute.
_OLD = ("Add", "Sub", "Mul", "Div", "Gemm", "PRelu", "BatchNormalization")
_NO_FLOAT64 = (
    *("Conv", "ConvTranspose", "InstanceNormalization", "LRN", "Resize", "RNN", "Mean"),
    *("AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    *("Erf", "Gelu", "Hardmax", "Tan", "Acos", "Asin", "Atan", "Cosh", "Sinh"),
    *("Acosh", "Asinh", "Atanh"),
)
_NO_BFLOAT16 = (
    *("Conv", "Gemm", "MatMul", "AveragePool", "GlobalAveragePool", "MaxPool"),
    *("BatchNormalization", "InstanceNormalization", "ReduceSum", "Softmax"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Abs", "Neg", "Sqrt"),
    *("Erf", "Exp", "Relu", "Sigmoid", "Tanh"),
)
_NO_INTEGERS: Mapping[str, tuple[str, ...]] = {
    "Max": ("int16", "uint16"),
    "Min": ("int16", "uint16"),
    "Relu": ("int16",),
    "ReduceMean": ("uint32", "uint64"),
    "ReduceSum": ("uint32", "uint64"),
}


def _is_new(place: Place) -> bool:
    return place.opset >= _WITHOUT_KERNEL[place.node.op_type]


def _is_batch_major(place: Place) -> bool:
    return number(place, "layout") == 1


FACTS: tuple[Fact, ...] = (
    Fact(
        "opset-too-new",
        opset(lambda version: version > _NEWEST_OPSET),
        f"ONNX Runtime 1.32 refuses files above {_NEWEST_OPSET}, older versions already below",
        "Export it again with a lower opset.",
        _MEASURED,
    ),
    Fact(
        "opset-too-old",
        operators(*_OLD, when=lambda place: 0 < place.opset < 7),
        "ONNX Runtime has no kernel for the operators from before opset 7, and refuses the file",
        "Export it again with opset 7 or above, or raise it with onnx's version converter.",
        f"{_OPSETS}; {_MEASURED}",
    ),
    Fact(
        "kernel-missing",
        operators(*_WITHOUT_KERNEL, when=_is_new),
        "the CPU provider has no kernel for it as this opset defines it, and refuses the file",
        "Export it again with a lower opset.",
        _MEASURED,
    ),
    Fact(
        "training-operator",
        operators(domains=("ai.onnx.preview.training", "ai.onnx.preview")),
        "ONNX Runtime doesn't know its domain, and refuses the file",
        "Export the model for inference.",
        _MEASURED,
    ),
    Fact(
        "float64-kernel-missing",
        operators(*_NO_FLOAT64, when=any_dtype("float64")),
        "the CPU provider has no kernel for it in float64, and refuses the file",
        "Export it in float32.",
        _MEASURED,
    ),
    Fact(
        "float64-recurrent",
        operators("LSTM", "GRU", when=any_dtype("float64")),
        "the CPU provider loads it in float64, and fails when it is run",
        "Export it in float32.",
        _MEASURED,
    ),
    Fact(
        "bfloat16-kernel-missing",
        operators(*_NO_BFLOAT16, when=any_dtype("bfloat16")),
        "the CPU provider has no kernel for it in bfloat16, and refuses the file",
        "Export it in float32 or float16.",
        _MEASURED,
    ),
    Fact(
        "integer-kernel-missing",
        operators(
            *_NO_INTEGERS, when=lambda place: dtype(place) in _NO_INTEGERS[place.node.op_type]
        ),
        "the CPU provider has no kernel for it in this integer type, and refuses the file",
        "Cast to int32 or int64 before it.",
        _MEASURED,
    ),
    Fact(
        "batch-major-recurrent",
        operators("LSTM", "GRU", "RNN", when=_is_batch_major),
        "the CPU provider has no layout 1 (the batch as first axis), and refuses the file",
        "Export it with layout 0, and Transpose around it.",
        _MEASURED,
    ),
)
