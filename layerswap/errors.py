"""The exception tree.

An exception says that the work can't go on; a problem *of the model under check* is a
`Finding` in a report instead. Each class carries the exit code of the command line:
1 the model has findings, 2 usage or policy, 3 could not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LayerswapError(Exception):
    """Base of every error that layerswap raises on purpose.

    Args:
        message: one sentence: what is wrong, with the numbers.
        where: the layer path or file concerned, if any.
        hint: what the user can do about it, if anything.
    """

    exit_code = 3

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        # By default it would be made anew of its message alone, which not every class takes.
        return _restored, (type(self), self.args, self.__dict__)

    @property
    def code(self) -> str:
        """The class as a finding's code: `IndivisibleChannelsError` → `indivisible-channels`."""
        words = re.findall("[A-Z][a-z]*", type(self).__name__.removesuffix("Error"))
        return "-".join(words).lower()

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n{self.hint}" if self.hint else text


def _restored(
    kind: type[LayerswapError], args: tuple[Any, ...], state: dict[str, Any]
) -> LayerswapError:
    """An error that came from another process."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class LoadError(LayerswapError):
    """A file can't be read as what it should be."""


@contextmanager
def reading(where: str, problem: str, hint: str) -> Iterator[None]:
    """Turns whatever a damaged file makes of its readers into one `LoadError`.

    Args:
        where: the file; a `LoadError` that doesn't name one gets it.
        problem: what can't be done; the kind of the error is added.
        hint: what the user can do about it.

    Raises:
        LoadError: the block raised anything.
    """
    try:
        yield
    except LoadError as error:
        error.where = error.where or where
        raise
    except Exception as error:
        raise LoadError(f"{problem}: {type(error).__name__}", where=where, hint=hint) from error


class UsageError(LayerswapError):
    """The call itself is wrong: an unknown suffix, options that exclude each other."""

    exit_code = 2


class PolicyError(UsageError):
    """A field of the policy is unknown, of the wrong type, out of range or contradictory."""


class UnsupportedModelError(LayerswapError):
    """The model holds something that can't be converted; names every offender.

    `plan` is the SwapPlan with the refusals, where there is one.
    """

    exit_code = 1
    plan: Any = None


class IndivisibleChannelsError(UnsupportedModelError):
    """Channel counts that don't divide by the groups; names every layer and its legal groups."""


class TransferError(LayerswapError):
    """Weights can't be fitted or a variable of the target is unaccounted for."""

    exit_code = 1


class ExportError(LayerswapError):
    """The artifact can't be made or written."""


class ParityError(LayerswapError):
    """A runtime does not reproduce the Keras model within tolerance."""

    exit_code = 1


class MissingExtraError(LayerswapError):
    """A package that an optional extra installs is missing."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed",
            hint=f"Install it with: pip install 'layerswap[{extra}]'",
        )
        self.package = package
        self.extra = extra


_QUOTED = re.compile(r"^\s*\w*(?:Error|Exception): (.+)$", re.MULTILINE)
_WRAPPINGS = ("Exception encountered when calling", "in user code:")


def reason_of(error: BaseException) -> str:
    """The line of a framework's message that says what went wrong.

    AutoGraph quotes the original error below a traceback of the user's code, Keras puts a line
    about the layer above it.
    """
    text = str(error)
    quoted = [line for line in _QUOTED.findall(text) if not line.startswith(_WRAPPINGS)]
    if quoted:
        return str(quoted[-1]).strip()  # the innermost
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_WRAPPINGS)]
    return (telling or lines or [type(error).__name__])[0]
