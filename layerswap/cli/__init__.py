"""The commands: thin, each parses its options, calls one function and prints its report."""

from __future__ import annotations

import click

from layerswap.cli.comparing import diff
from layerswap.cli.converting import advise, convert, demo, export_model, plan
from layerswap.cli.explaining import rule, schema
from layerswap.cli.judging import check, verify

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="layerswap")
def cli() -> None:
    """Swap BatchNormalization for GroupNormalization in trained tf_keras models, keep what they
    learned, and export with proof.

    Exit codes: 0 fine; 1 the model has findings (refusals, indivisible channels, parity beyond
    tolerance); 2 usage or policy; 3 could not run; 130 interrupted;
    143 terminated.
    """


for command in (plan, advise, convert, export_model, verify, check, diff, rule, schema, demo):
    cli.add_command(command)
