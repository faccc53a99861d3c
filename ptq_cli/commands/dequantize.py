"""`dequantize` as a command runs it: the source, the job, the float model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import AnyPath
from ptq_cli.commands.estimate import Estimate, estimate_dequantization
from ptq_cli.commands.job import names_a_file
from ptq_cli.errors import InputError
from ptq_cli.formats.common import SCALE_WORDS
from ptq_cli.run.dequantize import FLOATS, Dequantization, planned, run_dequantize
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.companions import companions
from ptq_cli.storage.files import without_constants
from ptq_cli.storage.folder import MAX_SHARD
from ptq_cli.storage.output import Target
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.staging import Staging


@dataclass(frozen=True)
class DequantizeJob:
    """A dequantization that is planned and ready to run."""

    work: Dequantization
    output: Path
    warnings: tuple[str, ...]

    def target(self, options: RunOptions) -> Target:
        """Where the run works, and what makes another the same."""
        source = self.work.source
        job = {
            "command": "dequantize",
            "version": __version__,
            "max_shard_size": options.max_shard or MAX_SHARD,
            "dtype": self.work.dtype,
            "model": source.fingerprint,
            "config": without_constants(source.config),
        }
        keep, beside = [*source.files, source.weights], companions(source, FLOATS)
        return Target(self.output, job, options.force, options.restart, keep, beside.files)

    def estimate(self, options: RunOptions) -> Estimate:
        """What `run` would do. Raises InputError, FileError: what it would refuse to begin with."""
        return estimate_dequantization(self.work, self.target(options), options.resources)

    def run(self, options: RunOptions) -> dict[str, Any]:
        """Do the work, and give the folder its name, unless the same run has. Raises PtqError."""
        target, source = self.target(options), self.work.source
        told: dict[str, Any] = {"output": str(self.output), "quantized_as": source.origin}
        told["warnings"] = list(self.warnings)
        if target.finished():
            return told | {"earlier": True, "seconds": 0.0}
        with Staging(target) as staging:
            return told | {"earlier": False} | run_dequantize(self.work, staging, options)


def prepare_dequantization(
    model: AnyPath, *, dtype: str | None = None, output: AnyPath | None = None
) -> DequantizeJob:
    """Plan a dequantization: every mistake that can be known is found here.

    dtype: "bfloat16", "float16" or "float32"; None: the model's
    """
    if dtype is not None and dtype not in SCALE_WORDS:
        raise InputError(f"unknown dtype {dtype!r}", hint=f"known: {', '.join(SCALE_WORDS)}")
    checkpoint = open_float(Path(model))
    if checkpoint.origin is None and not checkpoint.documents:
        raise InputError(f"{model}: nothing in it is quantized, its weights are float")
    stem = checkpoint.stem
    if checkpoint.path.is_dir():
        stem = checkpoint.path.resolve().name or stem
    target = Path(f"{stem}-float" if output is None else output)
    if names_a_file(target):
        raise InputError(f"-o {target} names a GGUF file", hint="name a folder")
    left = companions(checkpoint, FLOATS).warnings
    work = planned(checkpoint, None if dtype is None else SCALE_WORDS[dtype])
    return DequantizeJob(work, target, (*checkpoint.warnings, *left))
