"""What is known to fail in a runtime, each with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from layerswap.onnx_graph import facts_onnxruntime, facts_opencv, facts_openvino, facts_tensorrt
from layerswap.onnx_graph.facts import Fact
from layerswap.onnx_graph.views import GraphView

FACTS: Mapping[str, tuple[Fact, ...]] = {
    "onnxruntime": facts_onnxruntime.FACTS,
    "openvino": facts_openvino.FACTS,
    "opencv": facts_opencv.FACTS,
    "tensorrt": facts_tensorrt.FACTS,
}


def failures(target: str, view: GraphView) -> Iterator[tuple[str, str, str]]:
    """What of a graph is known to fail in a runtime.

    Args:
        target: one of `criteria.TARGETS`.
        view: the graph.

    Yields:
        Place (empty for the file as a whole), message with its source, and remedy of each.
    """
    for fact in FACTS[target]:
        yield from fact.failures(view)
