"""Where OpenCV's `dnn` module fails, with its default engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from layerswap.onnx_graph.facts import (
    Fact,
    Found,
    any_dtype,
    computed,
    constant,
    gives,
    interface,
    made_by,
    number,
    numbers,
    operators,
    rank,
    same_padding,
    text,
)
from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.padding import skips_last_window, splits_unevenly
from layerswap.onnx_graph.reductions import REDUCTIONS, skips_elements
from layerswap.onnx_graph.resizing import asks_for_more_than_scale, rounds_size
from layerswap.onnx_graph.views import GraphView, Place

_MEASURED = "measured with opencv 5.0.0"

UNKNOWN = (
    *("Bernoulli", "BitCast", "CausalConvWithState", "Col2Im", "Compress", "ConcatFromSequence"),
    *("ConvInteger", "CumProd", "DeformConv", "DynamicQuantizeLinear", "GlobalLpPool"),
    *("ImageDecoder", "LinearAttention", "LpPool", "MatMulInteger", "MaxRoiPool"),
    *("MeanVarianceNormalization", "MelWeightMatrix", "Multinomial", "Optional"),
    *("OptionalGetElement", "OptionalHasElement", "RNN", "RandomNormal", "RandomUniform"),
    *("RandomUniformLike", "RegexFullMatch", "ReverseSequence", "STFT", "Scan", "SequenceAt"),
    *("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert"),
    *("SequenceLength", "SequenceMap", "SplitToSequence", "StringConcat", "StringNormalizer"),
    *("StringSplit", "SwiGLU", "TensorScatter", "TfIdfVectorizer"),
)
UNKNOWN_ML = (
    *("ArrayFeatureExtractor", "Binarizer", "CastMap", "CategoryMapper", "DictVectorizer"),
    *("FeatureVectorizer", "Imputer", "LabelEncoder", "LinearClassifier", "LinearRegressor"),
    *("Normalizer", "OneHotEncoder", "SVMClassifier", "SVMRegressor", "Scaler"),
    *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "ZipMap"),
)
_REFUSED_FLOAT64 = (
    *("Conv", "ConvTranspose", "BatchNormalization", "MatMul", "Gemm", "GRU", "Softmax"),
    *("LogSoftmax", "Hardmax", "AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"),
)
_WRONG_FLOAT64 = (
    *("InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
    *("LRN", "LpNormalization", "LSTM"),
)
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def _is_text(kind: onnx.TypeProto) -> bool:
    return kind.tensor_type.elem_type == onnx.TensorProto.STRING


def _fields_of_truth(view: GraphView) -> Found:
    """Boolean constants whose values aren't raw bytes."""
    for where, tensor in view.tensors:
        if tensor.data_type == onnx.TensorProto.BOOL and tensor.int32_data:
            yield where, f"is a boolean constant '{tensor.name}' that isn't stored as raw bytes"


def _is_flat_groupnorm(place: Place) -> bool:
    """Whether Mul and Add behind a decomposed GroupNormalization get what has no spatial axes."""
    for product in _behind(place, "Mul"):
        for restored in _behind(product, "Reshape"):
            if rank(product, list(product.node.input).index(restored.node.output[0])) == 2:
                return made_by(restored, 0, "InstanceNormalization") is not None
    return False


def _behind(place: Place, op_type: str) -> Iterator[Place]:
    """The operator of a kind that one input comes from, where the other is a constant."""
    for index, other in ((0, 1), (1, 0)):
        maker = made_by(place, index, op_type)
        if maker is not None and constant(place, other):
            yield maker


def _is_celu(place: Place) -> bool:
    return any(made_by(activation, 0, "Div") is not None for activation in _behind(place, "Elu"))


def _has_no_scan_output(place: Place) -> bool:
    return len(place.node.output) <= len(place.node.input) - 2


def _is_reversed(place: Place) -> bool:
    return text(place, "direction") == "reverse"


