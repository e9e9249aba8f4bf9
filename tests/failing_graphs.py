"""Graphs that trip each known failure of a runtime, and graphs that come close and don't.

A graph is given in ONNX's text form, without its head. Where several operators share a fact, each
has a graph of its own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A graph that trips a fact, and one close to it that doesn't.

    `more` are further imports; `crashes` says that the runtime takes the process down; `operator`
    is False where the failure is one of the file's and not of an operator.
    """

    target: str
    fact: str
    trips: str
    near: str
    opset: int = 18
    near_opset: int = 0
    more: str = ""
    crashes: bool = False
    operator: bool = True


def head(opset, more=""):
    ir = 8 if opset < 21 else 10
    return f'<ir_version: {ir}, opset_import: ["" : {opset}{more}]>'


def graph(inputs, outputs, body, weights=""):
    return f"g ({inputs}) => ({outputs}) {weights} {{ {body} }}"


IMAGE, SEQUENCE = "2,4,6,6", "5,2,4"
VECTORS = ("s", "b", "m", "v")


def image(call, kind="float", out="a,b,c,d", extra="", out_kind=""):
    """A graph with one operator on images, whose further inputs are vectors of its channels."""
    used = [f"{kind}[4] {name}" for name in VECTORS if f", {name}" in call]
    inputs = ", ".join([f"{kind}[{IMAGE}] x", *used, *([extra] if extra else [])])
    return graph(inputs, f"{out_kind or kind}[{out}] y", f"y = {call}")


def through_bfloat16(call, inputs="x"):
    """A graph that computes in bfloat16 between float32 inputs and outputs."""
    given = ", ".join(f"float[{'3,4,3,3' if name == 'w' else IMAGE}] {name}0" for name in inputs)
    if "s" in call.split("(")[1]:
        given += ", float[4] s0"
        inputs += "s"
    casts = " ".join(f"{name} = Cast<to = 16>({name}0)" for name in inputs)
    return graph(given, "float[a,b,c,d] y", f"{casts} z = {call} y = Cast<to = 1>(z)")


def recurrent(op, kind="float", out="Y", more="", inputs="", shape=SEQUENCE, extra=""):
    """A graph with one recurrent operator of 4 features and 3 units."""
    gates = {"LSTM": 12, "GRU": 9, "RNN": 3}[op]
    weights = f"{kind}[1,{gates},4] w, {kind}[1,{gates},3] r"
    outputs = {"Y": ("y", "a,b,c,d"), "Yh": ("z, y", "a,b,c")}[out]
    return graph(
        f"{kind}[{shape}] x, {weights}{extra}",
        f"{kind}[{outputs[1]}] y",
        f"{outputs[0]} = {op}<hidden_size = 3{more}>(x, w, r{inputs})",
    )


def resize(more="", mode="linear", scale="1.0,1.0,2.0,2.0", size=6):
    body = f's = Constant<value_floats = [{scale}]>() y = Resize<mode = "{mode}"{more}>(x, , s)'
    return graph(f"float[2,4,{size},{size}] x", "float[a,b,c,d] y", body)


def same(op, mode, stride, kernel, size="6"):
    weight = f", float[{'4,3' if 'T' in op else '3,4'},{kernel},{kernel}] w" if "C" in op else ""
    call = f"{op}<kernel_shape = [{kernel},{kernel}], strides = [{stride},{stride}]"
    call += f', auto_pad = "{mode}">(x{", w" if weight else ""})'
    return graph(f"float[2,4,{size},{size}] x{weight}", "float[a,b,c,d] y", f"y = {call}")


def pool(op, more):
    return image(f"{op}<{more}>(x)")


def reduction(op, shape, axes, opset=18):
    if opset < 18:
        body = f"y = {op}<axes = [{axes}]>(x)"
    else:
        body = f"axes = Constant<value_ints = [{axes}]>() y = {op}(x, axes)"
    out = ",".join(f"o{axis}" for axis in range(len(shape.split(","))))
    return graph(f"float[{shape}] x", f"float[{out}] y", body)


