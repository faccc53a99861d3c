"""CPU seconds of a run by phase, for `measuring.py` and `scaling.py`.

The functions that begin a phase are found by their names in the package and timed; what they call
counts for them, unless it begins a phase of its own. All other time is the phase "rest". Phases are
of the main thread, but for the forward, whose threads count, and for functions of this list that
other threads call.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib import import_module
from typing import Any

READ, FORWARD, STATISTICS, FACTORS = "read", "forward", "statistics", "factors"
FACTOR, ROUND, REFINE, MEASURE, WRITE = "factor", "round", "refine and sweeps", "measure", "write"
REST = "rest"

# Phases by "module:function". Inside FACTORS, a smoothing's search, nothing else is told apart.
BEGIN = {
    "storage.checkpoint:Checkpoint.read": READ,
    "storage.checkpoint:Checkpoint.matrix": READ,
    "storage.checkpoint:Checkpoint.digest": READ,
    "storage.rows:FileRows.__getitem__": READ,
    "storage.rows:FileRows.digest": READ,
    "storage.npy:InputsFile.read": READ,
    "calibration.streams:Streams.enter": FORWARD,
    "calibration.streams:Streams.advance": FORWARD,
    "calibration.streams:Streams.look_ahead": FORWARD,
    "calibration.streams:head_fisher": FORWARD,
    "calibration.streams:last_residuals": FORWARD,
    "calibration.streams:Streams.statistics": STATISTICS,
    "calibration.streams:Streams._drift": STATISTICS,  # in a thread of its own
    "calibration.from_activations:Activations.load": STATISTICS,
    "run.settle:Group.settle": FACTORS,
    "numerics.feedback:make_feedback": FACTOR,
    "numerics.awq:hessian_root": FACTOR,
    "run.quantize_unit:choose": ROUND,
    "numerics.panel:Panel._descend": REFINE,
    "numerics.panel:Panel._sweep_block": REFINE,
    "numerics.output_errors:measure_rows": MEASURE,
    "run.nearest:as_run": MEASURE,
    "run.nearest:as_stored": WRITE,
    "storage.units:UnitStore.put": WRITE,
    "storage.shards:put_tensor": WRITE,
    "run.output:write_output": WRITE,
}


class Clock:
    """seconds: by place and phase. place: what is worked on, as `label` says"""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.place = ""
        self._phases = [REST]
        self._mark = self._now()
        self._main, self._lock = threading.get_ident(), threading.Lock()

    def _now(self) -> tuple[float, float]:
        """CPU seconds of this thread, and of all."""
        return time.thread_time(), time.process_time()

    def charge(self) -> None:
        """The time since the last call goes to the phase in hand."""
        before, self._mark = self._mark, self._now()
        whole = self._phases[-1] == FORWARD
        with self._lock:
            self.seconds[self.place, self._phases[-1]] += self._mark[whole] - before[whole]

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function, as a phase. In another thread it counts for that thread alone."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._main:
                return self._aside(function, phase, args, kwargs)
            self.charge()
            self._phases.append(FACTORS if FACTORS in self._phases else phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self._phases.pop()

        return call

    def _aside(self, function: Callable[..., Any], phase: str, args: Any, kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.thread_time() - begin
            with self._lock:
                self.seconds[self.place, phase] += spent
                if self._phases[-1] == FORWARD:
                    self.seconds[self.place, FORWARD] -= spent

    def rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`measure_rows`, what it is handed timed as rounding."""

        @wraps(function)
        def call(shape: Any, pieces_of: Callable[[slice], Iterator[Any]], *args: Any) -> Any:
            def pieces(panel: slice) -> Iterator[Any]:
                given = pieces_of(panel)
                following = self.timed(lambda: next(given, None), ROUND)
                while (piece := following()) is not None:
                    yield piece

            return function(shape, pieces, *args)

        return call

    def label(self, name: str, place: Callable[..., str]) -> None:
        """From a call of the function on, time goes to the place that its arguments name."""

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                self.charge()
                self.place = place(*args, **kwargs)
                return function(*args, **kwargs)

            return call

        replace(name, wrap)

    def watch(self) -> None:
        """Time every function of BEGIN from here on."""
        for name, phase in BEGIN.items():
            replace(name, partial(self.timed, phase=phase))
        module = import_module("ptq_cli.run.nearest")
        module.measure_rows = self.rows(module.measure_rows)  # type: ignore[attr-defined]
        self._mark = self._now()

    def by_phase(self) -> dict[str, float]:
        """Seconds of each phase, all places together."""
        self.charge()
        sums: dict[str, float] = defaultdict(float)
        for (_, phase), spent in self.seconds.items():
            sums[phase] += spent
        return dict(sums)


def replace(name: str, wrap: Callable[[Any], Any]) -> None:
    """Put `wrap(function)` in the place of a function of the package, wherever it was imported."""
    module_name, path = name.split(":")
    owner: Any = import_module(f"ptq_cli.{module_name}")
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, attribute)
    made = wrap(function)
    setattr(owner, attribute, made)
    for module in [m for n, m in sys.modules.items() if n.startswith("ptq_cli") and not parents]:
        for key in [key for key, value in vars(module).items() if value is function]:
            setattr(module, key, made)
