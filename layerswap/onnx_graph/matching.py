"""Finds for each operator of one flat model the one of another that stands in its place.

Names play no part. An operator's *origin* is a hash of it and all that leads to it, its *use* one
of it and all that follows. What agrees in both, or in one of them without a rival, is a pair; first
with the values of weights, then with their types alone, then with the kind of operator alone. From
there pairs spread to neighbours, and what is left between them is aligned in topological order.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from layerswap.onnx_graph.alignment import common
from layerswap.onnx_graph.constants import Constant
from layerswap.onnx_graph.flat import Flat, Node, Output, Port, Ref
from layerswap.onnx_graph.recognition import GROUPNORM

BATCHNORM = "BatchNormalization"


@dataclass(slots=True)
class Pairs:
    """Which operator of the second stands where one of the first does.

    Attributes:
        second_of: the pairs, in the topological order of the first.
        alike: the first's of those whose whole origin is the same, weights included.
    """

    second_of: dict[Node, Node] = field(default_factory=dict)
    alike: set[Node] = field(default_factory=set)


def match(first: Flat, second: Flat, names: Mapping[str, str]) -> Pairs:
    """Pairs the operators of two models.

    Args:
        first, second: the models.
        names: the second's name of each output of the first that both have.
    """
    return _Matcher(first, second, names).run()


# --- hashes -------------------------------------------------------------------------------


def _by_value(value: Constant) -> str:
    return value.digest


def _by_type(value: Constant) -> str:
    return value.digest if value.is_setting else value.type


def _full(node: Node) -> str:
    return f"{node.op} {sorted(node.attributes.items())} {node.made_of}"


def _kind(node: Node) -> str:
    return "normalization" if node.op in (BATCHNORM, GROUPNORM) else node.op


# What is told apart of operators and of constants; at last nothing of these, since another opset
# has them as attributes, and another spelling doesn't need them.
_LEVELS: tuple[tuple[Callable[[Node], str], Callable[[Constant], str] | None], ...] = (
    (_full, _by_value),
    (_full, _by_type),
    (_kind, None),
)


class _Side:
    """A model as the matcher needs it."""

    def __init__(self, flat: Flat, names: Mapping[str, str]) -> None:
        self.outputs = {new: flat.outputs[old] for old, new in names.items()}
        self.nodes = _in_order(flat, self.outputs)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.users: dict[Node, list[tuple[Node, str, int]]] = defaultdict(list)
        for node in self.nodes:
            for slot, ref in node.inputs.items():
                if isinstance(ref, Output):
                    self.users[ref.node].append((node, slot, ref.number))

    def weighty(self) -> dict[Node, Hashable]:
        """The operators that have weights, with all that is told of them but their neighbours."""
        own: dict[Node, Hashable] = {}
        for node in self.nodes:
            values = {s: ref for s, ref in node.inputs.items() if isinstance(ref, Constant)}
            if any(not value.is_setting and value.size > 1 for value in values.values()):
                own[node] = _hash(_full(node), [(s, v.digest) for s, v in values.items()])
        return own

    def hashes(self, level: int) -> tuple[dict[Node, bytes], dict[Node, bytes]]:
        """Origin and use of every operator."""
        label, constant = _LEVELS[level]
        origins: dict[Node, bytes] = {}
        own: dict[Node, str] = {}
        for node in self.nodes:
            parts, values = [], []
            for slot, ref in node.inputs.items():
                if isinstance(ref, Output):
                    parts.append((slot, origins[ref.node], ref.number))
                elif constant is not None or isinstance(ref, Port):
                    values.append((slot, _text(ref, constant)))
            own[node] = f"{label(node)} {values}"
            origins[node] = _hash(own[node], parts)
        ends: dict[Node, list[tuple[str, int]]] = defaultdict(list)
        for name, ref in self.outputs.items():
            if isinstance(ref, Output):
                ends[ref.node].append((name, ref.number))
        uses: dict[Node, bytes] = {}
        for node in reversed(self.nodes):
            users = sorted((uses[user], slot, number) for user, slot, number in self.users[node])
            uses[node] = _hash(own[node], users, sorted(ends[node]))
        return origins, uses


def _text(ref: Ref, constant: Callable[[Constant], str] | None) -> str:
    return constant(ref) if constant and isinstance(ref, Constant) else str(ref)


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _in_order(flat: Flat, outputs: Mapping[str, Ref]) -> list[Node]:
    """Topological order that depends on the outputs and on slots alone, not on the file's order."""
    done: dict[Node, None] = {}

    def visit(start: Node) -> None:
        stack: list[tuple[Node, Iterator[Ref]]] = [(start, iter(start.inputs.values()))]
        open_ = {start}
        while stack:
            node, rest = stack[-1]
            for ref in rest:
                if isinstance(ref, Output) and ref.node not in done and ref.node not in open_:
                    open_.add(ref.node)
                    stack.append((ref.node, iter(ref.node.inputs.values())))
                    break
            else:
                stack.pop()
                done[node] = None

    for ref in outputs.values():
        if isinstance(ref, Output) and ref.node not in done:
            visit(ref.node)
    for node in flat.nodes:  # what no output needs
        if node not in done:
            visit(node)
    return list(done)


# --- pairs --------------------------------------------------------------------------------


