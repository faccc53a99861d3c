"""A worker process (workers.py starts it): takes tasks from a socket, one after the other.

Its stderr is the runner's, for the last words of a crash; it prints nothing itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Serve until the runner hangs up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    line = Connection(descriptor)
    while True:
        try:
            fn, args = line.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (fn(*args), None)
        except Exception as error:
            answer = (None, error)
        _send(line, *answer)


def _send(line: Connection, answer: Any, error: Exception | None) -> None:
    try:
        line.send((answer, error))
    except OSError:
        return
    except Exception as failure:  # an answer or error that cannot travel is told in words
        line.send((None, RuntimeError(f"{type(error or failure).__name__}: {error or failure}")))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
