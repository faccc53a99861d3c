"""The console script: exit codes, signals, and errors in one line, imports included."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


class Terminated(BaseException):
    """SIGTERM arrived."""


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Run the command line. Exit codes: errors.py; 130 interrupted, 143 terminated."""
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _prepare_streams()
        from ptq_cli.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = _stopped("interrupted", 130)
    except Terminated:
        code = _stopped("terminated", 143)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make the three streams safe to use.

    A closed one must not become the next file that is opened: stdin and stdout become ones that
    fail, stderr one that is silent. What an encoding lacks is escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    # Python has None where a stream was closed.
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8")
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _stopped(word: str, code: int) -> int:
    # A second signal ends at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"\nptq: {word}; finished work is kept, the same command goes on\n")
    return code


if __name__ == "__main__":
    main()
