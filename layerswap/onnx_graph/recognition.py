"""Finds GroupNormalization in a flat model, however it is spelled, and makes it one operator.

The spellings are those of `profiles`, which other exporters use as well. γ and β count as part of
it where they are constants that fit its channels.

`normalizations` answers another question, for `check`: it names what a tensor goes through, in
graphs that may be half spelled or wrong, and so says neither which operators belong to it nor that
nothing else is computed, on which everything here depends.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerswap.onnx_graph.constants import Constant
from layerswap.onnx_graph.flat import Flat, Node, Output, Ref

GROUPNORM = "GroupNormalization"
# What every GroupNormalization has; its other attributes are those of the operators behind it.
SETTINGS = ("num_groups", "epsilon")
_MOST_SHOWN = 8


def recognize(flat: Flat) -> None:
    """Puts one `GroupNormalization` in the place of operators that compute one; changes `flat`.

    Its inputs are x, γ and β in the slots 0 to 2, as those of ONNX's own operator.
    """
    graph = _Graph(flat)
    for node in list(flat.nodes):
        if (
            node.op in _FINDERS
            and node not in graph.gone
            and (found := _FINDERS[node.op](graph, node))
        ):
            graph.replace(found)
    graph.finish()


@dataclass(slots=True)
class _Found:
    """Operators that compute a GroupNormalization; the last gives its result."""

    x: Ref
    members: list[Node]
    groups: int
    epsilon: float
    gamma: Constant | None = None
    beta: Constant | None = None
    rank: int = 0  # of x, where it is known
    grouped: bool = False  # whether the result so far is [N, G, L]

    def take_in_front(self, node: Node) -> None:
        """The operator before what was found so far belongs to it, too."""
        self.x, self.members = node.inputs["0"], [node, *self.members]
        self.grouped = node.op == "Reshape"

    def details(self) -> dict[str, Any]:
        """What its operators are told but γ, β and epsilon: shapes, axes and the like."""
        result: dict[str, Any] = {}
        for number, node in enumerate(self.members):
            own = {key: node.attributes[key] for key in node.attributes.keys() - {*SETTINGS}}
            own |= {
                f"input {slot}": ref.digest if ref.size > _MOST_SHOWN else ref.text()
                for slot, ref in node.inputs.items()
                if isinstance(ref, Constant) and ref.is_setting
            }
            result |= {f"{node.op} {number} {key}": own[key] for key in sorted(own)}
        return result


@dataclass(slots=True)
class _Graph:
    flat: Flat
    users: dict[Node, list[tuple[Node | None, str]]] = field(init=False)
    gone: set[Node] = field(default_factory=set)
    new: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.users = defaultdict(list)
        for node in self.flat.nodes:
            for slot, ref in node.inputs.items():
                if isinstance(ref, Output):
                    self.users[ref.node].append((node, slot))
        for name, ref in self.flat.outputs.items():
            if isinstance(ref, Output):
                self.users[ref.node].append((None, name))

    def next(self, node: Node) -> Node | None:
        """The one that uses the result, if it is only one."""
        users = {user for user, _ in self.users[node]}
        return next(iter(users)) if len(users) == 1 else None

    def only_within(self, node: Node, members: list[Node]) -> bool:
        return all(user in members for user, _ in self.users[node])

    def replace(self, found: _Found) -> None:
        last = found.members[-1]
        if not all(self.only_within(node, found.members) for node in found.members[:-1]):
            return
        attributes = {"num_groups": found.groups, "epsilon": found.epsilon, **found.details()}
        form = " + ".join(node.op for node in found.members)
        inputs: dict[str, Ref] = {"0": found.x}
        if found.gamma is not None:
            inputs["1"] = found.gamma
        if found.beta is not None:
            inputs["2"] = found.beta
        norm = Node(last.name, GROUPNORM, attributes, inputs, form)
        self.users[norm] = self.users[last]
        for user, slot in self.users[last]:
            (self.flat.outputs if user is None else user.inputs)[slot] = Output(norm, 0)
        if isinstance(found.x, Output):
            users = self.users[found.x.node]
            users[:] = [pair for pair in users if pair[0] not in found.members] + [(norm, "0")]
        self.gone.update(found.members)
        self.new[last] = norm

    def finish(self) -> None:
        self.flat.nodes[:] = [
            self.new.get(node, node)
            for node in self.flat.nodes
            if node in self.new or node not in self.gone
        ]


def _native(graph: _Graph, node: Node) -> _Found | None:
    groups, epsilon = node.attributes.get("num_groups"), node.attributes.get("epsilon")
    gamma, beta = node.inputs.get("1"), node.inputs.get("2")
    if not groups or epsilon is None or "0" not in node.inputs:
        return None
    found = _Found(node.inputs["0"], [node], groups, epsilon)
    if isinstance(gamma, Constant) and isinstance(beta, Constant):
        found.gamma, found.beta = gamma, beta
    else:
        return None
    before, after = _maker(found.x), graph.next(node)
    if before and after and before.op == "Unsqueeze" and after.op == "Squeeze":
        found.take_in_front(before)
        found.members.append(after)
    return found


def _instance_norm(graph: _Graph, node: Node) -> _Found | None:
    scale, shift = (node.inputs.get(slot) for slot in "12")
    if not isinstance(scale, Constant) or not isinstance(shift, Constant) or "0" not in node.inputs:
        return None
    found = _Found(node.inputs["0"], [node], scale.size, node.attributes.get("epsilon", 0.0))
    if not found.groups:
        return None
    centre = _maker(found.x)
    if centre is not None and (mean := _mean_taken_off(centre)):
        found.x, found.members = centre.inputs["0"], [mean, centre, node]
    reshape = _maker(found.x)
    if reshape is not None and _groups_of(reshape) == found.groups:
        found.take_in_front(reshape)
        if not _restore(graph, found):
            return None
    if _is_all(scale, 1.0) and _is_all(shift, 0.0):
        if len(found.members) > 1 or found.groups == 1:
            _affine(graph, found)
    else:
        found.gamma, found.beta = scale, shift
    return found


def _division(graph: _Graph, node: Node) -> _Found | None:
    """(x − mean) / √(mean((x − mean)²) + ε)."""
    centre, root = (_maker(node.inputs.get(slot)) for slot in "01")
    added = _maker(root.inputs.get("0")) if root is not None and root.op == "Sqrt" else None
    if centre is None or root is None or added is None or added.op != "Add":
        return None
    variance, epsilon = _maker(added.inputs.get("0")), added.inputs.get("1")
    square = _maker(variance.inputs.get("0")) if variance and variance.op == "ReduceMean" else None
    mean = _mean_taken_off(centre)
    if (
        mean is None
        or variance is None
        or square is None
        or variance.attributes.get("keepdims") != 1
        or square.op != "Mul"
        or list(map(_maker, square.inputs.values())) != [centre, centre]
        or not isinstance(epsilon, Constant)
        or epsilon.size != 1
        or epsilon.missing
        or _axes(mean) != _axes(variance)
    ):
        return None
    members = [mean, centre, square, variance, added, root, node]
    found = _Found(centre.inputs["0"], members, 0, float(epsilon.value().reshape(())))
    reshape, axes = _maker(found.x), _axes(mean)
    if reshape is not None and axes == (2,) and (groups := _groups_of(reshape)):
        found.groups = groups
        found.take_in_front(reshape)
        if not _restore(graph, found):
            return None
        _affine(graph, found)
    elif axes and axes[0] in (1, 2) and axes == tuple(range(axes[0], axes[-1] + 1)):
        found.groups, found.rank = 1, axes[-1] + 1
        _affine(graph, found)
        learned = found.gamma or found.beta
        # That these are all axes behind the channels only γ or β can show; but the means over a
        # single axis of nobody knows how many are rather those of a LayerNormalization.
        if learned is None and len(axes) == 1:
            return None
        if axes[0] == 2:  # as many groups as there are channels
            found.groups = learned.size if learned else 0
    return found if found.groups > 0 else None


_FINDERS = {
    GROUPNORM: _native,
    "InstanceNormalization": _instance_norm,
    "Div": _division,
}


def _restore(graph: _Graph, found: _Found) -> bool:
    """Takes in the Reshape back to the input's shape; γ and β may come before it."""
    following = graph.next(found.members[-1])
    if following is not None and following.op in ("Mul", "Add"):
        _affine(graph, found)
        following = graph.next(found.members[-1])
    if following is None or following.op != "Reshape":
        return False
    shape = following.inputs.get("1")
    if isinstance(shape, Constant) and shape.is_setting:
        found.rank = shape.size
    elif (maker := _maker(shape)) is None or not _is_shape_of(maker, found.x):
        return False
    elif graph.only_within(maker, [following]):
        found.members.append(maker)
    found.members.append(following)
    found.grouped = False
    return True


