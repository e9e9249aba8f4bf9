"""The command `layerswap`: turns exceptions into one message and the documented exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from layerswap.cli import cli
from layerswap.errors import LayerswapError

INTERRUPTED = 130
COULD_NOT_RUN = 3


def main() -> NoReturn:
    """Runs the command line and exits."""
    # `kill` shall clean up as Ctrl-C does: the default would leave half-written files.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code: 0 fine, 1 findings, 2 usage or policy, 3 could not run, 130 interrupted.
    """
    debug = "--debug" in arguments
    try:
        result: Any = cli.main(arguments, prog_name="layerswap", standalone_mode=False)
        return int(result or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was written.", err=True)
        return INTERRUPTED
    except LayerswapError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has enough; the interpreter shall not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COULD_NOT_RUN
    except Exception as error:  # a bug, or a framework's error that nothing foresaw
        if debug:
            traceback.print_exc()
        reason = str(error).strip().splitlines() or ["no message"]
        click.echo(
            f"Error: unexpected {type(error).__name__}: {reason[0]}\n"
            "Run again with --debug and report what it shows.",
            err=True,
        )
        return COULD_NOT_RUN


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
