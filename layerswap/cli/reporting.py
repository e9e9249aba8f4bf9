"""Where a command's report and progress go."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from layerswap.errors import ExportError, LayerswapError, UsageError

if TYPE_CHECKING:
    from layerswap.records import Report


@dataclass(frozen=True, slots=True)
class Output:
    """How a command answers."""

    report_format: str
    output_file: str | None
    force: bool
    quiet: bool

    def check(self, *others: str) -> None:
        """Says before any work that the report couldn't be written.

        Args:
            others: files and folders of the command, which a report must not replace or enter.
        """
        if self.output_file is None:
            return
        from layerswap.atomic import check_target

        place = os.path.realpath(self.output_file)
        for other in map(os.path.realpath, others):
            if os.path.commonpath((place, other)) == other:
                raise UsageError(
                    "the report would replace a part of the model or of its reference",
                    where=self.output_file,
                    hint="Choose another place.",
                )
        check_target(self.output_file, self.force)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Says on stderr which stage runs: a spinner in a terminal, lines elsewhere."""
        if self.quiet:
            yield lambda stage: None
        elif sys.stderr.isatty():
            from rich.console import Console

            with Console(stderr=True).status("start") as status:
                yield status.update
        else:
            yield lambda stage: click.echo(f"{stage} ...", err=True)

    def finish(self, report: Report) -> int:
        """Writes the report; gives the exit code."""
        from layerswap.render import render

        if self.output_file is None:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else None
            _print(render(report, self.report_format, width))
        else:
            from layerswap.atomic import replacing

            with replacing(self.output_file, self.force) as temporary:
                # A file's name needs not be text; what can't be encoded is escaped.
                text = render(report, self.report_format)
                temporary.write_text(text, "utf-8", "backslashreplace")
        return report.exit_code

    @contextmanager
    def failures(self, command: str, source: str) -> Iterator[None]:
        """A problem of the model is a result, too: whoever asked for a report gets one."""
        try:
            yield
        except LayerswapError as error:
            if error.exit_code == 1 and (self.report_format != "text" or self.output_file):
                from layerswap.records import Finding, Report

                finding = Finding(error.code, "error", error.where, error.message, error.hint)
                plan = getattr(error, "plan", None)
                self.finish(Report(command, source, plan=plan, findings=(finding,)))
            raise


def _print(text: str) -> None:
    try:
        click.echo(text, nl=False)
    except OSError as error:
        # The interpreter would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else whoever reads has enough
            raise ExportError(
                f"the report can't be written: {error.strerror or error}",
                where="standard output",
                hint="Everything else is done. Free some space, or see --output-file.",
            ) from error
