"""GroupNorm nodes → standard operators, in the form that the user's runtime wants."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper, numpy_helper

from layerswap.errors import ExportError
from layerswap.onnx_graph import graphs
from layerswap.onnx_graph.profiles import PROFILES, Constants, GroupNorm, Profile, Writer
from layerswap.records import PROFILE_OPSETS, Array

DOMAIN = "layerswap"
OP_TYPE = "GroupNorm"


def expand(
    light: onnx.ModelProto, constants: dict[str, Array], *, profile: str = "portable"
) -> None:
    """Replaces every GroupNorm node, those in loop bodies and branches as well.

    The last node of each carries the layer's path as its documentation.

    Args:
        light: a graph without initializers, in its final opset; changed in place.
        constants: value of each initializer; extended.
        profile: a key of `PROFILES`.

    Raises:
        ExportError: the profile is unknown or needs a newer opset, a node's channels don't
            divide by its groups, or the rank of its input isn't known.
    """
    if profile not in PROFILES:
        raise ExportError(f"unknown profile '{profile}'; there is {', '.join(PROFILES)}")
    opset = next(o.version for o in light.opset_import if o.domain in ("", "ai.onnx"))
    if opset < PROFILE_OPSETS[profile]:
        raise ExportError(
            f"the profile '{profile}' needs opset {PROFILE_OPSETS[profile]} or later, the graph "
            f"has {opset}",
            hint=f"Export it at opset {PROFILE_OPSETS[profile]}, or take another profile.",
        )
    added = Constants(constants)
    _Expansion(PROFILES[profile], opset, added).graph(light.graph, dict(constants))


class _Expansion:
    def __init__(self, profile: Profile, opset: int, constants: Constants) -> None:
        self._profile = profile
        self._opset = opset
        self._constants = constants

    def graph(self, graph: onnx.GraphProto, visible: Mapping[str, Array]) -> None:
        """Replaces the nodes of a graph and of the bodies in it.

        Args:
            graph: changed in place.
            visible: value of each constant that its nodes can see.
        """
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for body in graphs.subgraphs(node):
                self.graph(body, _visible_inside(body, visible))
            if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
                nodes += self._replacement(_read(node), visible)
            else:
                nodes.append(node)
        graphs.replace_all(graph.node, nodes)

    def _replacement(self, norm: GroupNorm, visible: Mapping[str, Array]) -> list[onnx.NodeProto]:
        writer = Writer(norm, self._opset, visible, self._constants)
        self._profile(writer)
        writer.nodes[-1].output[0] = norm.y
        writer.nodes[-1].doc_string = norm.path
        return writer.nodes


def _visible_inside(body: onnx.GraphProto, outside: Mapping[str, Array]) -> dict[str, Array]:
    """The constants that nodes of a body can see: its own, and others that it doesn't hide."""
    hidden = {value.name for value in body.input}
    hidden.update(name for node in body.node for name in node.output)
    visible = {name: value for name, value in outside.items() if name not in hidden}
    return visible | {t.name: numpy_helper.to_array(t) for t in body.initializer}


def _read(node: onnx.NodeProto) -> GroupNorm:
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    path = settings.get("path", b"").decode()
    groups, channels = int(settings["groups"]), int(settings["channels"])
    if groups < 1 or channels % groups:
        raise ExportError(f"{channels} channels don't divide into {groups} groups", where=path)
    shape = tuple(int(n) for n in settings.get("shape", ()))
    if len(shape) < 2:
        raise ExportError("the rank of its input isn't known", where=path)
    x, gamma, beta = node.input
    epsilon = float(settings["epsilon"])
    return GroupNorm(x, gamma, beta, node.output[0], groups, channels, epsilon, shape, path)
