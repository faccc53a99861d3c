"""Progress for people, on stderr: a few live lines on a terminal, elsewhere one plain line for each
piece of work. With console.py the only importer of rich.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptq_cli.cli.console import shows_unicode, write
from ptq_cli.core.progress import Progress
from ptq_cli.core.report import LayerReport
from ptq_cli.core.text import middle, number, printable, size
from ptq_cli.errors import FileError
from ptq_cli.report.report import row_error
from ptq_cli.report.words import times


@dataclass(frozen=True)
class _Words:
    """What a phase is called. unit: of its work, where that is a word for people"""

    doing: str
    did: str
    pieces: str
    unit: str = ""


_PHASES = {
    "calibrate": _Words("calibrating", "calibrated", "sites"),
    "smooth": _Words("smoothing", "smoothed", "sites"),
    "quantize": _Words("quantizing", "quantized", "layers", "weights"),
    "decode": _Words("decoding", "decoded", "tensors"),
    "repack": _Words("repacking", "repacked", "layers", "weights"),
    "write": _Words("writing", "wrote", "files", "bytes"),
    "measure": _Words("measuring", "measured", "layers", "weights"),
    "run": _Words("running", "ran", "blocks"),
    "predict": _Words("predicting", "predicted", "batches"),
}


class Meter:
    """How fast a phase goes. What was taken over from an interrupted run is no speed.

    begin: of the phase, in seconds
    """

    def __init__(self, begin: float) -> None:
        self.begin, self.last = begin, Progress("", 0, 0)
        self._kept = self._kept_work = 0.0

    def add(self, step: Progress) -> None:
        if step.kept:
            self._kept += step.done - self.last.done
            self._kept_work += step.work - self.last.work
        self.last = step

    def rate(self, now: float, *, pieces: bool = False) -> float | None:
        """Pieces or work a second; None where nothing can be said."""
        last, elapsed = self.last, now - self.begin
        done = (
            last.done - self._kept if pieces or not last.all_work else last.work - self._kept_work
        )
        return done / elapsed if elapsed > 0 and done > 0 else None

    def left(self, now: float) -> float | None:
        """Seconds, at the speed so far."""
        rate, last = self.rate(now), self.last
        rest = last.all_work - last.work if last.all_work else last.total - last.done
        return None if rate is None else rest / rate


class Follow:
    """A listener that shows what it hears, from `with` to the end of its block.

    what: what is done until the first piece is; quiet: show nothing
    clock: seconds, for tests
    """

    def __init__(
        self, what: str, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._quiet, self._clock = what, quiet, clock
        self._live: Any = None
        self._meter = Meter(clock())
        self._worst: LayerReport | None = None

    def __enter__(self) -> Follow:
        if not self._quiet and _is_terminal():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            console = Console(stderr=True)
            unicode = shows_unicode(sys.stderr)
            self._live = Live(
                get_renderable=lambda: Text(
                    "\n".join(self.lines(console.width - 1, unicode)),
                    no_wrap=True,
                    overflow="ellipsis",
                ),
                console=console,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, step: Progress) -> None:
        now = self._clock()
        if step.phase != self._meter.last.phase:
            self._meter = Meter(now if step.done == 0 else self._meter.begin)
            self._worst = None
        before, row = self._meter.last.done, step.row
        self._meter.add(step)
        if row is not None and (self._worst is None or row_error(row) > row_error(self._worst)):
            self._worst = row
        if self._live is None and not self._quiet and step.done > before:
            with contextlib.suppress(OSError, ValueError, FileError):
                write(sys.stderr, self.plain(now))

    # ---- words ----

    def plain(self, now: float) -> str:
        """The line for a finished piece: `[3/28] model.layers.0.mlp.up_proj gptq 0.003 …`."""
        step = self._meter.last
        count = f"[{step.done:>{len(str(step.total))}}/{step.total}]"
        left = self._meter.left(now)
        if step.done == step.total:
            words = f"in {duration(now - self._meter.begin)}"
        else:
            words = "" if left is None else _left(left)
        what = printable(step.name)
        if step.row is not None:
            what += f" {_result(step.row)}"
        elif step.name:
            what = f"{_PHASES[step.phase].did} {what}"
        kept = "kept from the interrupted run" if step.kept else ""
        return " ".join([count, ", ".join(filter(None, (what, kept, words)))])

    def lines(self, width: int, unicode: bool) -> list[str]:
        """The live lines, none wider than `width` where that is 60 or more."""
        now, step = self._clock(), self._meter.last
        if not step.phase:
            return [f"{self._what}: {duration(now - self._meter.begin)}"]
        result = [self._head(now, width, unicode)]
        if step.row is not None:
            result.append(_fit("last  ", step.row.module, f" {_brief(step.row)}", width))
        elif step.name:
            result.append(_fit("last  " if step.done else "first ", step.name, "", width))
        if self._worst is not None:
            error = f" {number(row_error(self._worst))}"
            result.append(_fit("worst ", self._worst.module, error, width))
        return result

    def _head(self, now: float, width: int, unicode: bool) -> str:
        """What is done, how much of it, how long still, how fast."""
        step, words = self._meter.last, _PHASES[self._meter.last.phase]
        dot = " · " if unicode else ", "
        count = f"{step.done}/{step.total} {words.pieces}"
        rate, left = self._rate(now, words), self._meter.left(now)
        after = duration(now - self._meter.begin) if left is None else _left(left)
        share = step.work / step.all_work if step.all_work else step.done / max(step.total, 1)
        bar = _bar(share, 12 if width < 100 else 36, unicode) if width >= 70 else ""
        facts = dot.join(filter(None, (count, after, rate)))
        return " ".join(filter(None, (words.doing, bar, facts)))

    def _rate(self, now: float, words: _Words) -> str:
        rate = self._meter.rate(now, pieces=not words.unit)
        if rate is None:
            return ""
        if words.unit == "bytes":
            return f"{size(rate)}/s"
        from rich.filesize import pick_unit_and_suffix

        unit, suffix = pick_unit_and_suffix(int(rate), ["", " k", " M", " G"], 1000)
        return f"{rate / unit:.3g}{suffix} {words.unit or words.pieces}/s"


def _result(row: LayerReport) -> str:
    """A layer's method, error, and how that compares to plain rounding."""
    gain = row.gain_vs_rtn
    words = ""
    if row.fallback is not None:
        words = f" ({row.fallback})"
    elif not row.calibrated:
        words = " (of the weights)"
    elif gain is not None and row.method != "rtn":
        words = f" ({gain:.2f}x {'better than rtn' if gain >= 1 else 'rtn: worse'})"
    return f"{row.method} {number(row_error(row))}{printable(words)}"


def _brief(row: LayerReport) -> str:
    gain = "" if row.gain_vs_rtn is None else f" ({times(row.gain_vs_rtn)})"
    return f"{row.method}{'*' if row.fallback else ''} {number(row_error(row))}{gain}"


def _fit(before: str, name: str, after: str, width: int) -> str:
    """A name between two words, cut in its middle, then the words at their end."""
    room = max(width - len(before) - len(after), 12)
    return before + middle(printable(name), room) + after


def _bar(share: float, length: int, unicode: bool) -> str:
    full = min(length, max(0, int(share * length)))
    if unicode:
        return "━" * full + "─" * (length - full)
    return f"[{'#' * full}{'-' * (length - full)}]"


def _left(seconds: float) -> str:
    return f"{duration(seconds)} left" if seconds >= 1 else "under 1 s left"


def duration(seconds: float) -> str:
    """Seconds for people: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _is_terminal() -> bool:
    """Whether stderr is a terminal where lines can be drawn anew; a build server's is not."""
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not ci
