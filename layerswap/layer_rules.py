"""What can be wrong with a normalization layer, whatever the file that it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layerswap import catalog, grouping
from layerswap.criteria import Criteria
from layerswap.records import Finding, LayerRecord
from layerswap.rules import FEW_ELEMENTS

# Up to here float16 rounds to zero: half of its smallest number, 2^-24.
_FLOAT16_ZERO = 2.0**-25
# Layers and operators that have groups, be it said how many or not.
_GROUPS = ("GroupNormalization", "InstanceNormalization", "GroupNorm", "SkipGroupNorm")


def judge_layers(layers: Iterable[LayerRecord], criteria: Criteria) -> Iterator[Finding]:
    """What is wrong with the layers of a Keras model; see the two below."""
    for layer in layers:
        yield from judge_layer(layer)
        yield from judge_policy(layer, criteria)


def judge_layer(layer: LayerRecord) -> Iterator[Finding]:
    """What is wrong with the groups and the epsilon of a layer, by themselves.

    Args:
        layer: any normalization; what its file doesn't say of it isn't judged.
    """
    if layer.groups is not None:
        yield from _judge_groups(layer, layer.groups)
    if layer.epsilon is None or "BatchNorm" in layer.class_name:
        return
    if not layer.epsilon > 0:  # nor is it NaN
        yield catalog.find("missing-epsilon").finding(
            layer.path, f"the {layer.class_name} has the epsilon {layer.epsilon:g}"
        )
    elif layer.dtype == "float16" and layer.epsilon <= _FLOAT16_ZERO:
        yield catalog.find("small-epsilon").finding(
            layer.path, f"epsilon {layer.epsilon:.3g} is 0 in float16, in which it computes"
        )


def judge_policy(layer: LayerRecord, criteria: Criteria) -> Iterator[Finding]:
    """In what the groups of a layer differ from the policy.

    Args:
        layer: any normalization, under the path that the policy knows it by.
        criteria: holds the policy, if any.
    """
    if layer.groups is None and layer.class_name not in _GROUPS:
        return
    policy = criteria.policy_for(layer.path)
    if policy is None:
        return
    wanted = criteria.groups_for(layer.path, layer.channels)
    rule = catalog.find("groups-differ")
    if layer.groups is None or wanted is None:
        what = "groups" if layer.groups is None else "channels"
        yield rule.finding(
            layer.path,
            f"the file doesn't say how many {what} it has, so whether they are right isn't known",
            "Check the .keras file, or an ONNX file with fixed shapes.",
            severity="undetermined",
        )
    elif wanted != layer.groups:
        over = "" if layer.channels is None else f" over {layer.channels} channels"
        yield rule.finding(layer.path, f"has {layer.groups} groups{over}, not {wanted}")


def _judge_groups(layer: LayerRecord, groups: int) -> Iterator[Finding]:
    channels = layer.channels
    if groups < 1:
        yield catalog.find("indivisible-groups").finding(
            layer.path, f"has {groups} groups, and there must be one at least"
        )
        return
    if channels is not None and channels % groups:
        legal = ", ".join(map(str, grouping.legal_groups(channels)))
        yield catalog.find("indivisible-groups").finding(
            layer.path, f"{channels} channels don't divide by {groups} groups; legal are {legal}"
        )
    if layer.elements is None:
        return
    if layer.elements == 1:
        yield catalog.find("degenerate-groups").finding(
            layer.path, f"each of its {groups} groups holds a single element per sample"
        )
    elif layer.elements < FEW_ELEMENTS:
        yield catalog.find("tiny-groups").finding(
            layer.path, f"a group holds only {layer.elements} elements per sample"
        )
