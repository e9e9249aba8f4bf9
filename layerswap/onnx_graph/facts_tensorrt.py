"""Where TensorRT fails, by its documentation and issues: nothing of it is measured here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from layerswap.onnx_graph.facts import (
    Fact,
    array,
    computed,
    dtype,
    gives,
    interface,
    number,
    numbers,
    operators,
    opset,
    rank,
    shape,
    text,
)
from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.views import Place

_MATRIX = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, TensorRT 10.15"
_CHANGES = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md"
_PARSER = "https://github.com/onnx/onnx-tensorrt, TensorRT 10.1"
_OPSETS = "https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html"
_ISSUES = "https://github.com/NVIDIA/TensorRT/issues"
_LOWEST_OPSET, _HIGHEST_OPSET = 9, 25
_LARGEST_K = 3839

UNSUPPORTED = (
    *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),
    *("BitwiseXor", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger"),
    *("DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool"),
    *("MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional"),
    *("OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul"),
    *("RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
    *("SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss"),
    *("SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
    "Unique",
)
# Which input has to be a constant.
_CONSTANT_INPUTS: Mapping[str, int] = {"CumSum": 1, "OneHot": 1} | dict.fromkeys(
    [
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
        *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    ],
    1,
)
_COORDINATES = (
    *("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric"),
    "align_corners",
)
_NO_TYPES = ("INT16", "UINT16", "UINT32", "UINT64", "STRING", "COMPLEX64", "COMPLEX128")


def _has_no_type(kind: onnx.TypeProto) -> bool:
    element = kind.tensor_type.elem_type
    known = element in onnx.TensorProto.DataType.values()
    return known and onnx.TensorProto.DataType.Name(element) in _NO_TYPES


def _is_double(kind: onnx.TypeProto) -> bool:
    return kind.tensor_type.elem_type == onnx.TensorProto.DOUBLE


def _channels(place: Place) -> int | None:
    known = shape(place)
    return known[1] if known is not None and len(known) > 1 else None


def _is_one_group(place: Place) -> bool:
    return number(place, "num_groups") == 1 and _channels(place) != 1


def _has_scale_per_channel(place: Place) -> bool:
    return place.opset >= 21 and number(place, "num_groups") != _channels(place)


def _is_half_with_odd_groups(place: Place) -> bool:
    return dtype(place) == "float16" and number(place, "num_groups") % 8 != 0


def _is_dilated(place: Place) -> bool:
    return any(step != 1 for step in numbers(place, "dilations"))


def _is_training(place: Place) -> bool:
    mode = array(place, 2)
    return computed(place, 2) or (mode is not None and bool(np.any(mode)))


def _has_zero_point(place: Place) -> bool:
    value = array(place, 2)
    return value is not None and value.dtype.kind in "iu" and bool(np.any(value))


def _resizes_unknown(place: Place) -> bool:
    return (
        text(place, "coordinate_transformation_mode", "half_pixel") not in _COORDINATES
        or number(place, "antialias") == 1
        or text(place, "keep_aspect_ratio_policy", "stretch") != "stretch"
    )


def _selects_unknown(place: Place) -> bool:
    count = array(place, 1)
    too_many = count is not None and count.size == 1 and int(count.reshape(())) > _LARGEST_K
    return number(place, "sorted", 1) != 1 or too_many


def _attends_unknown(place: Place) -> bool:
    flat = any(rank(place, index) == 3 for index in range(3))
    return flat or any(place.input(index) for index in (4, 5, 6)) or gives(place, 1)


FACTS: tuple[Fact, ...] = (
    Fact(
        "opset-range",
        opset(lambda version: not _LOWEST_OPSET <= version <= _HIGHEST_OPSET),
        f"TensorRT 11 supports the opsets {_LOWEST_OPSET} to {_HIGHEST_OPSET}, 10.15 those to 24",
        "Export it again with an opset between them.",
        _OPSETS,
    ),
    Fact(
        "operator-unsupported",
        operators(*UNSUPPORTED),
        "TensorRT doesn't support it",
        "Export it as other operators, or write a plugin.",
        _MATRIX,
    ),
    Fact(
        "type-unsupported",
        interface(_has_no_type),
        "TensorRT doesn't support the type",
        "Cast outside the file: to int32, int64 or float32.",
        _MATRIX,
    ),
    Fact(
        "double-narrowed",
        interface(_is_double),
        "TensorRT computes it in float32, and clamps what float32 can't hold",
        "Export it in float32.",
        _MATRIX,
    ),
    Fact(
        "groupnorm-of-one-group",
        operators("GroupNormalization", when=_is_one_group),
        "TensorRT 10.16 normalises each channel by itself instead of all of them together: wrong "
        "numbers, silently",
        "Export it with --groupnorm portable.",
        f"{_ISSUES}/4756",
    ),
    Fact(
        "groupnorm-of-opset-21",
        operators("GroupNormalization", when=_has_scale_per_channel),
        "TensorRT up to 10.8 wants a scale for each group and refuses one for each channel",
        "Export it with --groupnorm portable, or use TensorRT 10.9 or newer.",
        f"{_ISSUES}/4336; {_CHANGES}",
    ),
    Fact(
        "groupnorm-of-rank-2",
        operators("GroupNormalization", when=lambda place: rank(place) == 2),
        "TensorRT wants three axes at least",
        "Export it with --groupnorm portable.",
        f"{_PARSER}, importerUtils.cpp",
    ),
    Fact(
        "groupnorm-in-float16",
        operators("GroupNormalization", when=_is_half_with_odd_groups),
        "TensorRT 10.1 fails to build it in float16 where the groups aren't a multiple of 8",
        "Keep GroupNormalization in float32, as layerswap export --fp16 does.",
        f"{_ISSUES}/3956",
    ),
    Fact(
        "training-batchnorm",
        operators("BatchNormalization", when=lambda place: number(place, "training_mode") == 1),
        "TensorRT doesn't support training_mode",
        "Export the model for inference.",
        f"{_PARSER}, onnxOpCheckers.cpp",
    ),
    Fact(
        "training-dropout",
        operators("Dropout", when=_is_training),
        "TensorRT supports it only where training_mode is a constant false",
        "Export the model for inference.",
        _MATRIX,
    ),
    Fact(
        "instancenorm-inputs",
        operators(
            "InstanceNormalization",
            when=lambda place: (
                computed(place, 1) or computed(place, 2) or (rank(place) or 3) not in (3, 4, 5)
            ),
        ),
        "TensorRT 8 wants its scale and shift as constants, and 3 to 5 axes",
        "Fold scale and shift into constants, or use TensorRT 10 or newer.",
        "https://github.com/onnx/onnx-tensorrt/blob/8.5-GA/docs/operators.md",
    ),
    Fact(
        "layernorm-outputs",
        operators("LayerNormalization", when=lambda place: gives(place, 1) or gives(place, 2)),
        "TensorRT gives the first output alone",
        "Export the model for inference.",
        _MATRIX,
    ),
    Fact(
        "pool-indices",
        operators("MaxPool", when=lambda place: gives(place, 1)),
        "TensorRT doesn't give the indices of a MaxPool",
        "Find the maxima by ArgMax on patches.",
        _MATRIX,
    ),
    Fact(
        "dilated-pool",
        operators("MaxPool", "AveragePool", "LpPool", when=_is_dilated),
        "TensorRT's pooling has no dilations",
        "Slice by the dilation before pooling.",
        _MATRIX,
    ),
    Fact(
        "gridsample-of-volumes",
        operators("GridSample", when=lambda place: rank(place) not in (None, 4)),
        "TensorRT samples images alone (4 axes)",
        "Sample by Gather.",
        _MATRIX,
    ),
    Fact(
        "input-must-be-constant",
        operators(
            *_CONSTANT_INPUTS,
            when=lambda place: computed(place, _CONSTANT_INPUTS[place.node.op_type]),
        ),
        "TensorRT wants its axes, axis or depth as a constant",
        "Export them as constants; constant folding may find them.",
        _MATRIX,
    ),
    Fact(
        "resize-option",
        operators("Resize", when=_resizes_unknown),
        "TensorRT doesn't support its coordinate transformation, antialias or aspect ratio policy",
        "Export it with half_pixel, asymmetric or align_corners, without the others.",
        _MATRIX,
    ),
    Fact(
        "scatter-reduction",
        operators("ScatterND", when=lambda place: text(place, "reduction", "none") != "none"),
        "TensorRT scatters without reduction alone",
        "Add the scattered values to the data.",
        _MATRIX,
    ),
    Fact(
        "topk-option",
        operators("TopK", when=_selects_unknown),
        f"TensorRT gives them sorted, and at most {_LARGEST_K}",
        "Ask for sorted values, and fewer.",
        _MATRIX,
    ),
    Fact(
        "lstm-option",
        operators(
            "LSTM",
            when=lambda place: number(place, "input_forget") != 0 or number(place, "layout") != 0,
        ),
        "TensorRT supports neither input_forget nor layout 1",
        "Export it with layout 0, and Transpose around it.",
        _MATRIX,
    ),
    Fact(
        "zero-point",
        operators("QuantizeLinear", "DequantizeLinear", when=_has_zero_point),
        "TensorRT wants zero points of zero",
        "Quantize symmetrically.",
        _MATRIX,
    ),
    Fact(
        "constant-of-text",
        operators(
            "Constant",
            when=lambda place: any(
                attribute(place.node, name) is not None
                for name in ("sparse_value", "value_string", "value_strings")
            ),
        ),
        "TensorRT has neither sparse nor text constants",
        "Turn text into numbers outside the file.",
        _MATRIX,
    ),
    Fact(
        "attention-form",
        operators("Attention", when=_attends_unknown),
        "TensorRT wants 4 axes, no past and the first output alone",
        "Export attention as MatMul and Softmax.",
        _MATRIX,
    ),
)
