"""GroupNorm nodes become standard operators: which, how many, and wherever the nodes are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import layerswap as ls
import oracle
from groupnorm_graphs import expanded, model_of, randomized
from layerswap.errors import ExportError, LoadError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.groupnorm import PROFILES, expand
from layerswap.onnx_graph.runtimes import open_runtime
from layerswap.records import PROFILE_OPSETS

RNG = np.random.default_rng(3)
IMAGE = [None, 12, 4, 5]
OPEN = [None, 12, None, None]


def example(shape, groups, *, profile="portable", scale=True, center=True, **options):
    """A model of one node in the lowest opset that both ReduceMean's forms and `profile` have."""
    gamma, beta = randomized(12)
    gamma, beta = gamma if scale else np.ones_like(gamma), beta if center else np.zeros_like(beta)
    opset = max(18, PROFILE_OPSETS[profile])
    return model_of(shape, groups, gamma, beta, opset=opset, **options), gamma, beta


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def run(model, folder, inputs, runtime="onnxruntime"):
    onnx.save(model, folder / "m.onnx")
    try:
        return open_runtime(runtime).session(folder / "m.onnx")(inputs)["y"]
    except LoadError as error:
        if runtime == "reference" and "GroupNormalization" in str(error):
            pytest.skip(f"onnx {onnx.__version__} evaluates no GroupNormalization in a body")
        raise


def test_every_profile_has_its_lowest_opset():
    assert PROFILES.keys() == PROFILE_OPSETS.keys()


@pytest.mark.parametrize(
    ("profile", "shape", "groups", "nodes"),
    [
        ("portable", IMAGE, 3, 4),
        ("portable", OPEN, 3, 5),
        ("portable", IMAGE, 1, 4),
        ("portable", OPEN, 12, 1),
        ("portable", [None, 12], 12, 3),
        ("plain", IMAGE, 3, 5),
        ("plain", OPEN, 3, 6),
        ("plain", OPEN, 12, 1),
        ("precise", IMAGE, 3, 6),
        ("precise", OPEN, 3, 7),
        ("precise", OPEN, 12, 3),
        ("primitive", IMAGE, 3, 11),
        ("primitive", OPEN, 3, 12),
        ("primitive", OPEN, 1, 9),
        ("primitive", OPEN, 12, 9),
        ("native", IMAGE, 3, 1),
        ("native", OPEN, 3, 1),
        ("native", [None, 12], 3, 3),
    ],
)
def test_number_of_nodes(profile, shape, groups, nodes, tmp_path):
    model, gamma, beta = example(shape, groups, profile=profile)
    model = expanded(model, profile)
    assert len(model.graph.node) == nodes
    for batch in (1, 2):
        x = RNG.normal(size=[batch, *(n or 7 for n in shape[1:])]).astype("float32")
        expected = oracle.group_norm(x, groups, gamma, beta, 0.03, axis=1)
        np.testing.assert_allclose(run(model, tmp_path, {"x": x}), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("known", "shapes"),
    [([-1, 12, -1, 5], 0), ([-1, 12, 4, -1], 0), ([-1, 12, -1, -1], 1), ([2, 12, 4, 5], 0)],
)
def test_shape_is_read_at_run_time_only_where_needed(known, shapes, tmp_path):
    model, gamma, beta = example(OPEN, 2, known=known)
    model = expanded(model)
    assert kinds(model)["Shape"] == shapes
    x = RNG.normal(size=(2, 12, 4, 5)).astype("float32")
    expected = oracle.group_norm(x, 2, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(run(model, tmp_path, {"x": x}), expected, atol=2e-5)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_a_neutral_affine_is_left_out(scale, center, groups, profile, tmp_path):
    full, *_ = example(IMAGE, groups, profile=profile)
    full = kinds(expanded(full, profile))
    model, gamma, beta = example(IMAGE, groups, profile=profile, scale=scale, center=center)
    model = expanded(model, profile)
    if profile in ("portable", "precise"):
        full["BatchNormalization"] *= scale or center
    elif profile in ("plain", "primitive") and (groups < 12 or profile == "primitive"):
        full["Mul"] -= not scale
        full["Add"] -= not center
    assert kinds(model) == +full
    x = RNG.normal(2, 3, (2, 12, 4, 5)).astype("float32")
    expected = oracle.group_norm(x, groups, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(run(model, tmp_path, {"x": x}), expected, atol=2e-5)


def test_an_affine_that_is_nearly_neutral_stays():
    above, below = np.nextafter(np.float32(1), np.float32(2)), np.float32(1e-45)
    gamma, beta = np.ones(12, "float32"), np.zeros(12, "float32")
    gamma[7], beta[7] = above, below
    for values in ((gamma, np.zeros_like(beta)), (np.ones_like(gamma), beta)):
        model = model_of(IMAGE, 3, *values)
        assert kinds(expanded(model))["BatchNormalization"] == 1
        assert len(expanded(model, "plain").graph.node) == 4


def test_constants_are_shared_and_the_layer_is_noted():
    gamma, beta = randomized(8)
    model = expanded(model_of([None, 8, 3], 4, gamma, beta, count=3))
    assert len(model.graph.node) == 12
    # γ, β; ones and zeros for 4 groups and 8 channels; two shapes.
    assert len(model.graph.initializer) == 2 + 4 + 2
    assert [n.doc_string for n in model.graph.node] == ["", "", "", "block/gn"] * 3


@pytest.mark.parametrize("profile", PROFILES)
def test_a_layer_may_be_called_on_inputs_of_several_ranks(profile, tmp_path):
    model, gamma, beta = example([2, 12, 5], 3, profile=profile, count=2)
    first, second = model.graph.node
    shape = numpy_helper.from_array(np.array([2, 12, 1, 5]), "shape")
    model.graph.initializer.append(shape)
    (known,) = (a for a in second.attribute if a.name == "shape")
    graphs.replace_all(known.ints, [2, 12, 1, 5])
    reshape = helper.make_node("Reshape", [first.output[0], "shape"], ["wide"])
    second.input[0] = "wide"
    graphs.replace_all(model.graph.node, [first, reshape, second])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 12, 1, 5])
    graphs.replace_all(model.graph.output, [result])
    x = RNG.normal(size=(2, 12, 5)).astype("float32")
    expected = oracle.group_norm(x, 3, gamma, beta, 0.03, axis=1)
    expected = oracle.group_norm(expected, 3, gamma, beta, 0.03, axis=1).reshape(2, 12, 1, 5)
    got = run(expanded(model, profile), tmp_path, {"x": x})
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_store_no_more_than_vectors_and_only_portable_ones_a_batch_norm(profile, tmp_path):
    model, *_ = example([None, 12, 400, 500], 3, profile=profile)
    model = canonical(model, profile)
    assert all(np.prod(t.dims) <= 12 for t in model.graph.initializer)
    assert kinds(model)["BatchNormalization"] == (profile in ("portable", "precise"))
    onnx.save(model, tmp_path / "m.onnx")
    assert not ls.check(tmp_path / "m.onnx", select="LS1").findings


