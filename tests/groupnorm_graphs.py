"""Small graphs of GroupNorm nodes, and the way from them to standard operators."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper

from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.groupnorm import expand


def model_of(shape, groups, gamma, beta, *, known=None, count=1, epsilon=0.03, opset=18):
    """`count` GroupNorm nodes in a row, as tf2onnx makes them.

    Args:
        shape: of the input; None axes are dynamic.
        groups: number of groups.
        gamma, beta: one float32 value per channel.
        known: the nodes' attribute `shape`; () leaves it out. None means: as in `shape`.
        count: number of nodes.
        epsilon: added to each group's variance.
        opset: version of the operator set.
    """
    known = [-1 if n is None else n for n in shape] if known is None else known
    attributes = {
        "groups": groups,
        "channels": len(gamma),
        "epsilon": epsilon,
        "path": "block/gn",
        **({"shape": known} if known else {}),
    }
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [
        helper.make_node("GroupNorm", [a, "g", "b"], [b], domain="layerswap", **attributes)
        for a, b in itertools.pairwise(names)
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    weights = [onnx.numpy_helper.from_array(v, n) for v, n in ((gamma, "g"), (beta, "b"))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    imports = [helper.make_opsetid("layerswap", 1), helper.make_opsetid("", opset)]
    ir_version = helper.find_min_ir_version_for(imports[1:])
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def expanded(model, profile="portable"):
    """A model with standard operators for its GroupNorm nodes, checked."""
    light, constants = graphs.lighten(model)
    expand(light, constants, profile=profile)
    complete = graphs.complete(light, constants)
    graphs.replace_all(complete.opset_import, [o for o in light.opset_import if not o.domain])
    onnx.checker.check_model(complete, full_check=True)
    return complete


def randomized(channels, seed=3):
    """γ about 1 and β about 0, nothing at a default."""
    rng = np.random.default_rng(seed)
    return [rng.normal(mean, 0.3, channels).astype("float32") for mean in (1, 0)]