FACTS: tuple[Fact, ...] = (
    Fact(
        "operator-unknown",
        operators(*UNKNOWN),
        "OpenCV doesn't have it, and refuses the file",
        "Export it as other operators, or do this step outside the file.",
        _MEASURED,
    ),
    Fact(
        "machine-learning-operator",
        operators(*UNKNOWN_ML, domains=("ai.onnx.ml",)),
        "OpenCV doesn't have it, and refuses the file",
        "Run this file in ONNX Runtime.",
        _MEASURED,
    ),
    Fact(
        "training-operator",
        operators(domains=("ai.onnx.preview.training", "ai.onnx.preview")),
        "OpenCV doesn't have it, and refuses the file",
        "Export the model for inference.",
        _MEASURED,
    ),
    Fact(
        "text",
        interface(_is_text),
        "OpenCV has no text, and refuses the file",
        "Turn text into numbers outside the file.",
        _MEASURED,
    ),
    Fact(
        "boolean-field",
        _fields_of_truth,
        "OpenCV reads beyond it and takes the process down",
        "Store it as raw bytes: onnx.numpy_helper.from_array does.",
        _MEASURED,
    ),
    Fact(
        "float64-refused",
        operators(*_REFUSED_FLOAT64, when=any_dtype("float64")),
        "OpenCV doesn't have it in float64, and fails when it is run",
        "Export it in float32.",
        _MEASURED,
    ),
    Fact(
        "float64-misread",
        operators(*_WRONG_FLOAT64, when=any_dtype("float64")),
        "OpenCV takes float64 for float32 here: wrong numbers or NaN, silently",
        "Export it in float32.",
        _MEASURED,
    ),
    Fact(
        "bfloat16",
        operators("Cast", when=lambda place: number(place, "to") == onnx.TensorProto.BFLOAT16),
        "OpenCV's bfloat16 is wrong by orders of magnitude as soon as it is read, silently",
        "Export it in float32 or float16.",
        _MEASURED,
    ),
    Fact(
        "groupnorm-of-rank-2",
        operators("GroupNormalization", when=lambda place: rank(place) == 2),
        "OpenCV has no GroupNormalization without spatial axes, and fails when it is run",
        "Export it with --groupnorm portable.",
        _MEASURED,
    ),
    Fact(
        "flat-groupnorm-with-affine",
        operators("Add", when=_is_flat_groupnorm),
        "OpenCV puts it, the Mul and the InstanceNormalization before it together into a "
        "GroupNormalization, which it doesn't have without spatial axes, and fails when it is run",
        "Export it with --groupnorm portable: a BatchNormalization operator as γ and β.",
        _MEASURED,
    ),
    Fact(
        "reduction-over-three-axes",
        operators(*REDUCTIONS, when=skips_elements),
        "OpenCV leaves elements out where three axes or more are reduced and they aren't the "
        "last ones: wrong numbers, silently",
        "Reduce over two axes at a time, or Reshape before it. A GroupNormalization as stock "
        "tf2onnx writes it has this: export it with layerswap.",
        _MEASURED,
    ),
    Fact(
        "same-padding",
        operators("Conv", "MaxPool", "AveragePool", when=splits_unevenly),
        "OpenCV splits the padding of auto_pad SAME as if stride were 1 and the rest belonged "
        "behind: wrong numbers, silently, with the size of this input or, where that is open, "
        "with some sizes",
        "Export it with explicit pads: fix the input's size, --input-shape.",
        _MEASURED,
    ),
    Fact(
        "transposed-convolution-same",
        operators(
            "ConvTranspose",
            when=lambda place: (
                bool(same_padding(place))
                and attribute(place.node, "output_shape") is None
                and any(step > 1 for step in numbers(place, "strides"))
            ),
        ),
        "OpenCV's output has another size than input times stride, which ONNX defines for "
        "auto_pad SAME",
        "Export it with explicit pads.",
        _MEASURED,
    ),
    Fact(
        "pool-window-in-padding",
        operators("MaxPool", "AveragePool", when=skips_last_window),
        "OpenCV keeps the last window, which starts in the padding: its output is larger than "
        "ONNX defines",
        "Export it with ceil_mode 0 and the padding that it needs.",
        _MEASURED,
    ),
    Fact(
        "computed-slope",
        operators("PRelu", when=lambda place: computed(place, 1)),
        "OpenCV wants the slope as a constant, and refuses the file",
        "Export it as Max and Min with Mul and Add.",
        _MEASURED,
    ),
    Fact(
        "vector-product",
        operators("MatMul", when=lambda place: 1 in (rank(place, 0), rank(place, 1))),
        "OpenCV multiplies no vectors, and fails when it is run",
        "Unsqueeze before it and Squeeze behind it.",
        _MEASURED,
    ),
    Fact(
        "integer-activation",
        operators("Relu", "Abs", "Sign", when=any_dtype(*_INTEGERS)),
        "OpenCV has it for floating point numbers alone, and fails when it is run",
        "Cast to float32 before it and back behind it.",
        _MEASURED,
    ),
    Fact(
        "integer-product",
        operators("MatMul", when=any_dtype("int32", "int64", "uint32", "uint64")),
        "OpenCV has it for floating point numbers alone, and fails when it is run",
        "Cast to float32 before it and back behind it.",
        _MEASURED,
    ),
    Fact(
        "sequence-of-gru",
        operators("GRU", when=lambda place: gives(place, 0) and not gives(place, 1)),
        "OpenCV gives the last step alone where Y is the only output: wrong shape",
        "Export it as LSTM or as primitive operators.",
        _MEASURED,
    ),
    Fact(
        "reversed-recurrent",
        operators("LSTM", "GRU", when=_is_reversed),
        "OpenCV runs it forward, or gives the wrong last state: wrong numbers, silently",
        "Reverse the sequence by Slice, and run it forward.",
        _MEASURED,
    ),
    Fact(
        "batch-major-recurrent",
        operators("LSTM", "GRU", when=lambda place: number(place, "layout") == 1),
        "OpenCV takes the batch for the time: wrong numbers or shape, silently",
        "Export it with layout 0, and Transpose around it.",
        _MEASURED,
    ),
    Fact(
        "lstm-peepholes",
        operators("LSTM", when=lambda place: bool(place.input(7))),
        "OpenCV fails when it is run, since initial states that aren't given are empty to it",
        "Give the initial states as zeros.",
        _MEASURED,
    ),
    Fact(
        "loop-without-scan-output",
        operators("Loop", when=_has_no_scan_output),
        "OpenCV refuses loops that give nothing but their last states",
        "Unroll the loop.",
        _MEASURED,
    ),
    Fact(
        "training-batchnorm",
        operators("BatchNormalization", when=lambda place: number(place, "training_mode") == 1),
        "OpenCV fails when it is run",
        "Export the model for inference.",
        _MEASURED,
    ),
    Fact(
        "celu-in-parts",
        operators("Mul", when=_is_celu),
        "OpenCV puts Div, Elu and Mul together, and takes the process down",
        "Export it as Celu.",
        _MEASURED,
    ),
    Fact(
        "swish-alpha",
        operators("Swish", when=lambda place: number(place, "alpha", 1) != 1),
        "OpenCV leaves alpha out: wrong numbers, silently",
        "Export it as Mul and Sigmoid.",
        _MEASURED,
    ),
    Fact(
        "cubic-gridsample",
        operators("GridSample", when=lambda place: text(place, "mode") in ("cubic", "bicubic")),
        "OpenCV's numbers differ from those of ONNX's definition",
        "Export it with the mode linear.",
        _MEASURED,
    ),
    Fact(
        "resize-option",
        operators("Resize", when=asks_for_more_than_scale),
        "OpenCV doesn't know one of antialias, axes, keep_aspect_ratio_policy and the "
        "coordinate transformations half_pixel_symmetric and tf_crop_and_resize: it refuses "
        "the file, or gives wrong numbers silently",
        "Export it with the scales or sizes of all axes, without these.",
        _MEASURED,
    ),
    Fact(
        "resize-scale",
        operators("Resize", when=rounds_size),
        "OpenCV takes the ratio of the sizes for the scale, which isn't the same here: wrong "
        "numbers, silently",
        "Export it with sizes instead of scales, or with scales that give whole sizes.",
        _MEASURED,
    ),
)
