"""What a known failure of a runtime is made of, and how its places are found in a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import onnx

from layerswap.onnx_graph.graphs import attribute
from layerswap.onnx_graph.subjects import inside
from layerswap.onnx_graph.views import STANDARD, GraphView, Place, Shape
from layerswap.records import Array

# Where something is, and what it is.
Found = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that is known to fail in a runtime.

    Attributes:
        name: stable, kebab-case, unique within a runtime.
        find: the places in a graph.
        failure: what happens, and in which versions where that isn't all that were tried.
        remedy: what to do instead.
        source: an address, or `measured with PACKAGE VERSION`; a test repeats the measurement.
    """

    name: str
    find: Callable[[GraphView], Found]
    failure: str
    remedy: str
    source: str

    def failures(self, view: GraphView) -> Iterator[tuple[str, str, str]]:
        """Place, message and remedy of each."""
        for where, what in self.find(view):
            yield where, f"{what}: {self.failure} ({self.source})", self.remedy


def operators(
    *names: str,
    when: Callable[[Place], bool] = lambda _: True,
    domains: Container[str] = STANDARD,
) -> Callable[[GraphView], Found]:
    """Finds operators of these names (of any, where none is given) for which `when` holds."""

    def find(view: GraphView) -> Found:
        for place in view.places:
            node = place.node
            if names and node.op_type not in names:
                continue
            if node.domain not in domains or (node.domain, node.op_type) in view.functions:
                continue  # a local function is looked at in its own place
            if when(place):
                name = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
                yield place.record.path, f"is a {name}{inside(place)}"

    return find


def interface(when: Callable[[onnx.TypeProto], bool]) -> Callable[[GraphView], Found]:
    """Finds inputs and outputs of the file by their type."""

    def find(view: GraphView) -> Found:
        graph = view.model.graph
        weights = {tensor.name for tensor in graph.initializer}
        for direction, values in (("input", graph.input), ("output", graph.output)):
            for value in values:
                if value.name not in weights and when(value.type):
                    yield value.name, f"is an {direction} of the type {_type_name(value.type)}"

    return find


def opset(when: Callable[[int], bool]) -> Callable[[GraphView], Found]:
    """Finds the opset of the standard operators."""

    def find(view: GraphView) -> Found:
        for entry in view.model.opset_import:
            if entry.domain in STANDARD and when(entry.version):
                yield "", f"has the opset {entry.version}"

    return find


def _type_name(kind: onnx.TypeProto) -> str:
    which = kind.WhichOneof("value") or "unknown"
    if which != "tensor_type":
        return which.removesuffix("_type")
    element = kind.tensor_type.elem_type
    known = element in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(element)).lower() if known else str(element)


# --- what the rules of all runtimes ask of an operator --------------------------------------


def text(place: Place, name: str, default: str = "") -> str:
    """An attribute that is text."""
    value = attribute(place.node, name, default)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def number(place: Place, name: str, default: float = 0) -> float:
    """An attribute that is a number."""
    value = attribute(place.node, name, default)
    return value if isinstance(value, int | float) else default


def numbers(place: Place, name: str) -> list[int]:
    """An attribute that is a list of integers; empty where there is none."""
    values = attribute(place.node, name, [])
    return [v for v in values if isinstance(v, int)] if isinstance(values, list) else []


def array(place: Place, index: int) -> Array | None:
    """The value of an input, where it is a small constant."""
    name = place.input(index)
    return place.scope.array(name) if name else None


def dtype(place: Place, index: int = 0) -> str:
    """The type of an input; empty where it isn't known."""
    name = place.input(index)
    return place.scope.dtype(name) if name else ""


def shape(place: Place, index: int = 0) -> Shape | None:
    """The shape of an input, where its number of axes is known."""
    name = place.input(index)
    return place.scope.shape(name) if name else None


def rank(place: Place, index: int = 0) -> int | None:
    """How many axes an input has."""
    known = shape(place, index)
    return None if known is None else len(known)


def is_open(place: Place) -> bool:
    """Whether the first input has an axis whose size isn't fixed."""
    known = shape(place)
    return known is not None and None in known


def constant(place: Place, index: int) -> bool:
    """Whether an input is a constant, be it large or small."""
    name = place.input(index)
    return bool(name) and (
        place.scope.tensor(name) is not None or place.scope.array(name) is not None
    )


def computed(place: Place, index: int) -> bool:
    """Whether an input is there, and no constant."""
    return bool(place.input(index)) and not constant(place, index)


def gives(place: Place, index: int) -> bool:
    """Whether an output is asked for."""
    return index < len(place.node.output) and bool(place.node.output[index])


def made_by(place: Place, index: int, op_type: str) -> Place | None:
    """The operator behind an input, if it is one of this kind."""
    maker = place.scope.maker(place.input(index))
    return maker if maker is not None and maker.is_a(op_type) else None


def any_dtype(*names: str) -> Callable[[Place], bool]:
    """Whether the first input has one of these types."""
    return lambda place: dtype(place) in names


def same_padding(place: Place) -> str:
    """`SAME_UPPER` or `SAME_LOWER` where an operator pads like that, else empty."""
    mode = text(place, "auto_pad")
    return mode if re.fullmatch("SAME_(UPPER|LOWER)", mode) else ""
