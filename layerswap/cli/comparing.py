"""The command that compares two files: diff."""

from __future__ import annotations

import click

from layerswap.cli.options import report_options
from layerswap.cli.reporting import Output


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--exit-code", is_flag=True, help="Exit with 1 if they differ, 3 if that can't be told."
)
@report_options
def diff(first: str, second: str, exit_code: bool, output: Output) -> int:
    """Say in what A and B differ: two ONNX files, two Keras files or two plans (JSON).

    Layers, operators, weights and the interface are compared, not bytes: names and order that a
    new export changes are no difference. Needs no TensorFlow, and runs neither model.
    """
    output.check(first, second)
    from layerswap import differing

    return output.finish(differing.diff(first, second, exit_code=exit_code))