@pytest.mark.parametrize("profile", PROFILES)
def test_new_names_stay_apart_from_constants_that_are_there(profile, tmp_path):
    model, gamma, beta = example(IMAGE, 3, profile=profile)
    for i in range(3):
        model.graph.initializer.append(
            numpy_helper.from_array(np.float32(i), f"layerswap/constant{i}")
        )
    model = expanded(model, profile)
    kept = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert [kept[f"layerswap/constant{i}"] for i in range(3)] == [0, 1, 2]
    x = RNG.normal(size=(2, 12, 4, 5)).astype("float32")
    expected = oracle.group_norm(x, 3, gamma, beta, 0.03, axis=1)
    np.testing.assert_allclose(run(model, tmp_path, {"x": x}), expected, atol=2e-5)


def canonical(model, profile):
    """A model with standard operators for its GroupNorm nodes, and with every name once."""
    light, constants = graphs.lighten(model)
    expand(light, constants, profile=profile)
    canonicalize(light, constants)
    model = graphs.complete(light, constants)
    onnx.checker.check_model(model, full_check=True)
    return model


def branches(model, *, initializers=()):
    """The model with its nodes inside a branch that is taken where the input `yes` is true."""
    shape = model.graph.input[0].type.tensor_type.shape
    shape = [d.dim_value for d in shape.dim]
    body = helper.make_graph(model.graph.node, "then", [], model.graph.output, initializers)
    body.node[-1].output[0] = body.output[0].name = "inside"
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, shape)],
    )
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other)
    graphs.replace_all(model.graph.node, [choice])
    model.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    return model


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize("profile", PROFILES)
def test_nodes_in_branches_are_replaced(profile, runtime, tmp_path):
    model, gamma, beta = example([2, 12, 4, 5], 3, profile=profile)
    model = expanded(branches(model), profile)
    x = RNG.normal(size=(2, 12, 4, 5)).astype("float32")
    expected = oracle.group_norm(x, 3, gamma, beta, 0.03, axis=1)
    got = run(model, tmp_path, {"x": x, "yes": np.array(True)}, runtime)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    got = run(model, tmp_path, {"x": x, "yes": np.array(False)}, runtime)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("own", [True, False])