def loop(body, outputs, scans):
    inner = "k2 = Identity(k) o = Add(s, s)" + (" p = Identity(o)" if scans else "")
    results = "bool k2, float[4] o" + (", float[4] p" if scans else "")
    return graph(
        "int64 n, bool c, float[4] z",
        outputs,
        f"{body} = Loop(n, c, z) <body = b (int64 i, bool k, float[4] s) => ({results}) "
        f"{{ {inner} }}>",
    )


def flat_groupnorm(affine):
    return graph(
        "float[3,8] x",
        "float[3,8] y",
        f"""g = Constant<value_floats = [1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0]>()
        b = Constant<value_floats = [8.0,7.0,6.0,5.0,4.0,3.0,2.0,1.0]>()
        z = Constant<value_floats = [0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0]>()
        o = Constant<value_floats = [1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0]>()
        one = Constant<value_floats = [1.0,1.0]>() zero = Constant<value_floats = [0.0,0.0]>()
        there = Constant<value_ints = [0,2,4]>() back = Constant<value_ints = [0,8]>()
        r = Reshape(x, there) n = InstanceNormalization(r, one, zero) f = Reshape(n, back)
        {affine}""",
    )


def with_constant(op, kind, value, out_kind=""):
    return graph(
        f"{kind}[2,4] x",
        f"{out_kind or kind}[2,4] y",
        f"k = Constant<value = {kind}[1] {{{value}}}>() y = {op}(x, k)",
    )


GROUPNORM = "GroupNormalization<num_groups = 2>(x, s, b)"
FLAT = graph("float[2,4] x, float[4] s, float[4] b", "float[2,4] y", f"y = {GROUPNORM}")
RELU = image("Relu(x)")
SEQUENCE_INSIDE = graph(
    "float[2,4] x",
    "float[2,4] y",
    "r = Relu(x) q = SequenceConstruct(x, r) "
    "i = Constant<value = int64 {1}>() y = SequenceAt(q, i)",
)
TEXT = graph("string[2] x", "string[2] y", "y = Identity(x)")
CROP = graph(
    "float[2,4,6,6] x",
    "float[a,b,c,d] y",
    "s = Constant<value_floats = [1.0,1.0,2.0,2.0]>() "
    "r = Constant<value_floats = [0.0,0.0,0.1,0.1,1.0,1.0,0.8,0.8]>() "
    'y = Resize<mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize">(x, r, s)',
)
SYMMETRIC = ', coordinate_transformation_mode = "half_pixel_symmetric"'
ALIGNED = ', coordinate_transformation_mode = "asymmetric"'
TRAINING = graph(
    "float[2,4,6,6] x, float[4] s, float[4] b, float[4] m, float[4] v",
    "float[a,b,c,d] y",
    "w = Abs(v) y, rm, rv = BatchNormalization<training_mode = 1>(x, s, b, m, w)",
)
INFERENCE = TRAINING.replace("y, rm, rv", "y").replace("mode = 1", "mode = 0")
DROPOUT = graph(
    "float[2,4] x",
    "float[2,4] z",
    "r = Constant<value_float = 0.5>() t = Constant<value = bool {1}>() "
    "y = Dropout(x, r, t) z = Relu(y)",
)
QUIET_DROPOUT = DROPOUT.replace("bool {1}", "bool {0}")
VOLUMES = graph(
    "float[1,1,3,3,3] x, float[1,2,2,2,3] z", "float[a,b,c,d,e] y", "y = GridSample(x, z)"
)
IMAGES = graph("float[1,1,3,3] x, float[1,2,2,2] z", "float[a,b,c,d] y", "y = GridSample(x, z)")
ROIS = graph(
    "float[1,2,8,8] x",
    "float[a,b,c,d] y",
    "r = Constant<value = float[1,4] {0.6, 0.8, 5.5, 6.7}>() b = Constant<value_ints = [0]>() "
    'y = RoiAlign<mode = "max", output_height = 3, output_width = 3, sampling_ratio = 2>(x, r, b)',
)
LOSS = graph(
    "float[2,4,3] x",
    "float[2,3] y",
    "t = Constant<value = int64[2,3] {0, 1, 2, 3, 2, 1}>() "
    'y = NegativeLogLikelihoodLoss<reduction = "none", ignore_index = 1>(x, t)',
)
PAD = graph(
    "float[2,4] x",
    "float[a,b] y",
    'p = Constant<value_ints = [0,1,0,1]>() y = Pad<mode = "wrap">(x, p)',
)
QUANTIZED = graph(
    "float[2,4] x",
    "float[2,4] y",
    "s = Constant<value_float = 0.1>() z = Constant<value = int8 {0}>() "
    "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
)
PAST_SIZE = "kernel_shape = [2,2], strides = [3,3], pads = [0,0,1,1], ceil_mode = 1"
WITHIN_SIZE = "kernel_shape = [3,3], strides = [2,2], ceil_mode = 1"
OPTIONAL = graph("float[2,4] x", "float[2,4] y", "o = Optional(x) y = OptionalGetElement(o)")
HAS = graph("float[2,4] x", "bool y", "o = Optional(x) y = OptionalHasElement(o)")
TRAINER = graph(
    "float r, int64 t, float[2] x, float[2] d, float[2] h",
    "float[2] y, float[2] z",
    "y, z = ai.onnx.preview.training.Adagrad(r, t, x, d, h)",
)
STEP = ', "ai.onnx.preview.training" : 1'
ML = ', "ai.onnx.ml" : 3'
SCALER = graph(
    "float[2,4] x", "float[2,4] y", "y = ai.onnx.ml.Scaler<offset = [1.0], scale = [2.0]>(x)"
)

