"""What is known to fail in a runtime: found in a graph, and still true where it was measured."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, parser

import layerswap as ls
from failing_graphs import CASES, IDS, RELU, head
from layerswap.criteria import TARGETS
from layerswap.errors import LayerswapError, MissingExtraError
from layerswap.onnx_graph import facts_opencv, facts_openvino, known_failures
from layerswap.onnx_graph.known_failures import FACTS, failures
from layerswap.onnx_graph.runtimes import open_runtime
from layerswap.onnx_graph.views import GraphView

MEASURED = re.compile(r"measured with (\w+) ([\d.]+)")
BY_NAME = {(target, fact.name): fact for target in TARGETS for fact in FACTS[target]}
EACH = pytest.mark.parametrize("case", CASES, ids=IDS)
MEASURED_CASES = [
    pytest.param(case, id=name)
    for case, name in zip(CASES, IDS, strict=True)
    if "measured" in BY_NAME[case.target, case.fact].source
]
# Sizes that open axes get.
OPEN = {"H": 6, "W": 6}
# Whose output is drawn at random; none of them is judged by its numbers.
RANDOM = ("Random", "Bernoulli", "Dropout")


def model_of(text, opset, more=""):
    return parser.parse_model(f"{head(opset, more)} {text}")


def trip_of(case):
    return model_of(case.trips, case.opset, case.more)


def near_of(case):
    return model_of(case.near, case.near_opset or case.opset)


def found(target, model):
    """Names of the facts, and where."""
    view = GraphView(model)
    known = [(fact.name, where) for fact in FACTS[target] for where, _, _ in fact.failures(view)]
    assert [where for _, where in known] == [where for where, _, _ in failures(target, view)]
    return known


# --- finding them ---------------------------------------------------------------------------


@EACH
def test_a_graph_that_trips_it_and_one_that_comes_close(case):
    assert case.fact in dict(found(case.target, trip_of(case)))
    assert case.fact not in dict(found(case.target, near_of(case)))


def inside_if(model):
    """The same graph as the one branch of an If."""
    outputs = [value.name for value in model.graph.output]
    inner = onnx.GraphProto(name="inner", node=model.graph.node, output=model.graph.output)
    empty = onnx.GraphProto(name="other", node=model.graph.node, output=model.graph.output)
    node = helper.make_node(
        "If",
        ["cond"],
        [f"{o}_out" for o in outputs],
        "choice",
        then_branch=inner,
        else_branch=empty,
    )
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.output[:]
    result.graph.node.append(node)
    for value in model.graph.output:
        result.graph.output.add(name=f"{value.name}_out", type=value.type)
    cond = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    result.graph.input.append(cond)
    return result


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=i) for c, i in zip(CASES, IDS, strict=True) if c.operator]
)
def test_inside_a_branch(case):
    names = [name for name, _ in found(case.target, trip_of(case))]
    within = found(case.target, inside_if(trip_of(case)))
    assert [name for name, _ in within if name == case.fact] == [case.fact] * 2 * names.count(
        case.fact
    )
    assert all(where.startswith("choice/") for name, where in within if name == case.fact)
    messages = [m for where, m, _ in failures(case.target, GraphView(inside_if(trip_of(case))))]
    assert any(" in If: " in message for message in messages)


def test_inside_a_local_function():
    text = """<ir_version: 8, opset_import: ["" : 18, "own" : 1]>
    g (float[2,4] x) => (float[2,4] y) { y = own.f(x) }
    <opset_import: ["" : 18], domain: "own"> f (x) => (y) { y = Bernoulli(x) }"""
    assert ("operator-unknown", "f/y") in found("openvino", parser.parse_model(text))
    assert ("operator-unsupported", "f/y") in found("tensorrt", parser.parse_model(text))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_say_of_an_ordinary_graph(target):
    assert found(target, model_of(RELU, 18)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_unknown_is_no_failure(target):
    """Types and shapes that can't be inferred trip nothing."""
    for case in CASES:
        if case.target == target and case.operator:
            model = trip_of(case)
            for value in [*model.graph.input, *model.graph.output]:
                value.ClearField("type")
            list(failures(target, GraphView(model)))


@pytest.mark.parametrize("target", TARGETS)
def test_facts_say_what_where_and_who(target):
    facts = FACTS[target]
    assert len({fact.name for fact in facts}) == len(facts)
    for fact in facts:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fact.name)
        assert fact.remedy.endswith(".")
        assert not fact.failure.endswith(".")
        assert MEASURED.search(fact.source) or fact.source.startswith("https://")
    assert {case.fact for case in CASES if case.target == target} == {f.name for f in facts}


