"""What can be wrong with the normalizations of a graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from layerswap import catalog
from layerswap.layer_rules import judge_layer, judge_policy
from layerswap.onnx_graph.metadata import read_sites
from layerswap.onnx_graph.normalizations import Norm, is_behind_instance_norm
from layerswap.onnx_graph.subjects import Subject, inside
from layerswap.onnx_graph.variances import Variance
from layerswap.onnx_graph.views import STANDARD, Place
from layerswap.onnx_graph.weight_rules import is_zero
from layerswap.records import Finding, LayerRecord

_BATCHNORM = re.compile(r"(?i)batch_?norm")
_EXPORT_ANEW = "Convert the Keras model with layerswap convert, and export it anew."


def judge_norms(subject: Subject) -> Iterator[Finding]:
    """BatchNormalization, groups, and how a variance is computed: LS1, LS2, LS5."""
    for norm in subject.norms:
        path = norm.record.path
        if norm.kind == "batch":
            yield catalog.find("batchnorm-left").finding(
                path, f"is a BatchNormalization operator{inside(norm.place)}", _EXPORT_ANEW
            )
        elif norm.kind == "affine" and not is_behind_instance_norm(norm.place):
            yield catalog.find("stray-affine").finding(
                path,
                f"is a BatchNormalization operator with trivial statistics{inside(norm.place)}",
            )
        if norm.kind != "affine":
            yield from judge_layer(norm.record)
        yield from _judge_variance(norm)
        if norm.variance is not None and _is_over_batch(norm.variance, norm.place):
            yield catalog.find("batchnorm-lookalike").finding(
                path,
                f"divides{inside(norm.place)} by the root of a variance over axis 0, for each "
                "index of one other axis, as BatchNormalization does in training",
            )
    yield from _judge_groups(subject)
    yield from _judge_names(subject)


def _judge_groups(subject: Subject) -> Iterator[Finding]:
    """Groups against the policy, which may speak of layers, not of operators."""
    criteria = subject.criteria
    if criteria.policy is None or not any(norm.kind == "group" for norm in subject.norms):
        return
    sites = read_sites(subject.view.model)
    if not criteria.names_layers:
        layers = [norm.record for norm in subject.norms]
    elif sites is not None and _are_all(subject.norms, sites):
        layers = sites
    else:
        yield catalog.find("groups-differ").finding(
            "",
            "the policy speaks of layers by path, and nothing in the file says which operators "
            "belong to which layer",
            "Export it with layerswap, which notes that, or check it with --groups alone.",
            severity="undetermined",
        )
        return
    for layer in layers:
        yield from judge_policy(layer, criteria)


def _are_all(norms: list[Norm], sites: list[LayerRecord]) -> bool:
    """Whether every GroupNormalization of the graph is one that the export noted."""
    found = Counter(norm.record.groups for norm in norms if norm.kind == "group")
    return found <= Counter(site.groups for site in sites)


def _judge_variance(norm: Norm) -> Iterator[Finding]:
    place = norm.place
    if norm.variance is not None and norm.variance.unsafe:
        message = "divides by the root of mean(x²) − mean(x)²"
    elif place.is_a("GroupNormalization", "MeanVarianceNormalization"):
        message = f"is a {place.node.op_type}, which ONNX defines by mean(x²) − mean(x)²"
    else:
        return
    yield catalog.find("unsafe-variance").finding(norm.record.path, message)


def _is_over_batch(variance: Variance, place: Place) -> bool:
    """Whether a variance is taken over the first axis and all others but one, the channels."""
    scope = place.scope
    if scope.tensor(variance.x) is not None:
        return False  # a weight, which its model standardises, has no batch
    reshape = scope.maker(variance.x)
    if reshape is not None and reshape.is_a("Reshape"):
        shape = scope.array(reshape.input(1))
        if shape is not None and shape.size and shape.flat[0] == 1:
            return False  # rows of one sample each
    known = scope.shape(variance.x)
    rank = len(known) if known is not None else max(variance.axes, default=0) + 1
    over = {axis + rank if axis < 0 else axis for axis in variance.axes}
    return 0 in over and len(set(range(rank)) - over) == 1


def _judge_names(subject: Subject) -> Iterator[Finding]:
    """Operators outside the standard that are called BatchNorm, or something like it."""
    for place in subject.view.places:
        node = place.node
        key = (node.domain, node.op_type)
        if node.domain in STANDARD or key in subject.view.functions:
            continue
        if not _BATCHNORM.search(node.op_type):
            continue
        message = f"is a {node.domain}.{node.op_type}{inside(place)}"
        if node.domain.startswith("com.microsoft"):
            yield catalog.find("batchnorm-left").finding(place.record.path, message, _EXPORT_ANEW)
        else:
            yield catalog.find("batchnorm-lookalike").finding(place.record.path, message)


def judge_gammas(subject: Subject) -> Iterator[Finding]:
    """Normalizations whose γ is all zero: LS603."""
    for norm in subject.norms:
        gamma = subject.value(norm.gamma, norm.place.scope) if norm.gamma else None
        if gamma is not None and gamma.size and is_zero(gamma):
            yield catalog.find("zero-gamma").finding(
                norm.record.path, f"all {gamma.size} values of its γ are 0"
            )