UNARY64 = (
    *("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "Erf", "Hardmax", "Tan", "Acos"),
    *("Asin", "Atan", "Cosh", "Sinh", "Acosh", "Asinh", "Atanh"),
)
POOL = "<kernel_shape = [2,2]>(x)"
CALLS64 = {
    **{op: f"{op}(x)" for op in UNARY64},
    "AveragePool": f"AveragePool{POOL}",
    "LpPool": f"LpPool{POOL}",
    "InstanceNormalization": "InstanceNormalization(x, s, b)",
    "LRN": "LRN<size = 3>(x)",
    "Mean": "Mean(x, x)",
}
CONV = "double[2,4,6,6] x, double[3,4,3,3] w"
UNCONV = "double[2,4,6,6] x, double[4,3,3,3] w"
NATIVE64 = {
    **{op: image(call, "double") for op, call in CALLS64.items()},
    "Conv": graph(CONV, "double[a,b,c,d] y", "y = Conv(x, w)"),
    "ConvTranspose": graph(UNCONV, "double[a,b,c,d] y", "y = ConvTranspose(x, w)"),
    "Resize": resize().replace("float[2", "double[2").replace("float[a", "double[a"),
    "RNN": recurrent("RNN", "double"),
}
UNARY16 = (
    *("Abs", "Neg", "Sqrt", "Erf", "Exp", "Relu", "Sigmoid", "Tanh", "Softmax", "ReduceSum"),
    "GlobalAveragePool",
)
CALLS16 = {
    **{op: (f"{op}(x)", "x") for op in UNARY16},
    **{op: (f"{op}(x, x)", "x") for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "MatMul")},
    "AveragePool": (f"AveragePool{POOL}", "x"),
    "MaxPool": (f"MaxPool{POOL}", "x"),
    "Conv": ("Conv(x, w)", "xw"),
    "BatchNormalization": ("BatchNormalization(x, s, s, s, s)", "x"),
    "InstanceNormalization": ("InstanceNormalization(x, s, s)", "x"),
}
GEMM16 = graph(
    "float[4,4] f", "float[4,4] y", "x = Cast<to = 16>(f) z = Gemm(x, x, x) y = Cast<to = 1>(z)"
)
RANDOM = {
    "Bernoulli": graph("float[2,4] x", "float[2,4] y", "p = Sigmoid(x) y = Bernoulli(p)"),
    "RandomNormal": graph("", "float[2] y", "y = RandomNormal<shape = [2]>()"),
    "RandomUniform": graph("", "float[2] y", "y = RandomUniform<shape = [2]>()"),
    "RandomNormalLike": image("RandomNormalLike(x)"),
    "RandomUniformLike": image("RandomUniformLike(x)"),
}
IMAGE_BYTES = graph("uint8[9] x", "uint8[a,b,c] y", "y = ImageDecoder(x)")
OLD_CALLS = {
    **{op: f"{op}(x, x)" for op in ("Add", "Sub", "Mul", "Div")},
    "BatchNormalization": "BatchNormalization(x, s, b, m, v)",
}
GEMM = graph("float[2,4] x, float[4,3] w, float[2,3] c", "float[2,3] y", "y = Gemm(x, w, c)")
SHORT = {"Max": "Max(x, x)", "Min": "Min(x, x)", "Relu": "Relu(x)"}


