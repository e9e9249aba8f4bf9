"""Policy and criteria: from `layerswap.toml` or `[tool.layerswap]`, and from options."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerswap.criteria import Criteria
from layerswap.errors import LoadError, PolicyError, UsageError
from layerswap.policy import Policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN_FILE = "layerswap.toml"
SHARED_FILE = "pyproject.toml"
# The table of what `check` judges by; all else is the policy.
CHECK = "check"
# Two ways to say the same: the higher layer's replaces the lower one's.
_SIZES = ("groups", "channels_per_group")


def read_policy(options: Mapping[str, Any], config: str | None, folder: Path) -> Policy:
    """The policy that follows from the options over the given file over the discovered one.

    Args:
        options: fields that the command line sets.
        config: a TOML file named by the user, or None.
        folder: where `layerswap.toml`, or else `pyproject.toml`, is looked for.

    Raises:
        PolicyError: a field is unknown or its value is wrong.
        LoadError: a file can't be read or isn't TOML.
    """
    fields: dict[str, Any] = {}
    for tables in (*_layers(config, folder), options):
        layer = {name: value for name, value in tables.items() if name != CHECK}
        if any(size in layer for size in _SIZES):
            for size in _SIZES:
                fields.pop(size, None)
        fields |= layer
    return Policy(**fields)


def read_criteria(options: Mapping[str, Any], config: str | None, folder: Path) -> Criteria:
    """What `check` judges by: the options over the table `check` of the files, as in `read_policy`.

    Groups are compared with a policy only where the options or the files say something of groups.

    Args:
        options: fields of `Criteria` that the command line sets, and of `Policy`.
        config, folder: as for `read_policy`.

    Raises:
        UsageError: a field is unknown or its value is wrong, or there is no such rule.
        LoadError: a file can't be read or isn't TOML.
    """
    ours = {n: v for n, v in options.items() if n in Criteria.model_fields}
    policy = read_policy({n: v for n, v in options.items() if n not in ours}, config, folder)
    fields: dict[str, Any] = {}
    for layer in _layers(config, folder):
        fields |= layer.get(CHECK, {})
    parts = (policy, *policy.overrides.values())
    if any(size in part.model_fields_set for part in parts for size in _SIZES):
        fields["policy"] = policy
    return Criteria(**{**fields, **ours})


def parse_value(text: str) -> Any:
    """A value as the command line gives it: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_overrides(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Pattern → fields from `--overrides PATTERN JSON`.

    Raises:
        PolicyError: the second isn't a JSON object.
    """
    overrides: dict[str, Any] = {}
    for pattern, text in pairs:
        fields = parse_value(text)
        if not isinstance(fields, dict):
            raise PolicyError(
                f"overrides: {text!r} is not a JSON object",
                hint="""For example: --overrides 'block1/**' '{"groups": 8}'""",
            )
        overrides[pattern] = fields
    return overrides


def _layers(config: str | None, folder: Path) -> list[dict[str, Any]]:
    """The tables of the discovered file and of the named one, which wins."""
    return [_discover(folder), {} if config is None else _read(Path(config))]


def _discover(folder: Path) -> dict[str, Any]:
    for name in (OWN_FILE, SHARED_FILE):
        if (folder / name).is_file():
            return _read(folder / name)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"can't be read: {error.strerror or error}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"is not valid TOML: {error}", where=str(path)) from error
    if path.name == SHARED_FILE:
        for name in ("tool", "layerswap"):
            tables = tables.get(name, {})
            if not isinstance(tables, dict):
                raise PolicyError(f"{name} is not a table", where=str(path))
    check = tables.get(CHECK, {})
    if not isinstance(check, dict):
        raise PolicyError(f"{CHECK} is not a table", where=str(path))
    if "policy" in check:
        raise PolicyError("the policy is what stands outside the table 'check'", where=str(path))
    try:
        Policy(**{name: value for name, value in tables.items() if name != CHECK})
        Criteria(**check)
    except UsageError as error:
        error.where = str(path)
        raise
    return tables