def _groups_of(reshape: Node) -> int:
    """G of a Reshape to [N, G, L]; 0 where it isn't one."""
    shape = reshape.inputs.get("1")
    if reshape.op != "Reshape" or "0" not in reshape.inputs or not isinstance(shape, Constant):
        return 0
    known = shape.is_setting and shape.shape == (3,)
    return max(0, int(shape.value()[1])) if known else 0


def _is_shape_of(node: Node, x: Ref) -> bool:
    return node.op == "Shape" and list(node.inputs.values()) == [x]


def _affine(graph: _Graph, found: _Found) -> None:
    """Takes in γ and β where they follow."""
    following = graph.next(found.members[-1])
    if following is None or found.gamma is not None or found.beta is not None:
        return
    if following.op == "BatchNormalization":
        if trivial := trivial_affine(following):
            found.gamma, found.beta = trivial
            found.members.append(following)
        return
    for op, field_ in (("Mul", "gamma"), ("Add", "beta")):
        values = list(following.inputs.values()) if following and following.op == op else []
        value = next((ref for ref in values if isinstance(ref, Constant)), None)
        if following is None or value is None or not _fits(value, found):
            continue
        setattr(found, field_, value)
        found.members.append(following)
        following = graph.next(following)


def trivial_affine(node: Node) -> tuple[Constant, Constant] | None:
    """γ and β of a BatchNormalization that does nothing else: mean 0, variance 1, epsilon 0."""
    values = [node.inputs.get(slot) for slot in "1234"]
    gamma, beta, mean, variance = values
    if not isinstance(gamma, Constant) or not isinstance(beta, Constant):
        return None
    if not isinstance(mean, Constant) or not isinstance(variance, Constant):
        return None
    trivial = _is_all(mean, 0.0) and _is_all(variance, 1.0)
    trivial = trivial and not node.attributes.get("epsilon")
    return (gamma, beta) if trivial and not node.attributes.get("training_mode") else None


