"""The commands that explain: rule, schema. They look at no model."""

from __future__ import annotations

import json

import click

from layerswap.cli.options import debug_option
from layerswap.cli.reporting import print_text, terminal_width

# Lines of running text that people like to read, where no terminal says less.
TEXT_WIDTH = 100


@click.command()
@click.argument("rules", metavar="[CODE]...", nargs=-1)
@debug_option
def rule(rules: tuple[str, ...]) -> int:
    """Explain rules of check and diff: what they find, why that matters, what to do.

    CODE is a code (LS201), the beginning of one (LS2), a name or ALL; without any, a table of all
    rules.
    """
    from layerswap import catalog, rulebook
    from layerswap.render import rule_table

    width = terminal_width()
    for text in rules:
        if not catalog.matching(text):
            catalog.find(text)  # raises, and says what is near
    if rules:
        codes = catalog.chosen(rules)
        wanted = (rule for rule in catalog.RULES if rule.code in codes)
        columns = min(width or TEXT_WIDTH, TEXT_WIDTH)
        print_text("\n".join(rulebook.describe(rule, columns) for rule in wanted))
    else:
        print_text(rule_table(catalog.RULES, width))
    return 0


@click.command()
@click.argument(
    "kind", metavar="[report|plan]", type=click.Choice(["report", "plan"]), default="report"
)
@debug_option
def schema(kind: str) -> int:
    """Print the JSON Schema of what --report-format json prints.

    That is a plan for the command plan, a report for every other.
    """
    from layerswap import json_schema
    from layerswap.records import Report, SwapPlan

    made = json_schema.schema_of(SwapPlan if kind == "plan" else Report)
    print_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    return 0
