"""An output and the run that is to make it: what lies at its place and in its work folder before,
whose lock that folder has, and whether there is room."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.files import file_error, named, read_json
from ptq_cli.storage.made import JOB, damage_of, job_of, report_beside, why_unknown
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.units import differing, plain

STATISTICS = "statistics.safetensors"  # what a run calibrates before its own work
_SLACK = 1 << 20
_SHOWN = 3  # of what differs, in an error
_OWN = ("job.json", "units", "out", "old", "stream", STATISTICS, f"{STATISTICS}.partial")


def work_folder(output: Path) -> Path:
    """Where a run into `output` works. Raises InputError."""
    if output.name in ("", ".."):
        raise InputError(f"{output}: not a name for an output", hint="choose another with -o")
    return output.with_name(output.name + ".partial")


def check_place(output: Path, option: str = "-o") -> None:
    """Refuse an output where nothing can be written. option: that names another place"""
    parent = output.parent
    if not parent.is_dir():
        raise FileError(f"{parent}: no such folder", hint="make it first")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{parent}: not writable", hint=f"choose another place with {option}")


def _other(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How an earlier run was another one, in words; "" where it was not."""
    if earlier.get("command") != now.get("command"):
        return f"by ptq {earlier.get('command')}"
    names = differing(earlier, plain(now))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"with other {', '.join(names[:_SHOWN])}{more}" if names else ""


def goes_on(folder: Path, job: Mapping[str, Any], restart: bool) -> bool:
    """Whether a run would go on with what lies in its work folder.

    Raises:
        InputError: an interrupted run with other settings; files that are no run's.
    """
    path = folder / "job.json"
    if path.exists() and not restart:
        earlier = read_json(path)
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: damaged", hint="--restart begins anew")
        if other := _other(earlier, job):
            raise InputError(
                f"{folder}: an interrupted run {other}",
                hint="--restart drops its work, -o chooses another output",
            )
        return True
    with named(folder):
        entries = [entry.name for entry in folder.iterdir()]
    for name in entries:
        if name not in _OWN and not name.startswith("."):
            raise InputError(
                f"{folder / name}: not a run's; {folder} is where this run would work",
                hint="move it away, or choose another output with -o",
            )
    return False


def finished_units(folder: Path) -> int:
    """How many pieces of finished work lie in a work folder, and in that of its statistics."""
    found = [*folder.glob("units/*.json"), *folder.glob(f"{STATISTICS}.partial/units/*.json")]
    return len(found) + (folder / STATISTICS).exists()


def still_needed(folder: Path | None, output: int, scratch: int) -> int:
    """Bytes that a run in a work folder (None: a new one) writes still, of those of its units and
    output, and of those of a stream's files."""
    if folder is None:
        return output + scratch + _SLACK
    with named(folder):
        there = sum(entry.st_size for entry in _files(folder / "units"))
        there += sum(512 * entry.st_blocks for entry in _files(folder / "out"))  # with holes
        streamed = sum(entry.st_size for entry in _files(folder / "stream"))
    return max(0, output - there) + max(0, scratch - streamed) + _SLACK


def _files(folder: Path) -> list[os.stat_result]:
    """All files under a folder; none where it isn't there."""
    return [path.stat() for path in folder.rglob("*") if path.is_file()]


def free_space(folder: Path) -> int:
    """Bytes free on the disk of a folder."""
    with named(folder):
        status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def check_free(folder: Path, needed: int, free: int) -> None:
    """Raises FileError where less is free than needed."""
    if free < needed:
        raise FileError(
            f"{folder}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB free",
            hint="free some space, or choose another place with -o (scratch files: with TMPDIR)",
        )


