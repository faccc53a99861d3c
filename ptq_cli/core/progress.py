"""What a run tells of itself while it works: one value for each finished piece, to whoever
listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptq_cli.core.report import LayerReport


@dataclass(frozen=True)
class Progress:
    """A finished piece of a phase, or with `done` 0 the phase's beginning.

    phase: "calibrate", "smooth", "quantize", "repack", "write", "measure", "run" (a model over its
        blocks), "predict"
    done, total: pieces; name: of this one
    work, all_work: how much of the phase's work is done, of how much, where pieces differ in size:
        weights for layers, bytes for files, any measure for others
    row: of a layer; kept: it was taken over from an interrupted run
    """

    phase: str
    done: int
    total: int
    name: str = ""
    work: float = 0
    all_work: float = 0
    row: LayerReport | None = None
    kept: bool = False


Listener = Callable[[Progress], None]


def nobody(_: Progress) -> None:
    """Does not listen."""
