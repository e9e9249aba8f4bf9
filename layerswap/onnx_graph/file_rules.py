"""What can be wrong with a file as such: its interface, what lies beside it, its origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx

from layerswap import catalog
from layerswap.errors import LoadError
from layerswap.onnx_graph import external
from layerswap.onnx_graph.metadata import GROUPNORMS, MODEL, read_metadata, read_sites
from layerswap.onnx_graph.normalizations import Norm
from layerswap.onnx_graph.subjects import Subject
from layerswap.onnx_graph.tensors import bytes_wanted
from layerswap.records import Finding, LayerRecord
from layerswap.references import OTHER_FILE, fingerprint, load_reference, reference_path


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
        file = folder / entry.location
        try:
            size = file.stat().st_size if file.is_file() else None
        except OSError:  # no file can have such a name
            size = None
        if size is None:
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
    model = subject.view.model
    said = read_metadata(model)
    if MODEL not in said:
        yield catalog.find("metadata-missing").finding("", f"has no {MODEL} in its metadata")
    if GROUPNORMS in said:
        sites = read_sites(model)
        message = "can't be read" if sites is None else _compare(sites, subject.norms)
        if message:
            yield catalog.find("metadata-stale").finding(GROUPNORMS, message)
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


def _compare(sites: list[LayerRecord], norms: list[Norm]) -> str:
    """In what the graph differs from the table of its GroupNormalizations; empty if in nothing."""
    spelled = Counter(
        _signature(norm.record.groups, norm.record.epsilon)
        for norm in norms
        if norm.kind == "group"
    )
    # One group, or one for each channel, written by hand, doesn't show how many there are.
    by_hand = Counter(
        _signature(0, norm.record.epsilon)[1]
        for norm in norms
        if norm.kind == "other" and norm.variance is not None
    )
    for site in sites:
        signature = _signature(site.groups, site.epsilon)
        if spelled[signature] > 0:
            spelled[signature] -= 1
        elif by_hand[signature[1]] > 0:
            by_hand[signature[1]] -= 1
        else:
            return (
                f"names {len(sites)} GroupNormalizations, and that of {site.path}, {site.groups} "
                f"groups and epsilon {site.epsilon:.6g}, isn't in the graph"
            )
    return ""


def _signature(groups: int | None, epsilon: float | None) -> tuple[int | None, float | None]:
    """What a site and an operator have in common; ONNX keeps an epsilon in float32."""
    return groups, None if epsilon is None else float(np.float32(epsilon))
