"""The layers of a Keras configuration, by path, with what each of them is set to.

Nested models, wrappers and recurrent cells are layers of their own; what they hold is left out of
their own settings. What differs between formats and runs, and says nothing about the model, is
left out, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerswap.keras_files import inner_config

# How an object was written down, not what it is.
_WRITING = frozenset(
    ("module", "registered_name", "shared_object_id", "build_config", "compile_config")
)


class Source(NamedTuple):
    """A tensor of a Keras graph: the path of a layer, the number of its call and of its output."""

    path: str
    call: int
    output: int

    def __str__(self) -> str:
        call = f"call {self.call + 1} of " if self.call else ""
        return f"{call}{self.path}{f':{self.output}' if self.output else ''}"


@dataclass(slots=True)
class Layer:
    """A layer of a configuration.

    Attributes:
        path: names of the containers and of the layer; empty for the model itself.
        name: its own, the last part of the path.
        class_name: the layer's class.
        settings: its configuration without its name and without layers inside it.
        place: where a `.keras` file keeps its weights; several models may share them.
        children: the layers directly inside.
        inputs: for each call the tensors that feed it; empty where the configuration doesn't say.
    """

    path: str
    name: str
    class_name: str
    settings: dict[str, Any]
    place: str
    children: list[Layer] = field(default_factory=list)
    inputs: tuple[tuple[Source, ...], ...] = ()

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
        # By class and name: number of the object, and where its weights are.
        self._places: dict[tuple[str, str], list[tuple[Any, str]]] = defaultdict(list)

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
            own_place = self._first_place(item)
            if own_place is None:
                own = _snake_case(str(item["class_name"]))
                own_place = _join(place, _numbered(own, used[own]))
                used[own] += 1
                known = self._places[str(item["class_name"]), _name(item)]
                known.append((item.get("shared_object_id"), own_place))
            layer = self.layer(item, path, name, own_place)
            layer.inputs = tuple(_calls(item, path))
            yield layer

    def _first_place(self, item: Mapping[str, Any]) -> str | None:
        """Where the weights of an object met before are; None where it is the first time.

        Keras numbers objects as it meets them again; in nested models the first has no number.
        """
        number = item.get("shared_object_id")
        known = self._places.get((str(item["class_name"]), _name(item)), [])
        places = [place for wanted in (number, None) for own, place in known if own == wanted]
        return places[0] if places and number is not None else None


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

    def renamed_ends(value: Any, above: str) -> Any:
        if isinstance(value, dict):
            return {key: renamed_ends(part, above) for key, part in value.items()}
        if not isinstance(value, list):
            return value
        if not _is_tensor(value):
            return [renamed_ends(part, above) for part in value]
        path = names.get(_join(above, value[0]))
        return value if path is None else [_own_name(path, names[above]), *value[1:]]

    def visit(layer: Layer) -> None:
        above = layer.path
        for child in layer.children:
            visit(child)
            child.name = _own_name(child.path, names[above])
        layer.inputs = tuple(
            tuple(source._replace(path=names.get(source.path, source.path)) for source in call)
            for call in layer.inputs
        )
        for key in ("input_layers", "output_layers"):
            if key in layer.settings:
                layer.settings[key] = renamed_ends(layer.settings[key], above)
        layer.path = names[above]

    visit(model)


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


def _calls(item: Mapping[str, Any], path: str) -> Iterator[tuple[Source, ...]]:
    """For each call of a layer in a graph: who feeds it."""
    nodes = item.get("inbound_nodes")
    for node in nodes if isinstance(nodes, list) else ():
        if sources := tuple(_sources(node, path)):
            yield sources


def _sources(node: Any, path: str) -> Iterator[Source]:
    """The tensors in a call, in lists or dictionaries."""
    if _is_tensor(node):
        yield Source(_join(path, node[0]), node[1], node[2])
        node = node[3:]  # other tensors may be among the arguments
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for part in parts:
        yield from _sources(part, path)


def _is_tensor(value: Any) -> bool:
    """Whether it is `[name, call, output, …]`, as a configuration refers to a tensor."""
    return (
        isinstance(value, list)
        and len(value) >= 3
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and isinstance(value[2], int)
    )


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


def _own_name(path: str, above: str) -> str:
    return path.removeprefix(f"{above}/") if above else path


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path and name else path or name
