"""Whether a work folder is open, for the command line's answer to Ctrl-C and SIGTERM.

As long as none is open there is nothing to tidy up, and the process may end inside the handler.
Later the handler raises `Stopped`. (This must stand at once, so it imports nothing.)
"""

from __future__ import annotations


class Stopped(BaseException):
    """A signal arrived while a work folder was open."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class State:
    open_folders = 0
    arrived = 0


def work_begins() -> None:
    """A work folder is open: from now on signals are exceptions."""
    State.open_folders += 1


def work_ends() -> None:
    State.open_folders -= 1


def check() -> None:
    """Raise again what somebody swallowed (a destructor, a callback)."""
    if State.arrived:
        raise Stopped(State.arrived)
