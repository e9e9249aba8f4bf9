"""Where a command's report and progress go."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from layerswap.errors import ExportError, LayerswapError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from layerswap.records import Report

# Where stderr is no terminal.
SECONDS_PER_LINE = 10


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
    def progress(self, long: bool = True) -> Iterator[Callable[..., None]]:
        """Says on stderr which stage runs and how far it is: a bar in a terminal, else lines.

        Args:
            long: whether the work takes long enough for anyone to wonder.
        """
        if self.quiet or not long:
            yield lambda stage, done=0, total=0: None
        elif sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, SpinnerColumn, TimeRemainingColumn

            columns = (SpinnerColumn(), "{task.description}", BarColumn(), TimeRemainingColumn())
            with Progress(*columns, transient=True) as bar:
                yield _Bar(bar)
        else:
            yield _Lines()

    def finish(self, report: Report) -> int:
        """Writes the report; gives the exit code."""
        from layerswap.render import render

        if self.output_file is None:
            print_text(render(report, self.report_format, terminal_width()))
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


class _Bar:
    """A stage at a time, each with a bar of its own, which only moves where steps are counted."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._stage = ""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if stage != self._stage:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(stage, total=None)
            self._stage = stage
        if total:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total)


class _Lines:
    """A line for each stage, and for a long one a line now and then."""

    def __init__(self) -> None:
        self._stage = ""
        self._said = 0.0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            click.echo(f"{stage} ...", err=True)
        elif now - self._said >= SECONDS_PER_LINE:
            click.echo(f"{stage} ... {done} of {total}", err=True)
        else:
            return
        self._stage, self._said = stage, now


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none."""
    return os.get_terminal_size().columns if sys.stdout.isatty() else None


def print_text(text: str) -> None:
    """Writes to stdout; that nobody reads on is no error.

    Raises:
        ExportError: stdout can't be written to.
    """
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
