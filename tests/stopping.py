"""`ptq` in a process of its own, stopped at a chosen call, so that no test waits for a clock.

    python -m tests.stopping PLACE NUMBER HOW [parts=N] ARGUMENTS…

PLACE is a function of the package, `ptq_cli.storage.units:UnitStore.put`. Its NUMBER-th call begins
with what HOW says: a signal to the process itself (`SIGKILL`), a signal to its whole group, as a
terminal sends it (`group SIGINT`), or `pause`: it says so on stdout and goes on once stdin is
closed. `parts=N` cuts a site's tokens into parts of N.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tests.builders import ROOT

STAGED = "ptq_cli.storage.units:UnitStore.put"  # in whatever process works on the unit
TOLD = "ptq_cli.cli.progress:Follow.__call__"  # in the runner, when a unit is finished


def start(place: str, number: int, how: str, *arguments: object, **options: Any) -> Any:
    """The process (`subprocess.Popen`), in a group of its own."""
    words = ["-m", "tests.stopping", place, number, how, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
        **{**pipes, **options},
    )


def stopped(place: str, number: int, how: str, *arguments: object) -> tuple[int, str]:
    """Run it to its end: the exit code (negative: the signal) and stderr."""
    process = start(place, number, how, *arguments)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def killed(place: str, number: int, *arguments: object) -> None:
    """Run it, and see that it was killed there."""
    code, err = stopped(place, number, "SIGKILL", *arguments)
    assert code == -signal.SIGKILL, f"it ended before call {number}: {err}"


def stop_at(
    place: str, number: int, answer: Callable[[], None], put: Callable[..., None] = setattr
) -> None:
    """Have the function call `answer` at the beginning of its `number`-th call.

    put: takes its place, as `setattr` does
    """
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *owners, name = path.split(".")
    for word in owners:
        owner = getattr(owner, word)
    function, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            answer()
        return function(*arguments, **options)

    put(owner, name, counted)


def pause() -> None:
    print("paused", flush=True)
    sys.stdin.read()


def end_here() -> None:
    """As by the kernel when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    from ptq_cli.__main__ import main

    place, number, how, *arguments = sys.argv[1:]
    if arguments[0].startswith("parts="):
        from ptq_cli.calibration import from_activations

        from_activations.PART_TOKENS = int(arguments.pop(0).removeprefix("parts="))
    os.fsync = os.fstat  # nobody cuts the power
    send = os.killpg if how.startswith("group ") else os.kill
    name = how.removeprefix("group ")
    answer = pause if how == "pause" else lambda: send(os.getpid(), signal.Signals[name])
    stop_at(place, int(number), answer)
    sys.argv[1:] = arguments
    main()


if __name__ == "__main__":
    main()