def _onnxruntime():
    def case(*args, **more):
        return Case("onnxruntime", *args, **more)

    yield case("opset-too-new", RELU, RELU, 29, 28, operator=False)
    for op, call in OLD_CALLS.items():
        yield case("opset-too-old", image(call), image(call), 6, 15 if "Batch" in op else 7)
    slopes = image("PRelu(x, w)", extra="float[6] w")
    yield case("opset-too-old", slopes, slopes, 6, 7)
    yield case("opset-too-old", GEMM, GEMM, 6, 7)
    for text in RANDOM.values():
        yield case("kernel-missing", text, RELU, 22)
    yield case("kernel-missing", ROIS, ROIS, 22, 18)
    yield case("kernel-missing", image("Swish(x)"), image("Swish(x)"), 25, 24)
    yield case("kernel-missing", IMAGE_BYTES, RELU, 20)
    glu = graph("float[2,4] x, float[2,4] g", "float[2,4] y", "y = SwiGLU(x, g)")
    yield case("kernel-missing", glu, RELU, 28)
    yield case("kernel-missing", QUANTIZED, QUANTIZED, 28, 25)
    yield case("kernel-missing", OPTIONAL, RELU, 28)
    yield case("kernel-missing", HAS, HAS, 28, 18)
    yield case("training-operator", TRAINER, RELU, more=STEP)
    for op, text in NATIVE64.items():
        # onnx's evaluator doesn't have all of them to compare with.
        near = image("GlobalAveragePool(x)") if op == "GlobalLpPool" else text
        yield case("float64-kernel-missing", text, near.replace("double", "float"))
    yield case("float64-kernel-missing", image("Gelu(x)", "double"), image("Gelu(x)"), 20)
    for op in ("LSTM", "GRU"):
        yield case("float64-recurrent", recurrent(op, "double"), recurrent(op))
        yield case("batch-major-recurrent", recurrent(op, more=", layout = 1"), recurrent(op))
    yield case("batch-major-recurrent", recurrent("RNN", more=", layout = 1"), recurrent("RNN"))
    for call, inputs in CALLS16.values():
        text = through_bfloat16(call, inputs)
        opset = 22 if "Pool" in call or "Conv" in call or "Instance" in call else 18
        yield case("bfloat16-kernel-missing", text, text.replace("16>", "10>"), opset)
    yield case("bfloat16-kernel-missing", GEMM16, GEMM16.replace("16>", "10>"))
    for op, call in SHORT.items():
        yield case("integer-kernel-missing", image(call, "int16"), image(call, "int32"))
        if op != "Relu":
            yield case("integer-kernel-missing", image(call, "uint16"), image(call, "uint32"))
    for op in ("ReduceMean", "ReduceSum"):
        for kind in ("uint32", "uint64"):
            text = reduction(op, "2,4", "1")
            unsigned, signed = text.replace("float", kind), text.replace("float", "int32")
            yield case("integer-kernel-missing", unsigned, signed)