def test_check_reports_them(tmp_path):
    onnx.save(
        model_of("g (float[N,4] x) => (float[N,4] y) { y = Bernoulli(x) }", 18), tmp_path / "m.onnx"
    )
    assert ls.check(tmp_path / "m.onnx").ok
    (finding,) = ls.check(tmp_path / "m.onnx", target=["openvino"]).findings
    assert (finding.code, finding.severity, finding.where) == ("LS402", "error", "y")
    assert finding.message.startswith("is a Bernoulli: OpenVINO has no rule")
    assert "(measured with openvino" in finding.message


@pytest.mark.parametrize("target", TARGETS)
def test_a_converted_model_has_none(target, digits_onnx):
    assert ls.check(digits_onnx, target=[target]).ok


# --- whether they are still true ------------------------------------------------------------


def runtime_of(case):
    """The runtime, and whether it is newer than the measurement; skips where it is older."""
    package, noted = MEASURED.search(BY_NAME[case.target, case.fact].source).groups()
    assert package == case.target
    if case.target == "opencv" and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("opencv-python-headless 5 needs NumPy 2")
    try:
        runtime = open_runtime(case.target)
    except MissingExtraError:
        pytest.skip(f"{case.target} isn't installed")
    numbers, wanted = ([int(n) for n in v.split(".")[:3]] for v in (runtime.version, noted))
    if numbers < wanted:
        pytest.skip(f"{case.target} {runtime.version} is older than what was measured")
    return runtime, numbers > wanted


def feeds_of(model):
    generator = np.random.default_rng(3)
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        sizes = [axis.dim_value or OPEN.get(axis.dim_param, 2) for axis in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name in "nct" and not sizes:  # trip count and condition
            feeds[value.name] = np.ones((), dtype)
        elif dtype.kind == "f":
            feeds[value.name] = generator.uniform(0.1, 1.2, sizes).astype(dtype)
        elif dtype.kind == "O":
            feeds[value.name] = np.array(["a", "bc"], object)
        else:
            feeds[value.name] = generator.integers(1, 6, sizes).astype(dtype)
    return feeds


def complaint(runtime, path, model):
    """Why a graph fails in a runtime; empty where it doesn't."""
    if any(value.type.WhichOneof("value") != "tensor_type" for value in model.graph.input):
        feeds = {model.graph.input[0].name: [np.ones(2, np.float32)]}
    else:
        feeds = feeds_of(model)
    onnx.save(model, path)
    try:
        results = runtime.session(path)(feeds)
    except LayerswapError as error:
        return error.message
    if any(node.op_type.startswith(RANDOM) for node in model.graph.node):
        return ""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(invalid="ignore"):
        expected = ReferenceEvaluator(model).run(None, feeds)
    for value, wanted in zip(model.graph.output, expected, strict=True):
        got = np.asarray(results[value.name])
        if got.shape != wanted.shape:
            return f"{value.name} has the shape {got.shape}"
        share = 2e-2 if any(node.op_type == "Cast" for node in model.graph.node) else 1e-3
        wanted = np.asarray(wanted, float)
        limit = share * np.nanmax(np.abs(wanted), initial=0)
        if not np.allclose(got.astype(float), wanted, share, limit, equal_nan=True):
            return f"{value.name} is wrong"
    return ""


def crash(target, path):
    """Runs a file in a process of its own; its exit status."""
    code = f"""
import numpy as np
from layerswap.onnx_graph.runtimes import open_runtime
open_runtime({target!r}).session({str(path)!r})({{"x": np.ones((2, 4), "f")}})
"""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


@pytest.mark.parametrize("case", MEASURED_CASES)
def test_it_really_fails(case, tmp_path):
    runtime, newer = runtime_of(case)
    if case.crashes:
        onnx.save(trip_of(case), tmp_path / "m.onnx")
        fails = crash(case.target, tmp_path / "m.onnx") != 0
    else:
        fails = bool(complaint(runtime, tmp_path / "m.onnx", trip_of(case)))
    if newer and not fails:
        pytest.skip(f"{case.target} {runtime.version} has mended it: drop {case.fact}")
    assert fails


@pytest.mark.parametrize("case", MEASURED_CASES)
def test_what_comes_close_works(case, tmp_path):
    runtime, _ = runtime_of(case)
    assert complaint(runtime, tmp_path / "m.onnx", near_of(case)) == ""


LISTS = [
    ("openvino", "", facts_openvino.UNCONVERTED),
    ("openvino", "ai.onnx.ml", facts_openvino.UNCONVERTED_ML),
    ("opencv", "", facts_opencv.UNKNOWN),
    ("opencv", "ai.onnx.ml", facts_opencv.UNKNOWN_ML),
]
REFUSAL = {"openvino": r"No conversion rule found for operations: \S*", "opencv": r"Node \["}


@pytest.mark.parametrize(("target", "domain", "names"), LISTS, ids=lambda v: v if v else "standard")
def test_every_operator_of_a_list_is_unknown(target, domain, names, tmp_path):
    case = next(c for c in CASES if c.target == target and c.fact == "operator-unknown")
    runtime, newer = runtime_of(case)
    mended = [n for n in names if not refused(runtime, n, domain, tmp_path / "m.onnx")]
    if newer and mended:
        pytest.skip(f"{target} {runtime.version} knows {', '.join(mended)}")
    assert mended == []


def refused(runtime, name, domain, path):
    """Whether a runtime refuses an operator by its name, whatever it is given."""
    version = (
        (3 if name.startswith("TreeEnsemble") and name != "TreeEnsemble" else 5) if domain else 28
    )
    inputs = max(onnx.defs.get_schema(name, version, domain).min_input, 1)
    node = helper.make_node(name, ["x"] * inputs, ["y"], domain=domain)
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 2]) for n in "xy"]
    imports = [helper.make_opsetid("", 26)] + [helper.make_opsetid(domain, version)] * bool(domain)
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    with pytest.raises(LayerswapError) as caught:
        runtime.session(path)
    return re.search(f"{REFUSAL[runtime.name]}{name}\\b", caught.value.message) is not None


