"""The JSON Schema of what the commands print, from the records and their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from layerswap import records

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# What stands for a number that JSON doesn't have.
_INFINITE = ["Infinity", "-Infinity", "NaN"]
# `name: text` or `name, name: text`, the text going on in deeper lines.
_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     .*)*)", re.MULTILINE)


def schema_of(record: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `to_json` makes of a record.

    Every field is always there. Fields may be added: an object may hold others, too.
    """
    from pydantic import TypeAdapter

    made = TypeAdapter(record).json_schema(mode="serialization")
    parts = made.pop("$defs", {})
    for name, part in (*parts.items(), (record.__name__, made)):
        _explain(part, vars(records)[name])
    name = record.__name__.removeprefix("Swap").lower()
    return {
        "$schema": _DIALECT,
        "$id": f"urn:layerswap:{name}:{records.SCHEMA_VERSION}",
        **made,
        "title": f"layerswap {name}",
        "$defs": parts,
    }


def _explain(part: dict[str, Any], record: type) -> None:
    """What pydantic doesn't know of a record: what its fields mean, and how it writes infinity."""
    properties = part["properties"]
    text, _, attributes = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    part["description"] = _joined(text)
    part["required"] = list(properties)
    if getattr(record, "__pydantic_config__", None) is records.INFINITE:
        properties |= {name: _with_infinity(value) for name, value in properties.items()}
    for value in properties.values():
        value.pop("title", None)
    for names, meaning in _ATTRIBUTE.findall(attributes):
        for name in names.split(", "):
            properties[name]["description"] = _joined(meaning)
    if "schema" in properties:
        properties["schema"]["const"] = records.SCHEMA_VERSION


def _with_infinity(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_infinity(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "number":
        others = {key: item for key, item in value.items() if key != "type"}
        return {**others, "anyOf": [{"type": "number"}, {"enum": _INFINITE}]}
    return {key: _with_infinity(item) for key, item in value.items()}


def _joined(text: str) -> str:
    return " ".join(text.split())
