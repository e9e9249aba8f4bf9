"""Complete ONNX models in memory, which the library itself never makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from layerswap.onnx_graph.build import assemble
from layerswap.onnx_graph.graphs import complete


def build(
    graph: onnx.ModelProto, arrays: Mapping[str, Any], *args: Any, **options: Any
) -> onnx.ModelProto:
    """What `assemble` makes, as one message; takes its arguments."""
    return complete(*assemble(graph, arrays, *args, **options))
