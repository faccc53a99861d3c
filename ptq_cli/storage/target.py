"""An output before a run begins: what lies there, and whether there is room; nothing is written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli.storage.files import named
from ptq_cli.storage.staging import (
    Staging,
    check_output,
    check_place,
    free_space,
    goes_on,
    is_published,
    kept_out,
    still_needed,
    work_folder,
)


@dataclass(frozen=True)
class Found:
    """What a run would begin with.

    finished: units that an interrupted run left, None where there was no such run
    needed, free: bytes, on the disk of the output
    """

    finished: int | None
    needed: int
    free: int


@dataclass(frozen=True)
class Target:
    """An output, and what makes two runs into it the same (`Staging` says more)."""

    output: Path
    job: Mapping[str, Any]
    force: bool = False
    restart: bool = False
    keep: Sequence[Path] = ()

    def begin(self) -> Staging:
        """Begin to work. Raises InputError, FileError."""
        return Staging(
            self.output, self.job, force=self.force, restart=self.restart, keep=self.keep
        )

    def look(self, staged: int, final: int, scratch: int = 0) -> Found:
        """What a run would find that needs so many bytes (as in `Staging.check_space`).

        Raises:
            InputError, FileError: as `begin` would.
        """
        folder, finished = work_folder(self.output), None
        check_place(self.output)
        interrupted = os.path.lexists(folder)
        if interrupted:
            _check_lock(folder)
            interrupted = not is_published(folder, self.output)
        check_output(self.output, self.force, self.keep)
        work = None
        if interrupted and goes_on(folder, self.job, self.restart):
            finished, work = len(list((folder / "units").glob("*.json"))), folder
        needed = still_needed(work, staged + final, scratch)
        return Found(finished, needed, free_space(self.output.parent))


def _check_lock(folder: Path) -> None:
    with named(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise kept_out(folder) from None
        finally:
            os.close(descriptor)
