"""The console script: exit codes, signals, and errors without a traceback, imports included."""

from __future__ import annotations

from ptq_cli.cli import signals
from ptq_cli.storage.interruption import Stopped

signals.install()

import io  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from typing import NoReturn  # noqa: E402


def main() -> NoReturn:
    """Run the command line. Exit codes: errors.py; 130 interrupted, 143 terminated."""
    _prepare_streams()
    try:
        from ptq_cli.cli.main import run

        code = run(sys.argv[1:])
    except Stopped as stopped:
        signals.leave(stopped.number)
    except KeyboardInterrupt:  # raised by a library itself
        signals.leave(signal.SIGINT)
    signals.too_late()
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


if __name__ == "__main__":
    main()
