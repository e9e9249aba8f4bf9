"""From a traced graph and its weights to a complete one: the one way through this room."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import checker

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.attach import attach
from layerswap.onnx_graph.canonical import canonicalize
from layerswap.onnx_graph.float16 import to_float16
from layerswap.onnx_graph.groupnorm import expand
from layerswap.onnx_graph.opsets import raise_opset
from layerswap.onnx_graph.repairs import repair
from layerswap.onnx_graph.targets import TARGETS
from layerswap.records import Array


def assemble(
    graph: onnx.ModelProto,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    *,
    version: str = "",
    profile: str = "portable",
    opset: int | None = None,
    float16: bool = False,
    target: str | None = None,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A canonical, checked graph without initializers, and the value of each of them.

    Args:
        graph: as the bridge made it; not changed.
        arrays: value of each graph input that stands for a weight.
        metadata: properties to write into the model.
        version: producer version to write.
        profile: how GroupNormalization is spelled, a key of `groupnorm.PROFILES`.
        opset: version of the ONNX operator set, if newer than the graph's.
        target: the runtime to tune the graph for, a key of `targets.TARGETS`.
        float16: compute in float16 except where that would lose too much.

    Raises:
        ExportError: the graph is not valid ONNX, a weight isn't what the graph expects, or
            something doesn't fit into the opset or into float16.
    """
    light, constants = graphs.lighten(graph)
    attach(light, constants, arrays)
    repair(light, constants)
    if float16:
        to_float16(light, constants)
    raise_opset(light, constants, opset or 0)
    expand(light, constants, profile=profile)
    if target:
        TARGETS[target](light, constants)
    canonicalize(light, constants, version=version, metadata=metadata)
    check(light, constants)
    return light, constants


def check(light: onnx.ModelProto, constants: Mapping[str, Array]) -> None:
    """Runs the ONNX checker with strict shape inference, whatever the weights' size.

    Args:
        light: a model without initializers; not changed.
        constants: value of each initializer.

    Raises:
        ExportError: the model is not valid; holds the checker's reason.
    """
    try:
        checker.check_model(graphs.typed(light, constants), full_check=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"the graph is not valid ONNX: {reason[0]}") from error
