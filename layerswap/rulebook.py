"""The rules for people: a text for each, and the page `docs/rules.md`.

`make docs` writes the page; `python -m layerswap.rulebook` prints it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

from layerswap.catalog import RULES, FileKind, Rule

# By the digit of the hundreds.
FAMILIES: Mapping[str, str] = {
    "0": "What can't be seen",
    "1": "BatchNormalization",
    "2": "Groups",
    "3": "Operators",
    "4": "Runtimes",
    "5": "Numbers",
    "6": "Weights",
    "7": "Files",
    "8": "Proof",
    "9": "Differences",
}
_KINDS: Mapping[tuple[FileKind, ...], str] = {
    ("keras", "onnx"): "Keras and ONNX files",
    ("keras",): "Keras files",
    ("onnx",): "ONNX files",
}
_INTRODUCTION = """\
# Rules

What `layerswap check` and `layerswap diff` look for. Each rule has a code and a name, and either
may be given where a rule is asked for; a code is never given to another rule. `layerswap rule CODE`
prints what stands here.

A finding is an `error` (exit code 1), `undetermined` (what nobody could decide: exit code 3), a
`warning` or an `info` (neither fails). What the column "only with" names must be asked for; without
it the rule isn't applied.

<!-- Made of layerswap/catalog.py by `make docs`. -->
"""
_ESCAPED = re.compile(r"([\\`*_<|])")
# Options of the command line, up to a space or a sentence's end.
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def describe(rule: Rule, width: int) -> str:
    """All there is to say about a rule, in lines of at most `width` columns."""
    told = {
        "Why": rule.why,
        "Remedy": rule.remedy,
        "Looks at": _KINDS[rule.kinds],
        "Only with": rule.needs,
        "See": "\n".join(rule.sources),
    }
    parts = [f"{rule.code} {rule.name} ({rule.severity}): {rule.summary}"]
    for name, text in told.items():
        parts += [f"  {name}: {line}" for line in text.splitlines()]
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(part) for part in parts) + "\n"


def to_markdown() -> str:
    """The page: a table of all rules, then each with its reasons, by family."""
    rows = ["| rule | severity | a file in which | only with |", "|---|---|---|---|"]
    for rule in RULES:
        link = f"[{rule.code}](#{rule.code.lower()}-{rule.name}) {rule.name}"
        cells = (link, rule.severity, _marked(rule.summary), _marked(rule.needs))
        rows.append(f"| {' | '.join(cells)} |")
    parts = [_INTRODUCTION, "\n".join(rows) + "\n"]
    for digit, family in FAMILIES.items():
        parts.append(f"## {family}\n")
        parts += [_section(rule) for rule in RULES if rule.code[2] == digit]
    return "\n".join(parts)


def _section(rule: Rule) -> str:
    paragraphs = [
        f"### {rule.code} {rule.name}",
        f"A file in which {_marked(rule.summary)}. In {_KINDS[rule.kinds]}; `{rule.severity}`.",
        _marked(rule.why),
        f"**Remedy.** {_marked(rule.remedy)}",
    ]
    if rule.needs:
        paragraphs.append(f"**Only with** {_marked(rule.needs)}.")
    if rule.sources:
        paragraphs.append("See " + ", ".join(f"<{source}>" for source in rule.sources) + ".")
    return "\n\n".join(paragraphs) + "\n"


def _marked(text: str) -> str:
    """As Markdown that shows just this text, options as code."""
    return _OPTION.sub(r"`\g<0>`", _ESCAPED.sub(r"\\\1", text))


if __name__ == "__main__":
    print(to_markdown(), end="")
