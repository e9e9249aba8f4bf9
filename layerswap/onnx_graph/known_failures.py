"""What is known to fail in a runtime, each with its source."""

from __future__ import annotations

from collections.abc import Iterator

from layerswap.onnx_graph.views import GraphView


def failures(target: str, view: GraphView) -> Iterator[tuple[str, str, str]]:
    """Place, message and remedy of each."""
    yield from ()
