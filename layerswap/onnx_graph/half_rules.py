"""What may compute in float16: the rules, without the rewriting.

ONNX Runtime computes float16 on a CPU in float32 for the most part. What would overflow on
another machine doesn't show there, so the rules look at what is computed, not at values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import numpy as np
import onnx

from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.groupnorm import DOMAIN, OP_TYPE
from layerswap.records import Array

_PRODUCTS = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
_ARITHMETIC = frozenset(("Add", "Div", "Mul", "Sub", "Sum"))
# Their first input with other signs or another shape: times it, they are a square.
_SAME = frozenset(
    ("Abs", "Expand", "Flatten", "Identity", "Neg", "Relu", "Reshape", "Squeeze", "Transpose")
) | {"Unsqueeze"}
_MOVES = frozenset(
    ("Concat", "DepthToSpace", "Gather", "GatherElements", "GatherND", "Pad", "ReverseSequence")
) | {"Slice", "SpaceToDepth", "Split", "Tile", "Where"}
_POOLS = frozenset(("AveragePool", "GlobalMaxPool", "Max", "MaxPool", "Min", "Resize", "Upsample"))
_BOUNDED = frozenset(("Clip", "HardSigmoid", "Sigmoid", "Softsign", "Tanh"))
_ACTIVATIONS = frozenset(("Elu", "HardSwish", "LeakyRelu", "PRelu", "Selu", "ThresholdedRelu"))
_FOLLOWING = _SAME | _MOVES | _POOLS | _BOUNDED | _ACTIVATIONS
# Whatever came in, the results are of moderate size, though the way to them isn't.
_MODERATE = frozenset(
    ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "Softmax")
)
_GROWING = frozenset(("CumSum", "Exp", "Pow", "ReduceProd", "ReduceSum", "ReduceSumSquare"))
_SENSITIVE = frozenset(("CumSum", "Exp", "GlobalAveragePool", "Log", "Pow", "Reciprocal", "Sqrt"))

_FLOAT16 = np.finfo(np.float16)
# Relative, in norm. Single weights too small for float16 are common in good networks.
_LARGEST_LOSS = 0.01
# What plain arithmetic may add to a tensor or multiply it by.
_LARGEST_OPERAND = 256.0
_SMALLEST_FACTOR = 1 / 1_024
_LARGEST_WINDOW = 16
CANDIDATES = _PRODUCTS | _ARITHMETIC | _FOLLOWING


class Rules:
    """Decides node by node, in topological order; remembers where tensors come from.

    Args:
        nodes: those of the main graph.
        wide: names of all tensors that were float32 in the beginning.
        constants: value of each initializer.
    """

    def __init__(
        self, nodes: list[onnx.NodeProto], wide: Set[str], constants: Mapping[str, Array]
    ) -> None:
        self._wide = wide
        self._constants = constants
        self._wanted, self._summed = _destinations(nodes)
        self._moderate: set[str] = set()  # tensors in float32 that may as well be float16
        self._bounded: set[str] = set()
        self._large: set[str] = set()  # squares and sums, which float16 may not hold
        self._origins: dict[str, str] = {}
        # A second copy of what bodies read in float32 would only swell the file.
        bodies = [body for node in nodes for body in graphs.subgraphs(node)]
        inner = (name for body in bodies for name in graphs.outer_reads(body))
        self._fits: dict[str, bool] = dict.fromkeys(inner, False)

    def follow(self, node: onnx.NodeProto) -> None:
        """Notes what is known of the results."""
        moving = [n for n in node.input if n in self._wide and n not in self._constants]
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE) or node.op_type in _MODERATE:
            self._moderate.add(node.output[0])
        if node.op_type in _SAME:
            self._origins[node.output[0]] = self._origin(node.input[0])
        passes = node.op_type in _FOLLOWING | _ARITHMETIC
        # A limit on one side only is none.
        limits = node.op_type in _BOUNDED and (node.op_type != "Clip" or all(node.input[:3]))
        limits = limits and (node.op_type != "Clip" or len(node.input) == 3)
        if limits or (passes and moving and self._bounded.issuperset(moving)):
            self._bounded.update(node.output)
        elif passes and self._is_large(node.op_type, moving):
            self._large.update(node.output)
        if node.op_type in _GROWING or (node.op_type == "Mul" and self._is_square(node.input)):
            self._large.update(node.output)

    def _is_large(self, op_type: str, moving: list[str]) -> bool:
        found = [name in self._large for name in moving]
        # A share of a sum isn't, nor is what has been divided by one.
        return found in ([True], [True, False]) if op_type == "Div" else any(found)

    def may_halve(self, node: onnx.NodeProto, data: list[str], narrow: Set[str]) -> bool:
        """Whether a node computes in float16; all before it have been followed.

        Args:
            node: one of `CANDIDATES`.
            data: those of its inputs that would become float16.
            narrow: tensors that are float16 already.
        """
        weights = [name for name in data if self._origin(name) in self._constants]
        if not all(self._weight_fits(self._origin(name)) for name in weights):
            return False
        moving = [name for name in data if name not in weights]
        if node.op_type in _PRODUCTS and not set(node.input[:2]).isdisjoint(weights):
            return self._large.isdisjoint(moving)
        if node.op_type == "Gather" and data == weights and self._is_table(*node.input):
            return True
        # All others lose more by a cast than they gain. Tensors of moderate size get one for
        # what comes behind.
        wanted = node.op_type in _PRODUCTS or not self._wanted.isdisjoint(node.output)
        if not all(n in narrow or n in self._moderate for n in moving):
            return False
        if not wanted and narrow.isdisjoint(moving):
            return False
        if node.op_type == "AveragePool":
            return bool(np.prod(graphs.attribute(node, "kernel_shape")) <= _LARGEST_WINDOW)
        if node.op_type in _PRODUCTS:
            return not self._is_square(moving)
        return node.op_type not in _ARITHMETIC or self._is_plain(node, moving)

    def _is_plain(self, node: onnx.NodeProto, moving: list[str]) -> bool:
        """Whether arithmetic keeps to the size of what it gets."""
        operands = [self._constants[n] for n in node.input if n in self._constants]
        if node.op_type == "Div":
            if node.input[1] not in self._constants or not np.all(operands[-1]):
                return False
            operands = [1 / operands[-1]]
        largest = [float(np.max(np.abs(value), initial=0.0)) for value in operands]
        if any(not n <= _LARGEST_OPERAND for n in largest):
            return False
        if node.op_type in ("Div", "Mul"):
            if any(0 < n < _SMALLEST_FACTOR for n in largest):
                return False
            if len(moving) > 1:
                # A gate, such as that of swish, makes nothing larger.
                gated = not self._bounded.isdisjoint(moving)
                summed = not self._summed.isdisjoint(node.output)
                return not self._is_square(moving) and (gated or not summed)
        return True

    def _is_table(self, table: str, indices: str) -> bool:
        known = self._constants.get(table)
        return known is not None and known.ndim > 1 and indices not in self._constants

    def _is_square(self, factors: Iterable[str]) -> bool:
        origins = [self._origin(name) for name in factors if name not in self._constants]
        return len(set(origins)) < len(origins)

    def _origin(self, name: str) -> str:
        return self._origins.get(name, name)

    def _weight_fits(self, name: str) -> bool:
        if name not in self._fits:
            self._fits[name] = _fits(self._constants[name])
        return self._fits[name]


def _destinations(nodes: list[onnx.NodeProto]) -> tuple[set[str], set[str]]:
    """What products with weights wait for, and what ends in sums, roots or powers."""
    wanted: set[str] = set()
    summed: set[str] = set()
    for node in reversed(nodes):
        passes = node.op_type in _FOLLOWING | _ARITHMETIC
        if node.op_type in _PRODUCTS or (passes and not wanted.isdisjoint(node.output)):
            wanted.update(node.input)
        sensitive = node.op_type in _SENSITIVE or node.op_type.startswith("Reduce")
        if sensitive or (passes and not summed.isdisjoint(node.output)):
            summed.update(node.input)
    return wanted, summed


def _fits(value: Array) -> bool:
    """Whether float16 holds a constant well enough; infinities it does hold."""
    finite = value[np.isfinite(value)]
    largest = float(np.max(np.abs(finite), initial=0.0))
    if largest == 0:
        return True
    # Many machines take what is smaller than float16's normal numbers for zero.
    if not float(_FLOAT16.tiny) <= largest <= float(_FLOAT16.max):
        return False
    lost = finite - finite.astype(np.float16).astype(np.float32)
    if largest > 2_048 and np.any(lost) and np.array_equal(finite, np.rint(finite)):
        return False  # numbers that count something
    return bool(np.linalg.norm(lost) <= _LARGEST_LOSS * np.linalg.norm(finite))
