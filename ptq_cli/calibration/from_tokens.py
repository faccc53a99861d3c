"""Statistics of what a model sees on tokens, by its own forward.

For `ptq calibrate` and `--parallel-layers` they are those of the float model; else those of the
model as it is rounded (`feedback`): by the turn of a site every layer before it is, and its inputs
are what they will be. With `correct` the float model runs beside it, and the two give
`SiteStatistics.drift` and `heldout_float`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ptq_cli.calibration.source import Source
from ptq_cli.calibration.stream import Stream, threads
from ptq_cli.calibration.streams import Forward, Place, Streams
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.numerics.drift import drift_memory
from ptq_cli.numerics.statistics import statistics_memory
from ptq_cli.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class TokenSource(Source):
    """feedback: layers that are rounded already feed the layers after them; correct: the drift from
    the float model is summed too"""

    forward: Forward
    feedback: bool = False
    correct: bool = False
    in_sequence: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.forward.tokens.name

    @property
    def files(self) -> Sequence[Path]:
        return self.forward.tokens.files

    @property
    def sites(self) -> Mapping[str, SiteInfo]:
        return self.forward.sites

    @property
    def places(self) -> Mapping[str, Place]:
        return self.forward.places

    @property
    def drifts(self) -> bool:
        return self.feedback and self.correct

    @property
    def fingerprint(self) -> str:
        mode = "float" if not self.feedback else "drift" if self.correct else "sequential"
        return f"{self.forward.tokens.fingerprint} {mode}"

    @property
    def scratch(self) -> int:
        """Of each stream: the states between two stages, the residual before the block in hand, and
        the one after it."""
        return (1 + self.drifts) * (self.forward.state_bytes + self.forward.residual_bytes)

    def bytes_read(self, site: str) -> int:
        return 0

    def memory(self, workers: int | None, memory: int | None) -> int:
        return self.forward.memory(workers, memory)

    def load_memory(self, site: str) -> int:
        """Of the sums of the inputs and of the drift; the forward has a budget of its own."""
        info = self.sites[site]
        batch = min(info.n_tokens, max(part.packing.n_tokens for part in self.forward.parts))
        sums = statistics_memory(info.in_features, info.n_tokens, batch)
        return sums + (drift_memory(info.in_features, batch) if self.drifts else 0)

    def streams(
        self,
        work: Path,
        workers: int | None,
        memory: int | None,
        checkpoint: Checkpoint | None = None,
    ) -> Streams:
        """Streams that are about to enter a block.

        work: a folder for scratch files that survives a kill
        workers, memory: batches side by side, and the bytes they may take
        checkpoint: of the model that is rounded, where it is not the float model's
        """
        arch, parts = self.forward.arch, self.forward.parts
        reads = {"rounded": (checkpoint or self.forward.checkpoint).read} if self.feedback else {}
        if self.drifts or not self.feedback:
            reads["float"] = self.forward.checkpoint.read
        n_threads = threads(arch, parts, workers, memory)
        streams = [Stream(name, arch, read, parts, work, n_threads) for name, read in reads.items()]
        return Streams(self.forward, streams)