def _openvino():
    def case(*args, **more):
        return Case("openvino", *args, **more)

    yield case("operator-unknown", image("Bernoulli(x)"), RELU)
    yield case("operator-unknown", graph("float[2,2] x", "float y", "y = Det(x)"), RELU)
    yield case("operator-unknown", OPTIONAL, SEQUENCE_INSIDE)
    yield case("machine-learning-operator", SCALER, RELU, more=ML)
    yield case("training-operator", TRAINER, RELU, more=STEP)
    given = graph("seq(float[2]) x", "int64 y", "y = SequenceLength(x)")
    made = graph("float[2,4] x", "seq(float[2,4]) y", "y = SequenceConstruct(x, x)")
    yield case("not-a-tensor", made, SEQUENCE_INSIDE, operator=False)
    yield case("not-a-tensor", given, SEQUENCE_INSIDE, operator=False)
    yield case("open-groupnorm-of-rank-2", FLAT.replace("2,4", "N,4"), FLAT, 21)
    yield case("dropout-in-training", DROPOUT, RELU)
    yield case("gridsample-of-volumes", VOLUMES, IMAGES, 20)
    yield case("pad-wrap", PAD, PAD.replace("wrap", "reflect"), 19)
    yield case("resize-coordinates", resize(SYMMETRIC), resize(ALIGNED))
    yield case("resize-coordinates", CROP, resize())
    small = resize(", antialias = 1", scale="1.0,1.0,0.5,0.5")
    yield case("resize-antialias", small, small.replace("antialias = 1", "antialias = 0"))
    peepholes = recurrent("LSTM", inputs=", , , , , p", extra=", float[1,9] p")
    yield case("lstm-peepholes", peepholes, recurrent("LSTM"))
    yield case("roialign-maximum", ROIS, ROIS.replace('"max"', '"avg"'))
    for mode in ("SAME_UPPER", "SAME_LOWER"):
        grown = same("ConvTranspose", mode, 2, 3)
        yield case("transposed-convolution-same", grown.replace("[2,4", "[N,4"), grown)
    grown = same("ConvTranspose", "SAME_UPPER", 2, 3, "H")
    yield case("transposed-convolution-same", grown, same("ConvTranspose", "SAME_UPPER", 2, 2, "H"))
    yield case("pool-window-in-padding", pool("MaxPool", PAST_SIZE), pool("MaxPool", WITHIN_SIZE))
    yield case("ignore-index", LOSS, LOSS.replace(", ignore_index = 1", ""))
    for op in ("Add", "Sub", "Mul", "Max"):
        big, small = (with_constant(op, "int64", value) for value in (1099511627777, 2147483647))
        yield case("long-integers", big, small.replace("2147483647", "77"))
    big = with_constant("Max", "uint32", 4000000000)
    yield case("long-integers", big, big.replace("4000000000", "4000"))
    for kind in ("int8", "uint8"):
        quotient = graph(f"{kind}[N,4] x, {kind}[4] z", f"{kind}[N,4] y", "y = Div(x, z)")
        yield case("small-integer-division", quotient, quotient.replace("N", "2"))
        yield case("small-integer-division", quotient, quotient.replace(kind, "int32"))


