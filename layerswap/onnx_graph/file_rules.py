"""What can be wrong with a file as such: its interface, what lies beside it, its origin."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx

from layerswap import catalog
from layerswap.errors import LoadError
from layerswap.layer_rules import compare_groups
from layerswap.onnx_graph import external
from layerswap.onnx_graph.normalizations import Norm
from layerswap.onnx_graph.subjects import Subject
from layerswap.onnx_graph.tensors import bytes_wanted
from layerswap.records import Finding, LayerRecord
from layerswap.references import OTHER_FILE, fingerprint, load_reference, reference_path

_TABLE = "layerswap.groupnorms"


def judge_interface(subject: Subject) -> Iterator[Finding]:
    """Open axes of inputs and outputs: LS701."""
    allowed = subject.criteria.dynamic
    if allowed == "any":
        return
    graph = subject.view.model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    for kind, values in (("input", inputs), ("output", graph.output)):
        for value in values:
            text = _open_axes(value, allowed)
            if text:
                yield catalog.find("dynamic-dimensions").finding(
                    value.name, f"the {kind} has {text}"
                )


def _open_axes(value: onnx.ValueInfoProto, allowed: str) -> str:
    if not value.type.HasField("tensor_type"):
        return ""  # sequences and optionals have no fixed shape
    if not value.type.tensor_type.HasField("shape"):
        return "no shape at all"
    axes = value.type.tensor_type.shape.dim
    open_ = [
        f"{index} ({axis.dim_param or '?'})"
        for index, axis in enumerate(axes)
        if not axis.HasField("dim_value") and not (allowed == "batch" and index == 0)
    ]
    return f"open axes: {', '.join(open_)}" if open_ else ""


def judge_external(subject: Subject) -> Iterator[Finding]:
    """Weights outside the file, without reading them: LS702, LS703, LS704."""
    folder = subject.path.parent
    missing: Counter[str] = Counter()
    strangers: Counter[str] = Counter()
    for name, tensor in subject.view.tensors:
        if not external.is_outside(tensor):
            continue
        entry = external.read_entry(tensor)
        if entry is None:
            yield catalog.find("external-data-size").finding(
                name, "its values are outside the file, but where isn't said so that it makes sense"
            )
            continue
        if not external.is_within(entry.location, folder):
            strangers[entry.location] += 1
            continue
        try:
            size = (folder / entry.location).stat().st_size
        except OSError:
            missing[entry.location] += 1
            continue
        wanted = bytes_wanted(tensor)
        length = entry.length if entry.length is not None else wanted or 0
        if wanted is not None and length != wanted:
            message = f"takes {wanted} bytes, but {entry.location} should hold {length} of it"
        elif entry.offset + length > size:
            message = f"ends at byte {entry.offset + length} of {entry.location}, which has {size}"
        else:
            continue
        yield catalog.find("external-data-size").finding(name, message)
    for code, places in (("external-data-missing", missing), ("external-data-outside", strangers)):
        for location, count in places.items():
            yield catalog.find(code).finding(
                location,
                f"{count} {'tensor has its' if count == 1 else 'tensors have their'} values there",
            )


def judge_origin(subject: Subject) -> Iterator[Finding]:
    """What layerswap wrote into the file and beside it: LS711, LS712, LS713."""
    said = {item.key: item.value for item in subject.view.model.metadata_props}
    if "layerswap.model" not in said:
        yield catalog.find("metadata-missing").finding("", "has no layerswap.model in its metadata")
    if _TABLE in said:
        message = _compare(said[_TABLE], subject.norms)
        if message:
            yield catalog.find("metadata-stale").finding(_TABLE, message)
    outside = any(external.is_outside(tensor) for _, tensor in subject.view.tensors)
    reference = reference_path(subject.path)
    if not reference.is_file() or (outside and not subject.criteria.weights):
        return
    try:
        differs = load_reference(reference).sha256 != fingerprint(subject.path)
    except LoadError as error:
        yield catalog.find("checksum-mismatch").finding(str(reference), error.message, error.hint)
        return
    if differs:
        yield catalog.find("checksum-mismatch").finding(str(reference), OTHER_FILE)


def _compare(table: str, norms: list[Norm]) -> str:
    """In what the graph differs from the table of its GroupNormalizations; empty if in nothing."""
    try:
        sites = [_signature(site) for site in _sites(table)]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return "its table of GroupNormalizations can't be read"
    spelled = Counter(_signature(norm.record) for norm in norms if norm.kind == "group")
    # One group, or one for each channel, written by hand, doesn't show how many there are.
    by_hand = Counter(
        _signature(norm.record)[1]
        for norm in norms
        if norm.kind == "other" and norm.variance is not None
    )
    for site in sites:
        if spelled[site] > 0:
            spelled[site] -= 1
        elif by_hand[site[1]] > 0:
            by_hand[site[1]] -= 1
        else:
            groups, epsilon = site
            return (
                f"names {len(sites)} GroupNormalizations, and one with {groups} groups and epsilon "
                f"{epsilon:.6g} isn't in the graph"
            )
    return ""


def _sites(table: str) -> list[LayerRecord]:
    """The GroupNormalizations that an export noted, under their paths in the Keras model."""
    return [
        LayerRecord(
            str(site.get("path", "")),
            "GroupNormalization",
            "",
            (),
            channels=None if site.get("channels") is None else int(site["channels"]),
            groups=int(site["groups"]),
            epsilon=float(site["epsilon"]),
        )
        for site in json.loads(table)
    ]


def _signature(record: LayerRecord) -> tuple[int | None, float | None]:
    """What a site and an operator have in common; ONNX keeps an epsilon in float32."""
    epsilon = None if record.epsilon is None else float(np.float32(record.epsilon))
    return record.groups, epsilon


def judge_groups(subject: Subject) -> Iterator[Finding]:
    """Whether groups are those of the policy: LS202.

    A policy names layers by their paths in the Keras model, which only the table of the export has.
    """
    said = {item.key: item.value for item in subject.view.model.metadata_props}
    try:
        sites = _sites(said.get(_TABLE, "[]"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        sites = []
    noted: dict[tuple[int | None, float | None], list[LayerRecord]] = {}
    for site in sites:
        noted.setdefault(_signature(site), []).append(site)
    by_hand = Counter(_signature(norm.record)[1] for norm in subject.norms if norm.kind == "other")
    for norm in subject.norms:
        if norm.kind == "group":
            same, record = noted.get(_signature(norm.record)), norm.record
            if same:
                site = same.pop(0)
                record = replace(site, channels=record.channels or site.channels)
            yield from compare_groups(record, subject.criteria)
    for (_, epsilon), others in noted.items():  # written by hand, without a sign of groups
        for site in others[: by_hand[epsilon]]:
            yield from compare_groups(site, subject.criteria)
