"""The command `layerswap`: turns exceptions into one message and the documented exit code."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from typing import Any, NoReturn

INTERRUPTED = 130
TERMINATED = 143
COULD_NOT_RUN = 3

# The signals that asked this process to end. Some packages turn whatever is raised while they
# are imported into an ImportError, so the exception that arrives doesn't tell.
_received: list[int] = []


def main() -> NoReturn:
    """Runs the command line and exits."""
    # `kill` shall clean up as Ctrl-C does: the default would leave half-written files.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # in the background of a script
            signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has a β
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code: 0 fine, 1 findings, 2 usage or policy, 3 could not run, 130 interrupted,
        143 terminated.
    """
    debug = "--debug" in arguments
    try:
        # Imported here, since an interrupt meanwhile is one, too.
        from layerswap.cli import cli

        result: Any = cli.main(arguments, prog_name="layerswap", standalone_mode=False)
        return int(result or 0)
    except BaseException as error:
        import click

        if _received or isinstance(error, click.Abort | KeyboardInterrupt):
            click.echo("Interrupted; nothing unfinished is left behind.", err=True)
            return TERMINATED if signal.SIGTERM in _received else INTERRUPTED
        if not isinstance(error, Exception):
            raise
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    """Says what is wrong on stderr and gives the exit code."""
    import click

    from layerswap.errors import LayerswapError

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if debug:
        traceback.print_exception(error)
    if isinstance(error, LayerswapError):
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    # A bug, or a framework's error that nothing foresaw.
    reason = str(error).strip().splitlines() or ["no message"]
    click.echo(
        f"Error: unexpected {type(error).__name__}: {reason[0]}\n"
        "Run again with --debug and report what it shows.",
        err=True,
    )
    return COULD_NOT_RUN


def _stop(number: int, frame: object) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
