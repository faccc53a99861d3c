"""Ctrl-C and SIGTERM, for the command line alone: one line, and the exit code of the signal.

As long as there is nothing to tidy up, the process ends inside the handler: an exception would be
at the mercy of any import it lands in. Later the handler raises `Stopped`; work folders and workers
are closed on the way out, scratch files removed, and finished units stay. A second signal ends the
process at once.
"""

from __future__ import annotations

# The half of `signal` that is built in: the other imports enum, and this must stand at once.
import _signal as signal  # type: ignore[import-not-found]
import os

from ptq_cli.storage.interruption import State, Stopped

TYPE_CHECKING = False  # for the same reason not typing's
if TYPE_CHECKING:
    from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def install() -> None:
    """Answer both signals (unless the process was started to ignore one, as by nohup)."""
    for number in WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _answer)


def _answer(number: int, frame: FrameType | None) -> None:
    for other in WORDS:
        signal.signal(other, signal.SIG_DFL)
    State.arrived = number
    if State.open_works:
        raise Stopped(number)
    leave(number)


def leave(number: int) -> None:
    """End the process with one line: whatever threads there are, nobody waits for them."""
    more = "; finished work is kept, the same command goes on" if State.keeps else ""
    cursor = b"\x1b[?25h\n" if os.isatty(2) else b""
    try:
        os.write(2, cursor + f"ptq: {WORDS[number]}{more}\n".encode())
    finally:
        os._exit(128 + number)


def too_late() -> None:
    """All is done: a signal while the interpreter shuts down must not change the exit code."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)
