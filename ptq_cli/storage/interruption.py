"""Whether there is something to tidy up, for the command line's answer to Ctrl-C and SIGTERM.

As long as there is not, the process may end inside the handler. While a work folder is open or a
file half-written, the handler raises `Stopped`. (This must stand at once, so it imports nothing.)
"""

from __future__ import annotations


class Stopped(BaseException):
    """A signal arrived while there was something to tidy up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class State:
    open_works: list[None] = []  # noqa: RUF012 (of the process; threads may begin some, too)
    arrived = 0
    keeps = False  # whether the same command goes on with what was done so far


def work_begins(*, keeps: bool = False) -> None:
    """Something must be tidied up in the end: until `work_ends`, signals are exceptions.

    keeps: what is finished stays, and the same command goes on with it
    """
    State.open_works.append(None)
    State.keeps = State.keeps or keeps


def work_ends() -> None:
    State.open_works.pop()


def check() -> None:
    """Raise again what somebody swallowed (a destructor, a callback)."""
    if State.arrived:
        raise Stopped(State.arrived)