def test_a_branch_with_constants_of_its_own(own, profile, tmp_path):
    # Some tools write a name twice; what is inside counts there.
    gamma, beta = randomized(12)
    neutral = np.ones(12, "float32"), np.zeros(12, "float32")
    outside, inside = (neutral, (gamma, beta)) if own else ((gamma, beta), neutral)
    opset = max(18, PROFILE_OPSETS[profile])
    model = model_of([2, 12, 4, 5], 3, *outside, opset=opset)
    values = [numpy_helper.from_array(v, n) for v, n in zip(inside, "gb", strict=True)]
    model = canonical(branches(model, initializers=values), profile)
    x = RNG.normal(size=(2, 12, 4, 5)).astype("float32")
    got = run(model, tmp_path, {"x": x, "yes": np.array(True)})
    expected = oracle.group_norm(x, 3, *inside, 0.03, axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", [[2, 12], [2, 12, 4, 5]])
@pytest.mark.parametrize("inner", ["next", "g"])
def test_nodes_in_loops_may_read_what_the_loop_computes(inner, shape, profile, runtime, tmp_path):
    # Each turn normalises with γ + 1 of the last, so γ is no constant in the body, though there
    # may be one of that name outside.
    model, gamma, beta = example(shape, 3, profile=profile)
    nodes = [
        helper.make_node("Add", ["g_in", "one"], [inner]),
        helper.make_node("Identity", ["go"], ["still"]),
        *model.graph.node,
    ]
    nodes[-1].input[:2] = ["x_in", inner]
    tensor = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "body",
        [
            tensor("turn", TensorProto.INT64, []),
            tensor("go", TensorProto.BOOL, []),
            tensor("x_in", TensorProto.FLOAT, shape),
            tensor("g_in", TensorProto.FLOAT, [12]),
        ],
        [
            tensor("still", TensorProto.BOOL, []),
            tensor("y_out", TensorProto.FLOAT, shape),
            tensor(inner, TensorProto.FLOAT, [12]),
        ],
        [numpy_helper.from_array(np.ones(1, "float32"), "one")],
    )
    body.node[-1].output[0] = "y_out"
    loop = helper.make_node("Loop", ["turns", "start", "x", "g"], ["y", "last"], body=body)
    graphs.replace_all(model.graph.node, [loop])
    for name, value in (("turns", np.array(2)), ("start", np.array(True))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model = canonical(model, profile)
    x = RNG.normal(size=shape).astype("float32")
    expected = x
    for turn in (1, 2):
        expected = oracle.group_norm(expected, 3, gamma + turn, beta, 0.03, axis=1)
    got = run(model, tmp_path, {"x": x}, runtime)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", [[None, 12], [None, 12, 5], [None, 12, 4, 5]])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_an_empty_batch_stays_empty(groups, shape, profile, runtime, tmp_path):
    model, *_ = example(shape, groups, profile=profile)
    model = expanded(model, profile)
    x = np.zeros([0, *shape[1:]], "float32")
    if profile == "native":
        # ONNX defines it with a Reshape to −1, which an empty tensor doesn't settle.
        with pytest.raises(ExportError, match="failed to run"):
            run(model, tmp_path, {"x": x}, runtime)
    else:
        assert run(model, tmp_path, {"x": x}, runtime).shape == x.shape


@pytest.mark.parametrize("profile", PROFILES)
def test_second_run_changes_nothing(profile):
    model, *_ = example(IMAGE, 2, profile=profile)
    once = expanded(model, profile)
    assert expanded(once, profile) == once


def test_what_can_t_be_expanded_is_refused():
    known = ", ".join(PROFILES)
    with pytest.raises(ExportError, match=f"^unknown profile 'fast'; there is {known}$"):
        expanded(example(IMAGE, 2)[0], "fast")
    with pytest.raises(ExportError, match=r"^block/gn: 12 channels don't divide into 5 groups"):
        expanded(example(IMAGE, 5)[0])
    with pytest.raises(ExportError, match=r"^block/gn: the rank of its input isn't known"):
        expanded(example(IMAGE, 2, known=())[0])
    with pytest.raises(ExportError, match=r"'native' needs opset 21 or later, the graph has 18\n"):
        expanded(example(IMAGE, 2)[0], "native")
