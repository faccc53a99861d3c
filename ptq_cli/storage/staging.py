"""The work folder of a run, `<output>.partial/`, and the one rename that ends it.

    job.json          what the run is: command, settings, inputs' fingerprints, version
    units/            finished units (storage/units.py)
    out/              the output, until it is renamed to its place; its weights files are filled
                      while units are worked on (storage/shards.py)
    old/              an older output on its way out, where two names cannot be swapped

Its life: begin (lock the folder, look what lies there, go on or begin anew), put units, publish; or
give up, after whatever error: half-written files go, finished units stay for the same command, and
a folder without any goes too. The system drops the lock with the process. At every instant the
output's path is absent, the old output, or the new one, complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ptq_cli.errors import FileError, InputError, NumericalError
from ptq_cli.storage import files, interruption
from ptq_cli.storage.companions import GGUF_NAME
from ptq_cli.storage.made import JOB, REPORT, files_of, report_beside, said_in_file
from ptq_cli.storage.output import (
    Target,
    check_free,
    check_place,
    finished_units,
    free_space,
    goes_on,
    locked,
    still_needed,
    work_folder,
)
from ptq_cli.storage.tensors import Bytes
from ptq_cli.storage.units import ChangedInput, UnitStore
from ptq_cli.storage.weights import SUFFIX


class Staging:
    """The locked work folder of one target; a context manager, whose end gives up the lock.

    resumed: whether it holds an interrupted run's work

    Raises:
        InputError, FileError: another run works there, other settings, or no place for an output.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.output, self.job = target, target.output, target.job
        self.folder = work_folder(self.output)
        self.store = UnitStore(self.folder / "units")
        self.out, self._aside = self.folder / "out", self.folder / "old"
        with contextlib.ExitStack() as held:
            interruption.work_begins(keeps=True)
            held.callback(interruption.work_ends)
            check_place(self.output)
            held.enter_context(locked(self.folder))
            self._begin()
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.folder.exists():
            self._give_up(error)
        self.close()

    # ---- begin ----

    def _begin(self) -> None:
        """Go on with what lies in the locked folder, or begin anew."""
        fresh = False
        try:
            self._put_back()
            self.target.check_output()
            self.resumed = goes_on(self.folder, self.job, self.target.restart)
            if not self.resumed:
                fresh = True
                self._begin_anew()
            self._tidy()
            with files.named(self.folder):
                self.store.folder.mkdir(exist_ok=True)
        except BaseException:
            if fresh:
                self._drop()
            else:
                with contextlib.suppress(OSError):  # an empty one was made by this run
                    self.folder.rmdir()
            raise

    def _put_back(self) -> None:
        """Give an older output its name again that a killed run had put aside."""
        if os.path.lexists(self._aside) and not os.path.lexists(self.output):
            with files.named(self.output):
                os.rename(self._aside, self.output)

    def _begin_anew(self) -> None:
        with files.named(self.folder):
            entries = list(self.folder.iterdir())
        for entry in entries:
            files.remove(entry)
        files.write_whole(self.folder / "job.json", files.to_json(dict(self.job)))

    def _tidy(self) -> None:
        """Remove what is half written or replaced. Weights files are gone on with, unless they may
        be an older output's (a run was killed while it put it aside) that has other names."""
        if self.out.is_symlink() or not self.out.is_dir():
            files.remove(self.out)
        for path in self.out.glob("*"):
            if path.suffix != SUFFIX or path.is_symlink() or path.stat().st_nlink > 1:
                files.remove(path)
        if os.path.lexists(self.output):
            files.remove(self._aside)
        self.store.drop_partials()

    def check_space(self, staged: int, final: int, scratch: int = 0) -> None:
        """Refuse to begin where the disk cannot hold `staged` bytes of units, `final` bytes of
        output and `scratch` bytes of a stream's files, less what is there already.

        Raises:
            FileError: too little space; finished units are left as they are.
        """
        needed = still_needed(self.folder, staged + final + self.target.beside, scratch)
        check_free(self.output.parent, needed, free_space(self.folder))

    # ---- units ----

    def put(self, unit: str, tensors: Sequence[Bytes], result: Any) -> None:
        """Keep a finished unit that is known by the job alone."""
        self.store.put(unit, {}, tensors, result)

    def finished(self, unit: str) -> bool:
        return self.store.reusable(unit, {})

    # ---- publish ----

    def said(self, report: Any) -> dict[str, Any] | None:
        """What the output says of its run in itself, where it is a file; None: it is a folder.
        report: the document that goes beside it"""
        return said_in_file(self.job, report) if self.target.alone else None

    def publish(self) -> None:
        """Give `out` (a file or a folder) its name, in one step, and remove the work folder. Where
        one file of the folder is the output, its report goes to its place before."""
        made = self.out / GGUF_NAME if self.target.alone else self.out
        if made.is_dir():
            files.write_file(self.out / JOB, files.to_json({**self.job, **files_of(self.out)}))
        files.sync_folder(self.out if self.out.is_dir() else self.folder)
        if os.path.lexists(self.output) and not self.target.force:
            raise self.target.exists_already()
        if self.target.alone:
            report = report_beside(self.output)
            with files.named(report):
                os.replace(self.out / REPORT, report)
        if os.path.lexists(self.output):
            self._exchange(made)
        else:
            with files.named(self.output):
                os.rename(made, self.output)
        try:
            files.sync_folder(self.output.parent)
        finally:
            self._drop()

    def _exchange(self, made: Path) -> None:
        """Take the older output's place: in one step where the file system can do that (NFS and
        most of FUSE cannot); else the older one goes aside first, and comes back after a kill."""
        try:
            files.exchange(made, self.output)
            return
        except FileError as error:
            code = getattr(error.__cause__, "errno", None)
            if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        with files.named(self.output):
            if not made.is_dir():
                os.replace(made, self.output)
                return
            os.rename(self.output, self._aside)
            try:
                os.rename(made, self.output)
            except OSError:
                os.rename(self._aside, self.output)
                raise

    # ---- give up ----

    def _give_up(self, error: BaseException) -> None:
        """After whatever error: half-written files go, finished units stay, and the error says so.
        An older output that is still aside stays there for the next run to put back."""
        with contextlib.suppress(FileError):
            self._tidy()
        with contextlib.suppress(FileError):
            self._put_back()
        count = finished_units(self.folder)
        if count == 0 and not os.path.lexists(self._aside):
            self._drop()
        elif count and not isinstance(error, ChangedInput) and not hasattr(error, "__notes__"):
            error.add_note(_kept(error, count, self.folder))

    def _drop(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Give up the lock; what lies in the work folder stays."""
        self._held.close()


def _kept(error: BaseException, count: int, folder: Path) -> str:
    """What an error leaves, in words. Mistakes in the inputs meet the same command again."""
    mistake = isinstance(error, InputError | NumericalError) and not isinstance(error, FileError)
    units = "1 finished unit is" if count == 1 else f"{count} finished units are"
    next_run = "--restart drops them" if mistake else "the same command goes on from there"
    return f"{units} kept in {folder}, {next_run}"