def _opencv():
    def case(*args, **more):
        return Case("opencv", *args, **more)

    yield case(
        "operator-unknown",
        pool("LpPool", "kernel_shape = [2,2]"),
        pool("MaxPool", "kernel_shape = [2,2]"),
    )
    scan = graph(
        "float[5,4] x, float[4] z",
        "float[4] y, float[5,4] w",
        "y, w = Scan<num_scan_inputs = 1, body = b (float[4] s, float[4] i) => "
        "(float[4] o, float[4] p) { o = Add(s, i) p = Identity(o) }>(z, x)",
    )
    yield case("operator-unknown", scan, loop("y, w", "float[4] y, float[a,4] w", True))
    yield case("operator-unknown", recurrent("RNN"), recurrent("LSTM"))
    yield case("machine-learning-operator", SCALER, RELU, more=ML)
    yield case("training-operator", TRAINER, RELU, more=STEP)
    yield case("text", TEXT, RELU, operator=False)
    truth = graph(
        "float[2,4] x",
        "float[2,4] y",
        "t = Constant<value = bool[4] {1, 0, 1, 0}>() f = Cast<to = 1>(t) y = Mul(x, f)",
    )
    yield case(
        "boolean-field", truth, truth.replace("bool[4]", "int8[4]"), crashes=True, operator=False
    )
    refused = {
        **{op: f"{op}(x)" for op in ("GlobalAveragePool", "GlobalMaxPool", "Softmax")},
        **{op: f"{op}(x)" for op in ("LogSoftmax", "Hardmax")},
        "AveragePool": f"AveragePool{POOL}",
        "MaxPool": f"MaxPool{POOL}",
        "BatchNormalization": "BatchNormalization(x, s, b, m, v)",
    }
    for call in refused.values():
        text = image(call, "double")
        if "Batch" in call:
            text = text.replace("y = B", "w = Abs(v) y = B").replace(", v)", ", w)")
        yield case("float64-refused", text, text.replace("double", "float"))
    pairs = "double[2,4] x, double[4,3] w"
    product = graph(pairs, "double[2,3] y", "y = MatMul(x, w)")
    for text in (
        product,
        product.replace("MatMul(x, w)", "Gemm(x, w)"),
        NATIVE64["Conv"],
        NATIVE64["ConvTranspose"],
        recurrent("GRU", "double", "Yh"),
    ):
        yield case("float64-refused", text, text.replace("double", "float"))
    for text, opset in (
        (NATIVE64["InstanceNormalization"], 18),
        (image(GROUPNORM, "double"), 21),
        (image("LRN<size = 3>(x)", "double"), 18),
        (image("LpNormalization(x)", "double"), 18),
        (recurrent("LSTM", "double"), 18),
        (graph("double[2,4] x, double[4] s", "double[2,4] y", "y = LayerNormalization(x, s)"), 18),
        (graph("double[2,4] x, double[4] s", "double[2,4] y", "y = RMSNormalization(x, s)"), 23),
    ):
        yield case("float64-misread", text, text.replace("double", "float"), opset)
    half = through_bfloat16("Identity(x)")
    yield case("bfloat16", half, half.replace("16>", "10>"))
    yield case("groupnorm-of-rank-2", FLAT, image(GROUPNORM), 21)
    affine = flat_groupnorm("p = Mul(f, g) y = Add(p, b)")
    yield case(
        "flat-groupnorm-with-affine",
        affine,
        flat_groupnorm("y = BatchNormalization<epsilon = 0.0>(f, g, b, z, o)"),
    )
    yield case("flat-groupnorm-with-affine", affine.replace("(f, g)", "(g, f)"), RELU)
    for op in (
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    ):
        near = reduction(op, "5,3,4,3", "2,3")
        yield case("reduction-over-three-axes", reduction(op, "5,3,4,3", "0,2,3"), near)
    three = ("reduction-over-three-axes", reduction("ReduceMean", "2,6,6,2,4", "1,2,4"))
    yield case(*three, reduction("ReduceMean", "2,6,6,2,4", "2,3,4"))
    yield case(*three, reduction("ReduceMean", "2,6,6,4", "0,1,2"))
    yield case(*three, reduction("ReduceMean", "3,1,6,4", "0,2,3"))
    text = reduction("ReduceMean", "3,3,3,2", "-4,-2,-1", 13)
    yield case("reduction-over-three-axes", text, reduction("ReduceMean", "3,3,2", "0,2", 13), 13)
    for op in ("Conv", "MaxPool", "AveragePool"):
        upper = same(op, "SAME_UPPER", 2, 3)
        yield case("same-padding", upper, same(op, "SAME_UPPER", 2, 3, "7"))
        lower = same(op, "SAME_LOWER", 1, 2)
        yield case("same-padding", lower, same(op, "SAME_UPPER", 1, 2))
    for mode in ("SAME_UPPER", "SAME_LOWER"):
        same_size = same("ConvTranspose", mode, 2, 3)
        yield case("transposed-convolution-same", same_size, same_size.replace(mode, "VALID"))
    for op in ("MaxPool", "AveragePool"):
        yield case("pool-window-in-padding", pool(op, PAST_SIZE), pool(op, WITHIN_SIZE))
    slope = graph("float[2,4] x, float[4] z", "float[2,4] y", "s = Abs(z) y = PRelu(x, s)")
    fixed = graph(
        "float[2,4] x", "float[2,4] y", "s = Constant<value = float[1] {0.5}>() y = PRelu(x, s)"
    )
    yield case("computed-slope", slope, fixed)
    vector = graph("float[2,4] x, float[4] w", "float[2] y", "y = MatMul(x, w)")
    yield case("vector-product", vector, product.replace("double", "float"))
    for call in ("Relu(x)", "Abs(x)", "Sign(x)"):
        yield case("integer-activation", image(call, "int32"), image(call))
        yield case("integer-activation", image(call, "int64"), image(call))
    for kind in ("int32", "int64", "uint32", "uint64"):
        text = product.replace("double", kind)
        yield case("integer-product", text, product.replace("double", "float"))
    yield case("sequence-of-gru", recurrent("GRU"), recurrent("GRU", out="Yh"))
    for op in ("LSTM", "GRU"):
        back = recurrent(op, out="Yh", more=', direction = "reverse"')
        yield case("reversed-recurrent", back, recurrent(op, out="Yh"))
        major = recurrent(op, more=", layout = 1", out="Y" if op == "LSTM" else "Yh")
        yield case("batch-major-recurrent", major, recurrent(op, out="Yh"))
    peepholes = recurrent("LSTM", inputs=", , , , , p", extra=", float[1,9] p")
    yield case("lstm-peepholes", peepholes, recurrent("LSTM"))
    yield case(
        "loop-without-scan-output",
        loop("y", "float[4] y", False),
        loop("y, w", "float[4] y, float[a,4] w", True),
    )
    yield case("training-batchnorm", TRAINING, INFERENCE)
    celu = graph(
        "float[2,4] x",
        "float[2,4] y",
        "k = Constant<value_float = 2.0>() d = Div(x, k) e = Elu(d) y = Mul(k, e)",
    )
    yield case("celu-in-parts", celu, celu.replace("Elu", "Sigmoid"), crashes=True)
    yield case("swish-alpha", image("Swish<alpha = 0.5>(x)"), image("Swish(x)"), 24)
    cubic = IMAGES.replace("GridSample", 'GridSample<mode = "cubic">')
    yield case("cubic-gridsample", cubic, IMAGES, 20)
    small = resize(", antialias = 1", scale="1.0,1.0,0.5,0.5")
    yield case("resize-option", small, small.replace("antialias = 1", "antialias = 0"))
    yield case("resize-option", resize(SYMMETRIC), resize(ALIGNED))
    yield case("resize-option", CROP, resize())
    yield case(
        "resize-option", resize(", axes = [2,3]", scale="2.0,3.0"), resize(scale="1.0,1.0,2.0,3.0")
    )
    yield case(
        "resize-scale",
        resize(ALIGNED, scale="1.0,1.0,0.6,0.6"),
        resize(ALIGNED, scale="1.0,1.0,0.5,0.5"),
    )