def test_the_rule_of_reductions_is_that_of_opencv(tmp_path):
    """Shapes drawn at random: what the rule calls wrong is wrong."""
    case = next(c for c in CASES if c.fact == "reduction-over-three-axes")
    runtime, newer = runtime_of(case)
    generator = np.random.default_rng(11)
    tripped = 0
    for _ in range(60):
        rank = int(generator.integers(4, 6))
        shape = tuple(int(size) for size in generator.integers(1, 5, rank))
        axes = sorted(int(a) for a in generator.permutation(rank)[: generator.integers(2, rank)])
        sizes, listed = ",".join(map(str, shape)), ",".join(map(str, axes))
        out = ",".join(f"o{axis}" for axis in range(rank))
        model = model_of(
            f"g (float[{sizes}] x) => (float[{out}] y) {{ a = Constant<value_ints = [{listed}]>() "
            "y = ReduceSum(x, a) }",
            18,
        )
        onnx.save(model, tmp_path / "m.onnx")
        x = generator.normal(size=shape).astype(np.float32)
        got = runtime.session(tmp_path / "m.onnx")({"x": x})["y"]
        wrong = not np.allclose(got, x.astype(float).sum(tuple(axes), keepdims=True), atol=1e-3)
        if found("opencv", model):
            tripped += 1
            assert wrong or newer, (shape, axes)
    assert tripped > 3


def test_the_rule_of_padding_is_that_of_opencv(tmp_path):
    case = next(c for c in CASES if c.fact == "same-padding")
    runtime, newer = runtime_of(case)
    generator = np.random.default_rng(12)
    modes = ("SAME_UPPER", "SAME_LOWER")
    for mode, size, kernel, stride in itertools.product(modes, (6, 7), (2, 3, 4), (1, 2, 3)):
        model = model_of(
            f"g (float[1,1,{size},{size}] x, float[1,1,{kernel},{kernel}] w) => (float[a,b,c,d] y)"
            f'{{ y = Conv<auto_pad = "{mode}", strides = [{stride},{stride}]>(x, w) }}',
            18,
        )
        onnx.save(model, tmp_path / "m.onnx")
        x = generator.normal(size=(1, 1, size, size)).astype(np.float32)
        w = generator.normal(size=(1, 1, kernel, kernel)).astype(np.float32)
        got = runtime.session(tmp_path / "m.onnx")({"x": x, "w": w})["y"]
        wrong = not np.allclose(got, padded_convolution(x, w, stride, mode), atol=1e-4)
        assert wrong == bool(found("opencv", model)) or newer, (mode, size, kernel, stride)


def padded_convolution(x, w, stride, mode):
    """In NumPy, as ONNX defines SAME: the odd element of the padding behind, or before."""
    size, kernel = x.shape[2], w.shape[2]
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
    wide = np.pad(x[0, 0].astype(float), (begin, total - begin + stride))
    places = [slice(i * stride, i * stride + kernel) for i in range(out)]
    return np.array([[(wide[r, c] * w[0, 0]).sum() for c in places] for r in places])[None, None]


def test_the_page_is_what_is_known():
    page = Path(__file__).parents[2] / "docs" / "targets.md"
    assert page.read_text(encoding="utf-8") == known_failures.to_markdown(), "run `make docs`"
