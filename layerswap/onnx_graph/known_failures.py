"""What is known to fail in a runtime, each with its source.

`make docs` writes the page `docs/targets.md`; `python -m layerswap.onnx_graph.known_failures`
prints it.
"""

from __future__ import annotations

import re
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

_INTRODUCTION = """\
# Known failures of runtimes

What `layerswap check --target RUNTIME` looks for: operators and forms that a runtime refuses, or
answers wrongly. It is what is known, not all there is: `layerswap verify --runtime` runs the file.
"Measured" is what a test of layerswap repeats, on a graph that trips it and on one that comes close
and works.

<!-- Made of layerswap/onnx_graph/facts_*.py by `make docs`. -->
"""


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


def to_markdown() -> str:
    """The page: a table for each runtime."""
    parts = [_INTRODUCTION]
    for target, facts in FACTS.items():
        rows = ["| known failure | what happens | remedy | source |", "|---|---|---|---|"]
        for fact in facts:
            source = re.sub(r"https://[^;,\s]+", r"<\g<0>>", fact.source)
            texts = (fact.failure, fact.remedy)
            cells = (fact.name, *(text.replace("|", "\\|").replace("_", "\\_") for text in texts))
            rows.append(f"| {' | '.join((*cells, source))} |")
        parts.append(f"## {target}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(to_markdown(), end="")