def _tensorrt():
    def case(*args, **more):
        return Case("tensorrt", *args, **more)

    yield case("opset-range", RELU, RELU, 26, 25, operator=False)
    yield case("opset-range", RELU, RELU, 8, 9, operator=False)
    yield case("operator-unsupported", OPTIONAL, RELU)
    yield case("operator-unsupported", image("Bernoulli(x)"), image("RandomUniformLike(x)"))
    for kind in ("string", "int16", "uint32", "uint64"):
        text = TEXT.replace("string", kind)
        yield case("type-unsupported", text, TEXT.replace("string", "int32"), operator=False)
    yield case("double-narrowed", image("Relu(x)", "double"), RELU, operator=False)
    one = image(GROUPNORM.replace("2", "1"))
    yield case("groupnorm-of-one-group", one, image(GROUPNORM), 21)
    each = image(GROUPNORM.replace("2", "4"))
    yield case("groupnorm-of-opset-21", image(GROUPNORM), each, 21)
    yield case("groupnorm-of-rank-2", FLAT, image(GROUPNORM), 21)
    half = image(GROUPNORM, "float16")
    yield case("groupnorm-in-float16", half, image(GROUPNORM), 21)
    yield case("training-batchnorm", TRAINING, INFERENCE)
    yield case("training-dropout", DROPOUT, QUIET_DROPOUT)
    scaled = "o = Constant<value_floats = [1.0,1.0,1.0,1.0]>() y = InstanceNormalization(x, {}, o)"
    vector = graph("float[2,4,6,6] x, float[4] s", "float[2,4,6,6] y", scaled.format("s"))
    yield case("instancenorm-inputs", vector, vector.replace("(x, s, o)", "(x, o, o)"))
    several = graph(
        "float[2,4] x, float[4] s", "float[2,4] y, float[2,1] m", "y, m = LayerNormalization(x, s)"
    )
    single = graph("float[2,4] x, float[4] s", "float[2,4] y", "y = LayerNormalization(x, s)")
    yield case("layernorm-outputs", several, single)
    spots = graph("float[2,4,6,6] x", "float[a,b,c,d] y, int64[e,f,g,h] i", f"y, i = MaxPool{POOL}")
    yield case("pool-indices", spots, image(f"MaxPool{POOL}"))
    for op in ("MaxPool", "AveragePool", "LpPool"):
        wide = "kernel_shape = [2,2], dilations = [2,2]"
        yield case("dilated-pool", pool(op, wide), pool(op, wide.replace("[2,2]", "[1,1]")), 19)
    yield case("gridsample-of-volumes", VOLUMES, IMAGES, 20)
    fed = graph("float[2,4] x, int64[1] a", "float[b,c] y", "y = ReduceSum(x, a)")
    fixed = reduction("ReduceSum", "2,4", "1")
    yield case("input-must-be-constant", fed, fixed)
    total = graph("float[2,4] x, int64 a", "float[2,4] y", "y = CumSum(x, a)")
    known = graph(
        "float[2,4] x", "float[2,4] y", "a = Constant<value = int64 {0}>() y = CumSum(x, a)"
    )
    yield case("input-must-be-constant", total, known)
    yield case("resize-option", resize(SYMMETRIC), resize(ALIGNED))
    yield case("resize-option", resize(", antialias = 1"), resize(", antialias = 0"))
    scatter = graph(
        "float[2,4] x, int64[1,1] i, float[1,4] u",
        "float[2,4] y",
        'y = ScatterND<reduction = "add">(x, i, u)',
    )
    yield case("scatter-reduction", scatter, scatter.replace('"add"', '"none"'))
    top = graph(
        "float[2,9000] x",
        "float[a,b] y, int64[c,d] i",
        "k = Constant<value = int64[1] {4000}>() y, i = TopK(x, k)",
    )
    yield case("topk-option", top, top.replace("4000", "40"))
    loose = top.replace("4000", "40").replace("TopK", "TopK<sorted = 0>")
    yield case("topk-option", loose, top.replace("4000", "3839"))
    yield case("lstm-option", recurrent("LSTM", more=", layout = 1"), recurrent("LSTM"))
    coupled = recurrent("LSTM", more=", input_forget = 1")
    yield case("lstm-option", coupled, recurrent("LSTM", more=", input_forget = 0"))
    yield case("zero-point", QUANTIZED.replace("int8 {0}", "int8 {1}"), QUANTIZED)
    spoken = graph("", "string y", 'y = Constant<value_string = "a">()')
    written = graph("", "float y", "y = Constant<value_float = 1.0>()")
    yield case("constant-of-text", spoken, written)
    heads = "float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v"
    four = graph(heads, "float[a,b,c,d] y", "y = Attention(q, k, v)")
    three = graph(
        heads.replace("1,2,3,4", "1,3,8"),
        "float[a,b,c] y",
        "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)",
    )
    yield case("attention-form", three, four, 23)


CASES = (*_onnxruntime(), *_openvino(), *_opencv(), *_tensorrt())
IDS = [f"{case.target}-{case.fact}-{number}" for number, case in enumerate(CASES)]
