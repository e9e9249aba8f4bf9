"""Applies the rules to every site: patterns, overrides, and what concerns the model as a whole."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from layerswap import rules
from layerswap.errors import IndivisibleChannelsError, PolicyError, UnsupportedModelError
from layerswap.policy import Policy
from layerswap.records import Decision, Finding, Site, Skip, Statistics, SwapPlan


def make_plan(
    source: str,
    sites: Sequence[Site],
    statistics: Mapping[str, Statistics],
    policy: Policy,
    findings: Iterable[Finding] = (),
) -> SwapPlan:
    """Decides every site.

    Args:
        source: names the model in the plan.
        sites: every BatchNormalization, in the order of the walk.
        statistics: by path, for the sites that have weights.
        policy: what the user wants.
        findings: what the shells noticed about the model.

    Raises:
        PolicyError: a pattern matches no site, or an override contradicts the policy.
    """
    _check_patterns([site.path for site in sites], policy)
    decisions = tuple(_decide(site, policy, statistics.get(site.path)) for site in sites)
    return SwapPlan(source, policy.to_plain(), decisions, tuple(findings))


def raise_refusals(plan: SwapPlan) -> None:
    """Raises one error that lists every refusal of the plan, if there is any.

    Raises:
        IndivisibleChannelsError: all refusals are about the channels and the groups.
        UnsupportedModelError: others are among them.
    """
    refusals = plan.refusals
    if not refusals:
        return
    lines = [f"  {r.site.path} ({r.site.class_name}): {r.reason} [{r.code}]" for r in refusals]
    hints = dict.fromkeys(r.hint for r in refusals if r.hint)
    only_groups = all(r.code == "indivisible-channels" for r in refusals)
    kind = IndivisibleChannelsError if only_groups else UnsupportedModelError
    count = f"{len(refusals)} of {len(plan.decisions)}"
    error = kind(
        f"{count} BatchNormalization layers can't be swapped:\n" + "\n".join(lines),
        where=plan.source,
        hint="\n".join(hints),
    )
    error.plan = plan
    raise error


def _decide(site: Site, policy: Policy, statistics: Statistics | None) -> Decision:
    if policy.include and not any(path_matches(p, site.path) for p in policy.include):
        return Skip(site, "not included")
    for pattern in policy.exclude:
        if path_matches(pattern, site.path):
            return Skip(site, f"excluded by '{pattern}'")
    override = next(
        (fields for p, fields in policy.overrides.items() if path_matches(p, site.path)), None
    )
    return rules.decide(site, policy.applied(override), statistics)


def path_matches(pattern: str, path: str) -> bool:
    """Whether a case-sensitive glob matches a whole layer path.

    `*` and `?` stop at `/`; `**` doesn't, and `**/` also matches no parent at all. Brackets stand
    for themselves, since they are part of paths (`block/bns[0]`).
    """
    return _compiled(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    translations = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(translations.get(piece, re.escape(piece)) for piece in pieces))


def _check_patterns(paths: Sequence[str], policy: Policy) -> None:
    if not paths:
        return  # that there is no BatchNormalization at all is the more useful message
    unmatched = [
        (field, pattern)
        for field in ("include", "exclude", "overrides")
        for pattern in getattr(policy, field)
        if not any(path_matches(pattern, path) for path in paths)
    ]
    if not unmatched:
        return
    messages = []
    for field, pattern in unmatched:
        close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5) or paths[:3]
        messages.append(
            f"{field}: '{pattern}' matches no BatchNormalization; there are, for example: "
            + ", ".join(close)
        )
    raise PolicyError(
        "; ".join(messages),
        hint="Patterns match the whole path: * stops at '/', ** doesn't. "
        "`layerswap plan MODEL` lists the paths.",
    )
