"""The errors a user can meet, and the exit code of each.

::

    PtqError                    base class; never raised itself
    ├── InputError         (1)  a file, tensor, shape or setting does not fit
    │   ├── FileError      (1)  the file system said no (missing, full, not permitted)
    │   └── NotRead        (1)  weights that are quantized already, in a layout that is not read
    ├── GateMissed         (3)  the result is worse than a quality gate allows
    └── NumericalError     (4)  the arithmetic failed (a factorization, an overflow)

Wrong usage (exit code 2) is click's. A message is one line: what is wrong, with names and numbers;
`hint` says what to do next, and is a line of its own.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any


class PtqError(Exception):
    """Base of all errors that are explained to the user, not by a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders; the default pickling forgets keyword arguments.
        return partial(type(self), hint=self.hint), (self.message,)


class InputError(PtqError):
    """Bad input or settings that contradict each other. Raised before any work where possible."""


class FileError(InputError):
    """An operation on the file system failed: not found, no space, no permission."""


class NotRead(InputError):
    """Weights that are quantized already, in a layout that is not read here."""


def import_extra(module: str, what: str, extra: str, package: str | None = None) -> Any:
    """A module that only an extra of this package installs. Raises InputError that says so."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"{what} needs {package or module}, which is not installed",
            hint=f"pip install 'ptq[{extra}]' (or 'ptq[all]')",
        ) from None


class stated_in:
    """Let the errors of what is done inside begin with where it stands, unless they say it."""

    def __init__(self, where: object) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, PtqError) and str(self._where) not in error.message:
            error.message = f"{self._where}: {error.message}"


class GateMissed(PtqError):
    """A quality gate (`--max-rel-err`, `--min-gain`, `--max-fallbacks`) was missed."""

    exit_code = 3


class NumericalError(PtqError):
    """A computation failed in a way that no allowed repair mends."""

    exit_code = 4