class _Matcher:
    def __init__(self, first: Flat, second: Flat, names: Mapping[str, str]) -> None:
        self.first = _Side(first, {name: name for name in names})
        self.second = _Side(second, {new: old for old, new in names.items()})
        self.pairs = Pairs()
        self._taken: set[Node] = set()

    def run(self) -> Pairs:
        exact: dict[Node, bytes] = {}
        for level in range(len(_LEVELS)):
            origins, uses = self.first.hashes(level)
            more_origins, more_uses = self.second.hashes(level)
            origins |= more_origins
            uses |= more_uses
            exact = exact or origins
            both = {node: (origins[node], uses[node]) for node in origins}
            for keys in (both, origins, uses):
                self._by_key(keys)
            if not level:  # nobody else has such weights, wherever it stands
                self._by_key(self.first.weighty() | self.second.weighty(), most=1)
        self._spread()
        self._fill_gaps()
        self._spread()
        self._replaced()
        pairs = self.pairs.second_of
        self.pairs.alike = {one for one, other in pairs.items() if exact[one] == exact[other]}
        self.pairs.second_of = dict(sorted(pairs.items(), key=lambda p: self.first.place[p[0]]))
        return self.pairs

    def _pair(self, one: Node, other: Node) -> None:
        self.pairs.second_of[one] = other
        self._taken.add(other)

    def _left(self) -> tuple[list[Node], list[Node]]:
        return (
            [node for node in self.first.nodes if node not in self.pairs.second_of],
            [node for node in self.second.nodes if node not in self._taken],
        )

    def _by_key(self, key: Mapping[Node, Hashable], most: float = math.inf) -> None:
        """Pairs what agrees in the key, in order, where both have as many of it."""
        groups: dict[Hashable, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
        for side, nodes in enumerate(self._left()):
            for node in nodes:
                if node in key:
                    groups[key[node]][side].append(node)
        for ones, others in groups.values():
            if len(ones) == len(others) <= most:
                for one, other in zip(ones, others, strict=True):
                    self._pair(one, other)

    def _spread(self) -> None:
        """From pairs to what feeds them in the same slot, and to the only user of a kind."""
        work = list(self.pairs.second_of.items())
        while work:
            one, other = work.pop()
            found = [*self._feeding(one, other), *self._using(one, other)]
            for pair in found:
                if pair[0] not in self.pairs.second_of and pair[1] not in self._taken:
                    self._pair(*pair)
                    work.append(pair)

    def _feeding(self, one: Node, other: Node) -> Iterator[tuple[Node, Node]]:
        for slot, ref in one.inputs.items():
            twin = other.inputs.get(slot)
            if isinstance(ref, Output) and isinstance(twin, Output) and self._free(ref, twin):
                yield ref.node, twin.node

    def _free(self, ref: Output, twin: Output) -> bool:
        paired = ref.node in self.pairs.second_of or twin.node in self._taken
        return not paired and _kind(ref.node) == _kind(twin.node)

    def _using(self, one: Node, other: Node) -> Iterator[tuple[Node, Node]]:
        by_kind: dict[Hashable, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
        for user, slot, number in self.first.users[one]:
            if user not in self.pairs.second_of:
                by_kind[_kind(user), slot, number][0].append(user)
        for user, slot, number in self.second.users[other]:
            if user not in self._taken:
                by_kind[_kind(user), slot, number][1].append(user)
        for ones, others in by_kind.values():
            if len(ones) == len(others) == 1:
                yield ones[0], others[0]

    def _fill_gaps(self) -> None:
        """Aligns what lies between pairs that are in the same order on both sides."""
        places = [
            (self.first.place[one], self.second.place[other])
            for one, other in self.pairs.second_of.items()
        ]
        anchors = _increasing(sorted(places))
        starts = [(-1, -1), *anchors]
        ends = [*anchors, (len(self.first.nodes), len(self.second.nodes))]
        for (a, b), (c, d) in zip(starts, ends, strict=True):
            ones = [n for n in self.first.nodes[a + 1 : c] if n not in self.pairs.second_of]
            others = [n for n in self.second.nodes[b + 1 : d] if n not in self._taken]
            for one, other in common([*map(_kind, ones)], [*map(_kind, others)]):
                self._pair(ones[one], others[other])

    def _replaced(self) -> None:
        """Pairs another operator that was put between the same neighbours."""
        neighbours: dict[Node, Hashable] = {}
        for side, nodes in zip((self.first, self.second), self._left(), strict=True):
            twins: Mapping[Node, Node] = (
                self.pairs.second_of if side is self.first else {n: n for n in self._taken}
            )
            ends: dict[Node, list[str]] = defaultdict(list)
            for name, ref in side.outputs.items():
                if isinstance(ref, Output):
                    ends[ref.node].append(name)
            for node in nodes:
                makers = [
                    (slot, twins.get(ref.node), ref.number)
                    if isinstance(ref, Output)
                    else (slot, str(ref), 0)
                    for slot, ref in node.inputs.items()
                    if not isinstance(ref, Constant)
                ]
                users = [(twins.get(user), slot, number) for user, slot, number in side.users[node]]
                around = [place[1] for place in makers] + [place[0] for place in users]
                if None not in around and (users or ends[node]):
                    key = (tuple(makers), frozenset(users), tuple(sorted(ends[node])))
                    neighbours[node] = key
        self._by_key(neighbours, most=1)


def _increasing(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The most of these places that increase on both sides, which are sorted by the first."""
    tails: list[int] = []  # the lowest place at which a row of each length ends
    ends: list[int] = []  # who is there
    before: list[int] = []
    for number, (_, place) in enumerate(places):
        length = bisect_left(tails, place)
        if length == len(tails):
            tails.append(place)
            ends.append(number)
        else:
            tails[length], ends[length] = place, number
        before.append(ends[length - 1] if length else -1)
    result = []
    number = ends[-1] if ends else -1
    while number >= 0:
        result.append(places[number])
        number = before[number]
    return result[::-1]
