"""What the rules of a graph are given, and a few words that they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerswap.criteria import Criteria
from layerswap.onnx_graph import external
from layerswap.onnx_graph.normalizations import Norm
from layerswap.onnx_graph.tensors import decode
from layerswap.onnx_graph.views import GraphView, Place, Scope
from layerswap.records import Array


@dataclass(slots=True, eq=False)
class Subject:
    """A file under check.

    Attributes:
        path: where it is.
        view: what is in it.
        norms: its normalizations.
        criteria: what it is judged by.
    """

    path: Path
    view: GraphView
    norms: list[Norm]
    criteria: Criteria

    def value(self, name: str, scope: Scope) -> Array | None:
        """A constant's value; from outside the file only where weights are to be read."""
        tensor = scope.tensor(name)
        if tensor is None or not external.is_outside(tensor):
            return scope.array(name) if tensor is None else decode(tensor)
        return external.read(tensor, self.path.parent) if self.criteria.weights else None


def inside(place: Place) -> str:
    """What an operator lies in, as the end of a sentence."""
    parents = place.record.parents
    return f" in {' › '.join(parents)}" if parents else ""
