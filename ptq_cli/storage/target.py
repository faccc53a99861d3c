"""An output and the run that is to make it: what lies there already, and whether there is room."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.storage.files import named
from ptq_cli.storage.output import (
    check_free,
    check_output,
    check_place,
    free_space,
    goes_on,
    is_published,
    job_of,
    still_needed,
    work_folder,
)
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.staging import Staging, clear, locked
from ptq_cli.storage.units import differing, plain


@dataclass(frozen=True)
class Found:
    """What a run would begin with.

    output: None where there is none, but scratch files in the temporary folder
    finished: units that an interrupted run left, None where there was no such run
    needed, free: bytes, on the disk of the output
    final: bytes of the output; scratch: of files that are gone when it has its name
    complete: the same run has made the output already
    """

    output: Path | None
    finished: int | None
    needed: int
    free: int
    final: int
    scratch: int
    complete: bool = False

    def check_space(self) -> None:
        """Raises FileError: less space on the disk than the run needs."""
        place = temporary_place() if self.output is None else self.output.parent
        check_free(place, self.needed, self.free)


@dataclass(frozen=True)
class Target:
    """An output, and what makes two runs into it the same (`Staging` says more).

    companions: files that are copied along with the weights, byte for byte
    """

    output: Path
    job: Mapping[str, Any]
    force: bool = False
    restart: bool = False
    keep: Sequence[Path] = ()
    companions: Sequence[Path] = ()

    def complete(self) -> bool:
        """Whether the same run has made the output already, and it is not to be made anew."""
        job = None if self.force else job_of(self.output)
        return (
            job is not None
            and not differing(job, plain(dict(self.job)))
            and all(_same(path, self.output / path.name) for path in self.companions)
        )

    def finished(self) -> bool:
        """As `complete`; what a killed run left beside the output is removed."""
        if not self.complete():
            return False
        with contextlib.suppress(InputError):  # another run's work stays
            clear(self.output, self.job)
        return True

    def begin(self) -> Staging:
        """Begin to work. Raises InputError, FileError."""
        return Staging(
            self.output,
            self.job,
            force=self.force,
            restart=self.restart,
            keep=self.keep,
            beside=self._beside(),
        )

    def look(self, staged: int, final: int, scratch: int = 0) -> Found:
        """What a run would find that needs so many bytes (as in `Staging.check_space`).

        Raises:
            InputError, FileError: as `begin` would.
        """
        folder, finished = work_folder(self.output), None
        check_place(self.output)
        free = free_space(self.output.parent)
        if self.complete():
            return Found(self.output, None, 0, free, final, scratch, complete=True)
        interrupted = os.path.lexists(folder)
        if interrupted:
            with locked(folder, fcntl.LOCK_SH):
                interrupted = not is_published(folder, self.output)
        check_output(self.output, self.job, self.force, self.keep)
        work = None
        if interrupted and goes_on(folder, self.job, self.restart):
            finished, work = len(list((folder / "units").glob("*.json"))), folder
        needed = still_needed(work, staged + final + self._beside(), scratch)
        return Found(self.output, finished, needed, free, final, scratch)

    def _beside(self) -> int:
        with named(self.output):
            return sum(path.stat().st_size for path in self.companions)


def _same(path: Path, copy: Path) -> bool:
    if path.name == "config.json":  # the job knows it; the output's may say more
        return True
    with named(path):
        return copy.is_file() and filecmp.cmp(path, copy, shallow=False)
