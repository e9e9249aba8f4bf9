"""What two ONNX files differ in: interface, operators, weights, opsets, metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import onnx
from onnx import defs

from layerswap import weight_norms
from layerswap.difference_text import describe_groupnorm
from layerswap.errors import reading
from layerswap.onnx_graph.constants import Constant
from layerswap.onnx_graph.flat import Flat, Node, Output, Ref, flatten, graph_inputs
from layerswap.onnx_graph.interface import interface_differences, matched_names
from layerswap.onnx_graph.matching import BATCHNORM, Pairs, match
from layerswap.onnx_graph.reading import read_model
from layerswap.onnx_graph.recognition import GROUPNORM, SETTINGS, recognize
from layerswap.records import Difference

_FOLDED = "a BatchNormalization may be folded into the first's weights before it"


def onnx_differences(first: Path, second: Path) -> list[Difference]:
    """Compares two ONNX files by what they compute, not by how tensors and nodes are called.

    Raises:
        LoadError: one of them can't be read as a model.
    """
    one, other = read_model(first), read_model(second)
    inputs = matched_names(graph_inputs(one.graph), graph_inputs(other.graph))
    outputs = matched_names(one.graph.output, other.graph.output)
    before = _flat(one, first, {})
    after = _flat(other, second, {twin: name for name, twin in inputs.items()})
    found = [*_opsets(one, other, before, after)]
    found += interface_differences(one, other, inputs, outputs)
    found += _Operators(before, after, match(before, after, outputs)).differences(outputs)
    if one.training_info or other.training_info:
        found.append(Difference("LS910", "training_info", "training graphs aren't compared"))
    return [*found, *_metadata(one, other)]


def _flat(model: onnx.ModelProto, path: Path, ports: Mapping[str, str]) -> Flat:
    with reading(os.fspath(path), "its graph can't be read", "Copy or export it again."):
        flat = flatten(model, path.resolve().parent, ports)
        recognize(flat)
    return flat


# --- operators ----------------------------------------------------------------------------


class _Operators:
    """Compares operators that were paired, and tells those that weren't."""

    def __init__(self, first: Flat, second: Flat, pairs: Pairs) -> None:
        self._first, self._second = first, second
        self._second_of = pairs.second_of
        self._alike = pairs.alike
        self._taken = set(pairs.second_of.values())
        self._told: set[tuple[int, int]] = set()
        self._closed: dict[str, list[str]] = {}

    def differences(self, outputs: Mapping[str, str]) -> Iterator[Difference]:
        for node in self._first.nodes:
            if node not in self._second_of:
                yield Difference("LS903", node.name, f"{_described(node)} is removed")
        for node in self._second.nodes:
            if node not in self._taken:
                text = f"{_described(node)} is added"
                if node.op == GROUPNORM:
                    text = f"{_in_words(node)} is added; {_FOLDED}"
                yield Difference("LS902", node.name, text)
        for one, other in self._second_of.items():
            yield from self._pair(one, other)
        for name, twin in outputs.items():
            before, after = self._first.outputs[name], self._second.outputs[twin]
            yield from self._inputs(name, "made by", before, after)
        for reason, names in self._closed.items():
            count = "a weight isn't" if len(names) == 1 else f"{len(names)} weights aren't"
            yield Difference("LS910", names[0], f"{count} compared: {reason}")

    def _pair(self, one: Node, other: Node) -> Iterator[Difference]:
        if one.op == BATCHNORM and other.op == GROUPNORM:
            yield self._swapped(one, other)
            slots = ["0"]
        elif (one.op, other.op) == (GROUPNORM, BATCHNORM):
            yield Difference("LS904", one.name, "operator", _described(one), other.op)
            slots = ["0"]
        else:
            yield from _settings(one, other)
            slots = list(dict.fromkeys((*one.inputs, *other.inputs)))
        norms = one.op == other.op == GROUPNORM and one.made_of != other.made_of
        for slot in slots:
            before, after = one.inputs.get(slot), other.inputs.get(slot)
            if before is None or after is None:
                texts = (None if ref is None else _source(ref) for ref in (before, after))
                old, new = texts
                yield Difference("LS904", one.name, _slot(one, slot), old, new)
            elif one not in self._alike or not isinstance(before, Output):
                yield from self._inputs(one.name, _slot(one, slot), before, after, norms)

    def _swapped(self, one: Node, other: Node) -> Difference:
        pairs = []
        for slot in "12":
            before, after = one.inputs.get(slot), other.inputs.get(slot)
            if isinstance(before, Constant) and isinstance(after, Constant):
                readable = not before.missing and not after.missing
                if readable and before.size == after.size:
                    pairs.append((before.value(), after.value()))
        parts = (part for pair in pairs for part in weight_norms.pieces(*pair))
        message = f"{BATCHNORM} → {_described(other)}"
        return Difference("LS901", one.name, message, norms=weight_norms.compare(parts))

    def _inputs(
        self, where: str, slot: str, before: Ref, after: Ref, norms: bool = False
    ) -> Iterator[Difference]:
        """What feeds a slot: another constant, or another operator; perhaps one of two `norms`."""
        if isinstance(before, Constant) and isinstance(after, Constant):
            yield from self._constants(where, slot, before, after, norms)
        elif isinstance(before, Output) and isinstance(after, Output):
            same = self._second_of.get(before.node) is after.node and before.number == after.number
            if not same and self._is_known(before) and self._is_known(after):
                yield Difference("LS904", where, slot, _source(before), _source(after))
        elif before != after and self._is_known(before) and self._is_known(after):
            yield Difference("LS904", where, slot, _source(before), _source(after))

    def _is_known(self, ref: Ref) -> bool:
        """Whether it is in both models: what makes it may be told as added or removed."""
        if not isinstance(ref, Output):
            return True
        return ref.node in self._second_of or ref.node in self._taken

    def _constants(
        self, where: str, slot: str, one: Constant, other: Constant, norms: bool
    ) -> Iterator[Difference]:
        key = (id(one), id(other))
        if key in self._told:
            return
        self._told.add(key)
        reasons = list(dict.fromkeys(filter(None, (one.missing, other.missing))))
        if one.type != other.type and not (norms and _same_but_for_axes(one, other)):
            if one.is_setting and other.is_setting:
                yield Difference("LS904", where, slot, one.text(), other.text())
            else:
                yield Difference("LS906", one.name, "type or shape", one.type, other.type)
        elif reasons:
            self._closed.setdefault("; ".join(reasons), []).append(one.name)
        elif one.digest == other.digest:
            return
        elif one.is_setting or one.type.startswith("string"):
            yield Difference("LS904", where, slot, one.text(), other.text())
        elif own := weight_norms.compare(weight_norms.pieces(one.value(), other.value())):
            yield Difference("LS906", one.name, "values differ", norms=own)