@contextlib.contextmanager
def locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of a work folder, which is made where there is none; it is shared by those that
    only look. Raises InputError."""
    while True:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(
                f"{folder}: not a folder; it is where this run would work",
                hint="remove it, or choose another output with -o",
            )
        with named(folder):
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if _lock(folder, descriptor, kind):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(folder: Path, descriptor: int, kind: int) -> bool:
    """Take the lock; False where whoever held it has removed the folder."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == folder.stat().st_ino
    except BlockingIOError:
        raise InputError(
            f"{folder}: another run is working on this output",
            hint="wait for it, or choose another output with -o",
        ) from None
    except FileNotFoundError:
        return False
    except OSError as error:
        raise file_error(folder, error) from error


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
    """An output and the run that is to make it.

    job: what makes two runs the same
    keep: what is read, and may not be replaced
    companions: files that are copied along with the weights, byte for byte, by their names there
    alone: whether the output is the one weights file, with its report beside it
    """

    output: Path
    job: Mapping[str, Any]
    force: bool = False
    restart: bool = False
    keep: Sequence[Path] = ()
    companions: Mapping[str, Path] = field(default_factory=dict)
    alone: bool = False

    def complete(self) -> bool:
        """Whether the same run has made the output already, and it is not to be made anew."""
        return not self.force and not self.difference()

    def difference(self) -> str:
        """How what lies at the output's place is not what this run leaves there; "" where it is."""
        made = job_of(self.output)
        if made is None:
            return f"but {why_unknown(self.output)}"
        earlier = {key: made[key] for key in made if key not in ("files", "sha256")}
        if other := _other(earlier, self.job):
            return f"made {other}"
        damage = damage_of(self.output, made)
        if damage:
            return f"but {damage}"
        for name, path in self.companions.items():
            copy = self.output / name
            if not copy.is_file():
                return f"without {name}"
            with named(path):  # config.json the job knows; the output's may say more
                if name != "config.json" and not filecmp.cmp(path, copy, shallow=False):
                    return f"made with another {name}"
        return ""

    def check_output(self) -> None:
        """Refuse an output that exists, or holds what is being read."""
        output = self.output
        if self.alone:
            self._check_report()
        if not os.path.lexists(output):
            return
        if output.is_symlink() and not output.exists():
            raise InputError(f"{output}: a link that leads nowhere", hint="remove it first")
        if not self.force:
            raise self.exists_already()
        target = output.resolve()
        for path in (p.resolve() for p in self.keep):
            if path == target or target in path.parents:
                raise InputError(f"{output}: holds {path}, which is being read")
        names = set(os.listdir(output)) if output.is_dir() else set()
        if names and not names & {JOB, "quantization.json"}:
            raise InputError(
                f"{output}: a folder that this tool did not write; --force does not replace it",
                hint="remove it yourself, or choose another output with -o",
            )

    def _check_report(self) -> None:
        """Refuse to put a report in the place of another file, but for what a killed run left."""
        report = report_beside(self.output)
        left = (work_folder(self.output) / "job.json").exists()
        if os.path.lexists(report) and not (self.force or left or os.path.lexists(self.output)):
            hint = "--force replaces it, -o chooses another output"
            raise InputError(f"{report}: exists already, the report would go there", hint=hint)
        if report.is_dir():
            raise InputError(f"{report}: a folder, the report would go there")

    def exists_already(self) -> InputError:
        """The error of a run whose output is there; it says what differs."""
        how = ", ".join(filter(None, ("exists already", self.difference())))
        hint = "--force replaces it, -o chooses another output"
        return InputError(f"{self.output}: {how}", hint=hint)

    def finished(self) -> bool:
        """As `complete`; what a killed run left beside the output is removed."""
        if not self.complete():
            return False
        folder = work_folder(self.output)
        if os.path.lexists(folder):
            with contextlib.suppress(InputError), locked(folder):  # another run's work stays
                goes_on(folder, self.job, restart=False)
                shutil.rmtree(folder, ignore_errors=True)
        return True

    def look(self, staged: int, final: int, scratch: int = 0) -> Found:
        """What a run would find that needs so many bytes (as in `Staging.check_space`).

        Raises:
            InputError, FileError: as the run would.
        """
        folder, finished, work = work_folder(self.output), None, None
        check_place(self.output)
        free = free_space(self.output.parent)
        if self.complete():
            return Found(self.output, None, 0, free, final, scratch, complete=True)
        self.check_output()
        if os.path.lexists(folder):
            with locked(folder, fcntl.LOCK_SH):
                if goes_on(folder, self.job, self.restart):
                    finished, work = len(list(folder.glob("units/*.json"))), folder
        needed = still_needed(work, staged + final + self.beside, scratch)
        return Found(self.output, finished, needed, free, final, scratch)

    @property
    def beside(self) -> int:
        """Bytes of the files that are copied along."""
        with named(self.output):
            return sum(path.stat().st_size for path in self.companions.values())
