"""Where OpenVINO fails, on the CPU."""

from __future__ import annotations

import numpy as np
import onnx

from layerswap.onnx_graph.facts import (
    Fact,
    array,
    dtype,
    interface,
    is_open,
    number,
    operators,
    rank,
    text,
)
from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.padding import outgrows_stride, skips_last_window
from layerswap.onnx_graph.views import Place

_MEASURED = "measured with openvino 2026.4.1"
_INT32 = np.iinfo(np.int32)

UNCONVERTED = (
    *("Bernoulli", "BitCast", "CausalConvWithState", "CumProd", "DeformConv", "Det"),
    *("ImageDecoder", "LinearAttention", "MaxUnpool", "MelWeightMatrix", "Optional"),
    *("OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceMap"),
    *("StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TensorScatter"),
    "TfIdfVectorizer",
)
UNCONVERTED_ML = (
    *("ArrayFeatureExtractor", "Binarizer", "CastMap", "CategoryMapper", "DictVectorizer"),
    *("FeatureVectorizer", "Imputer", "LabelEncoder", "LinearClassifier", "LinearRegressor"),
    *("OneHotEncoder", "SVMClassifier", "SVMRegressor", "Scaler", "TreeEnsemble", "ZipMap"),
    *("TreeEnsembleClassifier", "TreeEnsembleRegressor"),
)


def _is_no_tensor(kind: onnx.TypeProto) -> bool:
    return kind.WhichOneof("value") in ("sequence_type", "optional_type")


def _is_training(place: Place) -> bool:
    mode = array(place, 2)
    return mode is not None and bool(np.any(mode))


def _has_long_integers(place: Place) -> bool:
    values = [array(place, index) for index in range(len(place.node.input))]
    integers = [v for v in values if v is not None and v.dtype.kind in "iu" and v.size]
    return any(int(v.min()) < _INT32.min or int(v.max()) > _INT32.max for v in integers)


FACTS: tuple[Fact, ...] = (
    Fact(
        "operator-unknown",
        operators(*UNCONVERTED),
        "OpenVINO has no rule to convert it, and refuses the file",
        "Export it as other operators, or do this step outside the file.",
        _MEASURED,
    ),
    Fact(
        "machine-learning-operator",
        operators(*UNCONVERTED_ML, domains=("ai.onnx.ml",)),
        "OpenVINO has no rule to convert it, and refuses the file",
        "Run this file in ONNX Runtime.",
        _MEASURED,
    ),
    Fact(
        "training-operator",
        operators(domains=("ai.onnx.preview.training", "ai.onnx.preview")),
        "OpenVINO has no rule to convert it, and refuses the file",
        "Export the model for inference.",
        _MEASURED,
    ),
    Fact(
        "not-a-tensor",
        interface(_is_no_tensor),
        "OpenVINO takes and gives tensors alone, and refuses the file or can't run it",
        "Give each element an input or output of its own, or stack them.",
        f"https://github.com/openvinotoolkit/openvino/issues/32477; {_MEASURED}",
    ),
    Fact(
        "open-groupnorm-of-rank-2",
        operators("GroupNormalization", when=lambda place: rank(place) == 2 and is_open(place)),
        "OpenVINO has no GroupNormalization without spatial axes, unless all sizes are fixed, and "
        "refuses the file",
        "Export it with --groupnorm portable.",
        _MEASURED,
    ),
    Fact(
        "dropout-in-training",
        operators("Dropout", when=_is_training),
        "OpenVINO knows Dropout at inference alone, and refuses the file",
        "Export the model for inference.",
        _MEASURED,
    ),
    Fact(
        "gridsample-of-volumes",
        operators("GridSample", when=lambda place: rank(place) == 5),
        "OpenVINO samples images alone (4 axes), and refuses the file",
        "Sample by Gather, or in another runtime.",
        _MEASURED,
    ),
    Fact(
        "pad-wrap",
        operators("Pad", when=lambda place: text(place, "mode") == "wrap"),
        "OpenVINO doesn't have this mode of padding, and refuses the file",
        "Concat the slices that the padding repeats.",
        _MEASURED,
    ),
    Fact(
        "resize-coordinates",
        operators(
            "Resize",
            when=lambda place: (
                text(place, "coordinate_transformation_mode")
                in ("half_pixel_symmetric", "tf_crop_and_resize")
            ),
        ),
        "OpenVINO doesn't have its coordinate transformation, and refuses the file",
        "Export it with half_pixel, asymmetric or align_corners.",
        _MEASURED,
    ),
    Fact(
        "resize-antialias",
        operators("Resize", when=lambda place: number(place, "antialias") == 1),
        "OpenVINO's numbers differ from those of ONNX's definition where it makes smaller",
        "Export it without antialias.",
        _MEASURED,
    ),
    Fact(
        "lstm-peepholes",
        operators("LSTM", when=lambda place: bool(place.input(7))),
        "OpenVINO leaves the peepholes out, silently: wrong numbers",
        "Export the loop over time as Scan or Loop.",
        _MEASURED,
    ),
    Fact(
        "roialign-maximum",
        operators("RoiAlign", when=lambda place: text(place, "mode") == "max"),
        "OpenVINO takes the maximum in another way than ONNX defines: wrong numbers",
        "Export it with the mode avg.",
        _MEASURED,
    ),
    Fact(
        "transposed-convolution-same",
        operators("ConvTranspose", when=lambda place: is_open(place) and outgrows_stride(place)),
        "unless all sizes are fixed, OpenVINO's output is larger than input times stride, which "
        "ONNX defines for auto_pad SAME",
        "Export it with explicit pads, or fix the input's shape: --input-shape.",
        _MEASURED,
    ),
    Fact(
        "pool-window-in-padding",
        operators("MaxPool", when=skips_last_window),
        "OpenVINO keeps the last window, which starts in the padding: its output is larger than "
        "ONNX defines",
        "Export it with ceil_mode 0 and the padding that it needs.",
        _MEASURED,
    ),
    Fact(
        "ignore-index",
        operators(
            "NegativeLogLikelihoodLoss",
            when=lambda place: attribute(place.node, "ignore_index") is not None,
        ),
        "OpenVINO doesn't know ignore_index, and refuses the file",
        "Export the model for inference, without its loss.",
        _MEASURED,
    ),
    Fact(
        "long-integers",
        operators("Add", "Sub", "Mul", "Max", when=_has_long_integers),
        "OpenVINO computes integers in 32 bits on the CPU, and this constant needs more: wrong "
        "numbers, silently",
        "Keep integers below 2^31, or compute in float32.",
        _MEASURED,
    ),
    Fact(
        "small-integer-division",
        operators("Div", when=lambda place: dtype(place) in ("int8", "uint8") and is_open(place)),
        "unless all sizes are fixed, OpenVINO rounds the quotient of 8-bit integers to the "
        "nearest, where ONNX cuts it off: wrong numbers, silently",
        "Cast to int32 before it.",
        _MEASURED,
    ),
)