def _same_but_for_axes(one: Constant, other: Constant) -> bool:
    """Whether both may be one γ or β, as each spelling has it."""
    kinds = {value.type.partition("[")[0] for value in (one, other)}
    return len(kinds) == 1 and one.size == other.size


def _settings(one: Node, other: Node) -> Iterator[Difference]:
    if one.op != other.op:
        yield Difference("LS904", one.name, "operator", _described(one), _described(other))
    elif one.made_of != other.made_of:
        yield Difference("LS904", one.name, "spelled as", one.made_of or one.op, other.made_of)
    keys = {**one.attributes, **other.attributes} if one.op == other.op else {}
    if one.made_of != other.made_of:
        keys = {key: None for key in keys if key in SETTINGS}  # the others belong to the spelling
    for key in keys:
        before, after = (
            repr(x.attributes[key]) if key in x.attributes else None for x in (one, other)
        )
        if before != after:
            yield Difference("LS904", one.name, key, before, after)


def _described(node: Node) -> str:
    if node.op != GROUPNORM:
        return node.op
    form = f", as {node.made_of}" if node.made_of and node.made_of != GROUPNORM else ""
    return f"{_in_words(node)}{form}"


def _in_words(norm: Node) -> str:
    groups, epsilon = (norm.attributes.get(key) for key in SETTINGS)
    return describe_groupnorm(groups, epsilon)


def _source(ref: Ref) -> str:
    if isinstance(ref, Constant):
        return f"the constant {ref.name}"
    if isinstance(ref, Output):
        return f"{ref.node.op} {ref.node.name}" + (f":{ref.number}" if ref.number else "")
    return ref.name


@lru_cache(maxsize=1024)
def _slot_names(op: str) -> tuple[str, ...]:
    domain, _, op_type = op.rpartition(".")
    return (
        tuple(i.name for i in defs.get_schema(op_type, domain).inputs)
        if defs.has(op_type, domain)
        else ()
    )


def _slot(node: Node, slot: str) -> str:
    """An input as the operator's documentation calls it."""
    names = _slot_names(node.op)
    known = slot.isdecimal() and int(slot) < len(names)
    return f"input {names[int(slot)]}" if known else f"input {slot}"


# --- the model around them ----------------------------------------------------------------


def _opsets(
    one: onnx.ModelProto, other: onnx.ModelProto, first: Flat, second: Flat
) -> Iterator[Difference]:
    used = {node.op.rpartition(".")[0] for flat in (first, second) for node in flat.nodes}
    before, after = (
        {
            "" if entry.domain == "ai.onnx" else entry.domain: str(entry.version)
            for entry in model.opset_import
        }
        for model in (one, other)
    )
    for domain in sorted(used | {""}):
        if before.get(domain) != after.get(domain):
            where = domain or "ai.onnx"
            yield Difference("LS907", where, "opset", before.get(domain), after.get(domain))


def _metadata(one: onnx.ModelProto, other: onnx.ModelProto) -> Iterator[Difference]:
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        before, after = (str(getattr(model, name)) for model in (one, other))
        if before != after:
            yield Difference("LS909", name, "metadata", before, after)
    properties = [{entry.key: entry.value for entry in m.metadata_props} for m in (one, other)]
    for key in sorted({key for own in properties for key in own}):
        old, new = (own.get(key) for own in properties)
        if old != new:
            yield Difference("LS909", f"metadata_props/{key}", "metadata", old, new)
