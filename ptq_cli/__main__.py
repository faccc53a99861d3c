"""The console script: exit codes, signals, and errors in one line, imports included."""

from __future__ import annotations

import contextlib
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
        from ptq_cli.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = _stopped("interrupted", 130)
    except Terminated:
        code = _stopped("terminated", 143)
    sys.exit(code)


def _stopped(word: str, code: int) -> int:
    # A second signal ends at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"\nptq: {word}; finished work is kept, the same command goes on\n")
    return code


if __name__ == "__main__":
    main()
