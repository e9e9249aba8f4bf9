"""Differences → text for people: grouped by kind, the same of many layers in one line."""

from __future__ import annotations

from collections.abc import Sequence

from layerswap import catalog
from layerswap.records import Difference, Report

# Beyond so many lines of a kind the rest is counted.
_MOST_LINES = 12
_MOST_NAMES = 3
_MOST_CHARACTERS = 200


def describe(difference: Difference) -> str:
    """What differs, without where."""
    parts = [difference.message]
    if difference.before is not None or difference.after is not None:
        before, after = (
            "nothing" if x is None else x for x in (difference.before, difference.after)
        )
        parts.append(f": {before} → {after}")
    if norms := difference.norms:
        learned = "γ and β: " if difference.code == "LS901" else ""
        parts.append(
            f"; {learned}norm {norms['before']:.4g} → {norms['after']:.4g}, of the difference "
            f"{norms['difference']:.3g} ({_share(norms['relative'])}), "
            f"largest {norms['largest']:.3g}"
        )
    return "".join(parts)


def describe_groupnorm(groups: object, epsilon: object) -> str:
    """A GroupNormalization in words."""
    number = f"{epsilon:.4g}" if isinstance(epsilon, float | int) else str(epsilon)
    return f"GroupNormalization, {groups} group{'' if groups == 1 else 's'}, epsilon {number}"


def render_differences(report: Report) -> str:
    """The report of `diff` as text: a verdict, and below it what differs."""
    found = report.differences
    open_ = [d for d in found if d.code == "LS910"]
    count = len(found) - len(open_)
    verdict = "no difference" if not count else f"{count} difference{'s' if count > 1 else ''}"
    lines = [f"{report.source}: {verdict}{', but not all was compared' if open_ else ''}"]
    for code in dict.fromkeys(d.code for d in found):
        own = [d for d in found if d.code == code]
        lines += ["", f"[{code}] {catalog.find(code).summary}: {len(own)}"]
        lines += _lines(own)
    return "\n".join(lines)


def _lines(found: Sequence[Difference]) -> list[str]:
    """A line for each; what is said of several in the same words is one."""
    groups: dict[str, list[Difference]] = {}
    for difference in found:
        text = describe(difference)
        if difference.code == "LS901" and len(found) > _MOST_LINES:
            # Each has an epsilon and norms of its own, which are in the JSON.
            text = difference.message.partition(", epsilon")[0]
        groups.setdefault(text, []).append(difference)
    order = list(groups.items())
    if found[0].code == "LS906":  # those that changed most come first
        order.sort(key=lambda item: -_size(item[1][0]))
    lines = [f"  {_places(group)}: {_shortened(text)}" for text, group in order[:_MOST_LINES]]
    if rest := order[_MOST_LINES:]:
        more = sum(len(group) for _, group in rest)
        lines.append(f"  … and {more} more; --report-format json has them all")
    return lines


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


def _places(group: Sequence[Difference]) -> str:
    names = ", ".join(d.where for d in group[:_MOST_NAMES])
    if len(group) == 1:
        return names
    more = len(group) - _MOST_NAMES
    return f"{len(group)} × ({names}{f' and {more} more' if more > 0 else ''})"


def _size(difference: Difference) -> float:
    share = difference.norms.get("relative", float("inf"))
    return share if share == share else float("inf")  # NaN is the worst


def _share(relative: float) -> str:
    return f"{relative:.2%}" if relative < 10 else f"{relative:.3g} times"
