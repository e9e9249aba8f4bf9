"""The layers of a Keras configuration, by path, with what each of them is set to.

Nested models, wrappers and recurrent cells are layers of their own; what they hold is left out of
their own settings. What differs between formats and runs, and says nothing about the model, is
left out, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerswap.keras_files import inner_config

# How an object was written down, not what it is.
_WRITING = frozenset(
    ("module", "registered_name", "shared_object_id", "build_config", "compile_config")
)


@dataclass(slots=True)
class Layer:
    """A layer of a configuration.

    Attributes:
        path: names of the containers and of the layer; empty for the model itself.
        name: its own, the last part of the path.
        class_name: the layer's class.
        settings: its configuration without its name and without layers inside it.
        place: where a `.keras` file keeps its weights.
        children: the layers directly inside.
        inputs: paths of the layers that feed it, one text for each call; empty where the
            configuration doesn't say.
    """

    path: str
    name: str
    class_name: str
    settings: dict[str, Any]
    place: str
    children: list[Layer] = field(default_factory=list)
    inputs: tuple[str, ...] = ()

    def all(self) -> Iterator[Layer]:
        """The layer and all inside it."""
        yield self
        for child in self.children:
            yield from child.all()


def read_layers(config: Mapping[str, Any]) -> Layer:
    """The model of a configuration, its layers inside it."""
    return _Reader().layer(config, "", "", "")


class _Reader:
    def __init__(self) -> None:
        self._shared: set[tuple[Any, ...]] = set()

    def layer(self, item: Mapping[str, Any], above: str, name: str, place: str) -> Layer:
        path = _join(above, name)
        inner: Any = item.get("config")
        if isinstance(inner, list):  # a Sequential of early Keras
            inner = {"layers": inner}
        inner = inner if isinstance(inner, dict) else {}
        result = Layer(path, name, str(item["class_name"]), {}, place)
        for key, value in inner.items():
            if key == "name":
                continue
            if _is_layer(value):
                result.children.append(self.layer(value, path, key, _join(place, key)))
            elif isinstance(value, list) and value and all(map(_is_layer, value)):
                result.children += self._several(value, path, _join(place, key), key)
            else:
                result.settings[key] = _plain(value)
        return result

    def _several(self, items: list[Any], path: str, place: str, key: str) -> Iterator[Layer]:
        used: Counter[str] = Counter()
        for number, item in enumerate(items):
            name = _name(item) if key == "layers" else f"{key}[{number}]"
            own = _snake_case(str(item["class_name"]))
            number = used[own]
            if not self._is_repeated(item):
                used[own] += 1
            layer = self.layer(item, path, name, _join(place, _numbered(own, number)))
            layer.inputs = tuple(_calls(item, path))
            yield layer

    def _is_repeated(self, item: Mapping[str, Any]) -> bool:
        """Whether it is an object met before, whose weights are kept there."""
        number = item.get("shared_object_id")
        key = (number, item["class_name"], _name(item))
        if number is None or key not in self._shared:
            self._shared.add(key)
            return False
        return True


def canonical_paths(model: Layer) -> dict[str, str]:
    """Path → the path that it has if names that Keras made up are counted from the start.

    Keras counts on through a process: `conv2d_7` may be the first convolution of a model.
    """
    counts: Counter[str] = Counter()
    names: dict[str, str] = {"": ""}

    def visit(layer: Layer) -> None:
        for child in layer.children:
            names[child.path] = _join(names[layer.path], counted(child))
            visit(child)

    def counted(layer: Layer) -> str:
        own = _snake_case(layer.class_name)
        kind = "input" if own == "input_layer" else own
        if not re.fullmatch(rf"{re.escape(kind)}(_\d+)?", layer.name):
            return layer.name
        counts[kind] += 1
        return _numbered(kind, counts[kind] - 1)

    visit(model)
    return names


def rename(model: Layer, names: Mapping[str, str]) -> None:
    """Gives layers other paths, also where others name them."""
    for layer in model.all():
        layer.path = names[layer.path]
        layer.inputs = tuple(
            ", ".join(names.get(source, source) for source in call.split(", "))
            for call in layer.inputs
        )
        for key in ("input_layers", "output_layers"):
            ends = layer.settings.get(key)
            if isinstance(ends, list):
                layer.settings[key] = [names.get(end, end) for end in ends]


def _is_layer(value: Any) -> bool:
    """Whether it is a serialized layer: other objects have no name, or nothing but one."""
    if not isinstance(value, dict) or not isinstance(value.get("class_name"), str):
        return False
    inner = value.get("config")
    if isinstance(inner, list):
        return bool(value["class_name"] == "Sequential")
    fields = inner_config(value)
    named = isinstance(fields.get("name") or value.get("name"), str)
    return named and bool({"trainable", "dtype", "layers", "batch_input_shape"} & fields.keys())


def _name(item: Mapping[str, Any]) -> str:
    return str(inner_config(item).get("name") or item.get("name"))


def _calls(item: Mapping[str, Any], path: str) -> Iterator[str]:
    """For each call of a layer in a graph: who feeds it."""
    nodes = item.get("inbound_nodes")
    for node in nodes if isinstance(nodes, list) else ():
        sources = [_join(path, name) for name in _sources(node)]
        if sources:
            yield ", ".join(sources)


def _sources(node: Any) -> Iterator[str]:
    """The names in a call: `[name, node, tensor, arguments]`, in lists or dictionaries."""
    if isinstance(node, list) and len(node) >= 3 and isinstance(node[0], str):
        if isinstance(node[1], int) and isinstance(node[2], int):
            yield node[0] if not node[2] else f"{node[0]}:{node[2]}"
            node = node[3:]  # other tensors may be among the arguments
        else:
            return
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for part in parts:
        yield from _sources(part)


def _plain(value: Any) -> Any:
    """A value of a configuration as any format would have it."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "class_name" not in value:
        return {key: _plain(part) for key, part in value.items()}
    if value["class_name"] == "__tuple__":
        return _plain(value.get("items") or value.get("config"))
    if value["class_name"] == "function":
        return value.get("config")
    return {key: _plain(part) for key, part in value.items() if key not in _WRITING}


def text(value: Any) -> str:
    """A setting for people: objects by class and what is set of them."""
    if isinstance(value, dict) and "class_name" in value:
        inner = inner_config(value)
        return f"{value['class_name']}({', '.join(f'{k}={text(v)}' for k, v in inner.items())})"
    return json.dumps(value, ensure_ascii=False)


def _snake_case(name: str) -> str:
    """The name that Keras gives to an object of a class, as tf_keras makes it."""
    apart = re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", name)
    result = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", apart).lower()
    return f"private{result}" if result.startswith("_") else result


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path and name else path or name
