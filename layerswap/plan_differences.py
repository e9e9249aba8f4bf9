"""What two plans differ in: decisions by the path of their layer, and the policy behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layerswap.difference_text import describe_groupnorm
from layerswap.errors import LoadError
from layerswap.records import Decision, Difference, Refusal, Swap, SwapPlan, from_json

# The plan of a model with thousands of layers has a few megabytes.
_MAX_BYTES = 1 << 27


def plan_differences(first: Path, second: Path) -> list[Difference]:
    """Compares two plans, as `layerswap plan --report-format json` writes them.

    Raises:
        LoadError: one of them can't be read as a plan.
    """
    one, other = _read(first), _read(second)
    return [*_policy(one.policy, other.policy), *_decisions(one, other)]


def _read(path: Path) -> SwapPlan:
    if not path.is_file():
        raise LoadError("there is no such file", where=os.fspath(path))
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        return from_json(SwapPlan, path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(
            f"is no plan, or damaged: {type(error).__name__}",
            where=os.fspath(path),
            hint="layerswap plan MODEL --report-format json --output-file FILE writes one.",
        ) from error


def _policy(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            before, after = (_text(x[key]) if key in x else None for x in (one, other))
            yield Difference("LS904", f"policy/{key}", "policy", before, after)


def _decisions(one: SwapPlan, other: SwapPlan) -> Iterator[Difference]:
    before = {decision.site.path: decision for decision in one.decisions}
    after = {decision.site.path: decision for decision in other.decisions}
    for path in dict.fromkeys((*before, *after)):
        if path not in after:
            yield Difference("LS903", path, f"{before[path].site.class_name} is removed")
        elif path not in before:
            yield Difference("LS902", path, f"{after[path].site.class_name} is added")
        else:
            yield from _decision(path, before[path], after[path])


def _decision(path: str, one: Decision, other: Decision) -> Iterator[Difference]:
    sites = (one.site, other.site)
    for field in ("class_name", "channels", "axis", "rank", "calls", "shape", "trainable"):
        before, after = (getattr(site, field) for site in sites)
        if before != after:
            yield Difference("LS904", path, field, _text(before), _text(after))
    if one.kind != other.kind:
        yield Difference("LS908", path, "decision", _said(one), _said(other))
    elif isinstance(one, Swap) and isinstance(other, Swap):
        for key in sorted({*one.config, *other.config} - {"name"}):
            values = (_text(x.config[key]) if key in x.config else None for x in (one, other))
            before, after = values
            if before != after:
                yield Difference("LS908", path, key, before, after)
        if one.weights != other.weights:
            yield Difference("LS908", path, "weights", one.weights, other.weights)
        if one.adaptive_epsilon != other.adaptive_epsilon:
            before, after = (_text(x.adaptive_epsilon) for x in (one, other))
            yield Difference("LS908", path, "adaptive epsilon", before, after)
    elif _said(one) != _said(other):
        yield Difference("LS908", path, "reason", _said(one), _said(other))


def _said(decision: Decision) -> str:
    if isinstance(decision, Swap):
        return describe_groupnorm(*map(decision.config.get, ("groups", "epsilon")))
    code = f" [{decision.code}]" if isinstance(decision, Refusal) else ""
    return f"{decision.kind}{code}: {decision.reason}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
