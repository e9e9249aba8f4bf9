"""Puts what a benchmark found into a page of the documentation, between marks with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from machine import describe

DOCS = Path(__file__).parents[1] / "docs"


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown: the first column holds the rows' names, all others are numbers."""
    text = f"| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}\n"
    return text + "".join(f"| {' | '.join((name, *cells))} |\n" for name, cells in rows.items())


def with_machine(text: str) -> str:
    """The text, and behind it the machine and how busy it is."""
    return text + "\n" + "".join(f"    {line}\n" for line in describe().splitlines())


def replace(page: str, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->`; says so.

    Args:
        page: the file's name in `docs/`.
        name: of the marks.
        text: whole lines of Markdown.

    Raises:
        ValueError: a mark isn't there.
    """
    path, start, end = DOCS / page, f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} lacks the marks of {name}")
    path.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")
    print(f"wrote {path}")
