"""What can be wrong with the operators of a graph, and with their versions."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx
from onnx import checker, defs

from layerswap import catalog
from layerswap.onnx_graph.known_failures import failures
from layerswap.onnx_graph.subjects import Subject, inside
from layerswap.onnx_graph.views import STANDARD, Place
from layerswap.records import Finding

# Operators of these domains are in onnx itself.
_PUBLIC = (
    *STANDARD,
    "ai.onnx.ml",
    "ai.onnx.preview",
    "ai.onnx.preview.training",
    "ai.onnx.training",
)
# Runtimes whose operators are documented: by the beginning of their domain.
_VENDORS = ("com.microsoft", "ai.onnx.contrib")
# What of these only carries something: a compiled graph, Python, PyTorch's operators by name.
_OPAQUE = frozenset({"ATen", "ATenOp", "EPContext", "PyOp", "PythonOp", "PythonOpGrad", "TritonOp"})
_SHORT = 300


def judge_operators(subject: Subject) -> Iterator[Finding]:
    """Operators that the file's opset doesn't have, and those outside the standard: LS0, LS3."""
    found = []
    for place in subject.view.places:
        node = place.node
        if (node.domain, node.op_type) in subject.view.functions:
            continue  # its operators are looked at in their own place
        if node.domain in _PUBLIC:
            found += list(_judge_version(place))
        elif _is_vendors(node.domain) and node.op_type not in _OPAQUE:
            found.append(
                catalog.find("vendor-operator").finding(
                    place.record.path, f"is a {node.domain}.{node.op_type}{inside(place)}"
                )
            )
        elif "batchnorm" not in node.op_type.lower().replace("_", ""):  # that has a rule of its own
            found.append(
                catalog.find("custom-operator").finding(
                    place.record.path,
                    f"is a {node.domain}.{node.op_type}{inside(place)}, which only its own "
                    "runtime knows",
                )
            )
    yield from found
    yield from _judge_opset(subject)
    # The checker stops at the first error; what was said already needs not be said again.
    if not {"LS302", "LS303"}.intersection(finding.code for finding in found):
        yield from _ask_checker(subject)


def _is_vendors(domain: str) -> bool:
    return any(domain == name or domain.startswith(f"{name}.") for name in _VENDORS)


def judge_targets(subject: Subject) -> Iterator[Finding]:
    """What is known to fail in the runtimes that the file is meant for: LS4."""
    for target in subject.criteria.target:
        rule = catalog.find(f"fails-in-{target}")
        for where, message, remedy in failures(target, subject.view):
            yield rule.finding(where, message, remedy)


def _judge_version(place: Place) -> Iterator[Finding]:
    node = place.node
    domain = "" if node.domain in STANDARD else node.domain
    if not place.opset:
        return  # the checker says that the file has no opset for it
    name = f"{domain}.{node.op_type}" if domain else node.op_type
    known = _newest(domain)
    status = _status(domain, node.op_type, place.opset)
    if status == "unknown":
        newer = place.opset > known
        yield catalog.find("unknown-operator").finding(
            place.record.path,
            f"is a {name}{inside(place)}, which opset {place.opset} doesn't have"
            + (f" as far as onnx {onnx.__version__} knows" if newer else ""),
            severity="undetermined" if newer else None,
        )
    elif status == "deprecated":
        yield catalog.find("deprecated-operator").finding(
            place.record.path, f"is a {name}{inside(place)}, deprecated in opset {place.opset}"
        )


@functools.cache
def _newest(domain: str) -> int:
    if not domain:
        return int(defs.onnx_opset_version())
    versions = [s.since_version for s in defs.get_all_schemas_with_history() if s.domain == domain]
    return max(versions, default=0)


@functools.cache
def _status(domain: str, op_type: str, opset: int) -> str:
    """Whether an opset has an operator: `fine`, `deprecated` or `unknown`."""
    try:
        schema = defs.get_schema(op_type, min(opset, 2**31 - 1), domain)
    except Exception:  # onnx's SchemaError, or pybind's for a version that makes no sense
        return "unknown"
    # Its first version was withdrawn, which onnx 1.16 doesn't know.
    withdrawn = (domain, op_type, schema.since_version) == ("", "GroupNormalization", 18)
    return "deprecated" if schema.deprecated or withdrawn else "fine"


def _judge_opset(subject: Subject) -> Iterator[Finding]:
    least, most = subject.criteria.min_opset, subject.criteria.max_opset
    if least is None and most is None:
        return
    for entry in subject.view.model.opset_import:
        if entry.domain not in STANDARD:
            continue
        if (least and entry.version < least) or (most and entry.version > most):
            bounds = f"{least or 1} to {most}" if most else f"{least} or above"
            yield catalog.find("opset-out-of-range").finding(
                "", f"has opset {entry.version}, allowed is {bounds}"
            )


def _ask_checker(subject: Subject) -> Iterator[Finding]:
    model = subject.view.model
    newest = int(onnx.IR_VERSION)
    if model.ir_version > newest:
        yield catalog.find("invalid-graph").finding(
            "",
            f"has IR version {model.ir_version}, and onnx {onnx.__version__} knows up to {newest}",
            "Install a newer onnx.",
            severity="undetermined",
        )
        return
    try:
        checker.check_model(subject.view.light)
    except Exception as error:  # the checker's, or protobuf's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0]
        yield catalog.find("invalid-graph").finding("", f"onnx's checker says: {reason[:_SHORT]}")
