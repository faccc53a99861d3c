"""What lies at an output's place and in its work folder before a run; nothing is written here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_cli.errors import FileError, InputError, PtqError
from ptq_cli.storage.checkpoint import read_header
from ptq_cli.storage.files import named, read_json
from ptq_cli.storage.units import differing, plain

JOB = "ptq_job.json"  # in an output folder: the run that made it
STATISTICS = "statistics.safetensors"  # what a run calibrates before its own work
_SLACK = 1 << 20
_OWN = (
    *("job.json", "units", "weights", "out", "old", "stream", "published.json"),
    *(STATISTICS, f"{STATISTICS}.partial"),
)


def work_folder(output: Path) -> Path:
    """Where a run into `output` works. Raises InputError."""
    if output.name in ("", ".."):
        raise InputError(f"{output}: not a name for an output", hint="choose another with -o")
    return output.with_name(output.name + ".partial")


def job_of(output: Path) -> Mapping[str, Any] | None:
    """The run that made a finished output, as it says itself: JOB in a folder, `job` in the
    metadata of a statistics file. None where it says nothing."""
    try:
        if output.is_dir():
            job = read_json(output / JOB)
        else:
            job = json.loads(read_header(output).metadata["ptq"])["job"]
    except (PtqError, LookupError, TypeError, ValueError, RecursionError):
        return None
    return job if isinstance(job, dict) else None


def check_place(output: Path) -> None:
    """Refuse an output where nothing can be written."""
    parent = output.parent
    if not parent.is_dir():
        raise FileError(f"{parent}: no such folder", hint="make it first")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{parent}: not writable", hint="choose another place with -o")


def check_output(output: Path, job: Mapping[str, Any], force: bool, keep: Sequence[Path]) -> None:
    """Refuse an output that exists, or holds what is being read."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() and not output.exists():
        raise InputError(f"{output}: a link that leads nowhere", hint="remove it first")
    if not force:
        raise exists_already(output, job)
    target = output.resolve()
    for path in (p.resolve() for p in keep):
        if path == target or target in path.parents:
            raise InputError(f"{output}: holds {path}, which is being read")
    if output.is_dir() and not _is_own(output):
        raise InputError(
            f"{output}: a folder that this tool did not write; --force does not replace it",
            hint="remove it yourself, or choose another output with -o",
        )


def exists_already(output: Path, job: Mapping[str, Any]) -> InputError:
    """The error of a run whose output is there; it names what differs where that is known."""
    earlier = job_of(output)
    names = [] if earlier is None else differing(earlier, plain(dict(job)))
    how = f", made with other {', '.join(names)}" if names else ""
    return InputError(
        f"{output}: exists already{how}", hint="--force replaces it, -o chooses another output"
    )


def _is_own(folder: Path) -> bool:
    """An empty folder, or an output of this tool."""
    names = os.listdir(folder)
    return not names or "quantization.json" in names


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
        if names := differing(earlier, plain(dict(job))):
            raise InputError(
                f"{folder}: an interrupted run with other {', '.join(names)}",
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


def kept_out(folder: Path) -> InputError:
    """The error of a run that finds another's lock."""
    return InputError(
        f"{folder}: another run is working on this output",
        hint="wait for it, or choose another output with -o",
    )


def identity(path: Path) -> list[int]:
    """What tells a file or folder from all others, whatever its name."""
    with named(path):
        status = path.stat()
    return [status.st_dev, status.st_ino]


def is_published(folder: Path, output: Path) -> bool:
    """Whether the work folder is what a run left that was killed after its output had its name."""
    try:
        recorded = read_json(folder / "published.json")
    except PtqError:
        return False
    return output.exists() and recorded == identity(output)


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
        there += sum(512 * entry.st_blocks for entry in _files(folder / "weights"))  # with holes
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