def _fits(value: Constant, found: _Found) -> bool:
    """Whether it has one value for each channel: [C, 1, …], or in [N, G, L] of rank 2 [G, L]."""
    if value.size <= 1 or value.size % found.groups:
        return False
    shape = list(value.shape)
    if found.grouped:
        return len(shape) == 2 and bool(shape[0] == found.groups)
    while shape[0] == 1:
        del shape[0]
    behind = shape[1:]
    if found.rank and len(behind) != found.rank - 2:
        return False
    return all(size == 1 for size in behind) and (found.rank > 0 or len(behind) > 0)


def _mean_taken_off(node: Node) -> Node | None:
    """The ReduceMean of a Sub that takes the mean of its own first input off."""
    mean = _maker(node.inputs.get("1")) if node.op == "Sub" else None
    if mean is None or mean.op != "ReduceMean" or mean.inputs.get("0") != node.inputs.get("0"):
        return None
    return mean if mean.attributes.get("keepdims") == 1 else None


def _axes(mean: Node) -> tuple[int, ...]:
    axes = mean.attributes.get("axes", mean.inputs.get("1"))
    if isinstance(axes, Constant):
        return () if axes.missing else tuple(axes.value().reshape(-1).tolist())
    return tuple(axes) if isinstance(axes, tuple) else ()


def _maker(ref: Ref | None) -> Node | None:
    return ref.node if isinstance(ref, Output) else None


def _is_all(value: Constant, number: float) -> bool:
    return not value.missing and bool(np.all(value.value() == number))
