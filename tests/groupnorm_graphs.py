"""Small graphs of GroupNorm nodes, the way from them to standard operators, and hard inputs.

Shared by the tests and `benchmarks/precision.py`.
"""

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


# Hard inputs: values of (2, 32, 8, 8) and ε, standard normal and 1e-3 but for what the name says.
# Groups of 4 channels have 256 values.
GROUPS, CHANNELS, LENGTH = 8, 32, 256


def _hard():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2, CHANNELS, 8, 8))
    offsets = rng.choice([-100.0, 100.0], (1, CHANNELS, 1, 1))
    return {
        "normal": (normal, 1e-3),
        "mean 1e3": (normal + 1e3, 1e-3),
        "mean 1e4": (normal + 1e4, 1e-3),
        "mean 1e3, ε 1e-7": (normal + 1e3, 1e-7),
        "constant 1234.567": (np.full_like(normal, 1234.567), 1e-3),
        "deviation 1e-8": (normal * 1e-8, 1e-3),
        "deviation 1e-8, ε 1e-18": (normal * 1e-8, 1e-18),
        "mean 3, ε 0": (normal + 3.0, 0.0),
        "channel means ±100": (normal + offsets, 1e-3),
        "group means ±100": (normal + np.repeat(offsets[:, ::4], 4, axis=1), 1e-3),
        "deviation 1e15": (normal * 1e15, 1e-3),
        "ninth power": (normal**9, 1e-3),
    }


HARD = _hard()


def exact_affine():
    """γ and β for `HARD`.

    Powers of two and zeros multiply and add without an error of their own.
    """
    return np.tile(np.array([1, -2], "float32"), CHANNELS // 2), np.zeros(CHANNELS, "float32")
