"""The work folder of a run, `<output>.partial/`, and the one rename that ends it.

    job.json          what the run is: command, settings, inputs' fingerprints, version
    units/            finished units (storage/units.py)
    weights/          the weights files of the output while they are filled (storage/shards.py)
    out/              the finished output, until it is renamed to its place
    old/              an older output on its way out, where two names cannot be swapped
    published.json    which `out` was given its name: what is left after that is rubbish

The folder is locked as long as a run works in it; the system drops the lock with the process. At
every instant the output's path is absent, the old output, or the new one, complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_cli.errors import FileError, InputError, PtqError
from ptq_cli.storage import interruption
from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.files import (
    exchange,
    named,
    read_json,
    sync_folder,
    to_json,
    write_whole,
)
from ptq_cli.storage.tensors import Bytes
from ptq_cli.storage.units import ChangedInput, UnitStore, plain

_SLACK = 1 << 20
STATISTICS = "statistics.safetensors"  # what a run calibrates before its own work
_OWN = (
    *("job.json", "units", "weights", "out", "old", "stream", "published.json"),
    *(STATISTICS, f"{STATISTICS}.partial"),
)


class Staging:
    """The locked work folder of one output.

    output: the path that the run ends at; job: what makes two runs the same
    resumed: whether it holds an interrupted run's work
    """

    def __init__(
        self,
        output: Path,
        job: Mapping[str, Any],
        *,
        force: bool = False,
        restart: bool = False,
        keep: Sequence[Path] = (),
    ) -> None:
        self.output, self.force = output, force
        self.folder = work_folder(output)
        self.store = UnitStore(self.folder / "units")
        self._lock, self._fresh, self._kept_out = -1, False, False
        interruption.work_begins()
        self._open = True
        try:
            check_place(output)
            if os.path.lexists(self.folder):
                self._sweep()
                self._put_back()
            check_output(output, force, keep)
            if self._lock < 0:
                self._lock = self._locked_folder()
            self.resumed = self._take_over(job, restart)
            with named(self.folder):
                self.store.folder.mkdir(exist_ok=True)
            self.store.drop_partials()
            _remove(self.out)
            self._drop_shared()
        except BaseException:
            if self._fresh:
                self.drop()
            elif not self._kept_out:  # an empty folder is ours, unless its lock is another's
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            self.close()
            raise

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    def _locked_folder(self) -> int:
        while True:
            with named(self.folder):
                self.folder.mkdir(exist_ok=True)
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == self.folder.stat().st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                self._kept_out = True
                raise kept_out(self.folder) from None
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(descriptor)
                raise FileError(f"{self.folder}: {error.strerror}") from error
            os.close(descriptor)

    def _drop_shared(self) -> None:
        """Let go of weights files that have another name: a run that was killed after its output
        had got its name left them, and the output has been moved since. It is not ours to fill."""
        if self.weights.is_dir():
            with named(self.weights):
                for entry in os.scandir(self.weights):
                    if entry.stat().st_nlink > 1:
                        os.unlink(entry.path)

    def _sweep(self) -> None:
        """Remove what a run left that was killed after its output had got its name."""
        self._lock = self._locked_folder()
        marker = self.folder / "published.json"
        if not marker.exists():
            return
        if is_published(self.folder, self.output):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        else:
            with named(marker):
                marker.unlink()

    def _take_over(self, job: Mapping[str, Any], restart: bool) -> bool:
        """Go on with what an interrupted run left, or begin. True where there was something."""
        if goes_on(self.folder, job, restart):
            return True
        with named(self.folder):
            entries = list(self.folder.iterdir())
        self._fresh = True
        for entry in entries:
            _remove(entry)
        write_whole(self.folder / "job.json", to_json(dict(job)))
        return False

    def _path(self, unit: str, suffix: str) -> Path:
        return self.store.path(unit, suffix)

    def put(self, unit: str, tensors: Sequence[Bytes], result: Any) -> None:
        """Keep a finished unit that is known by the job alone."""
        self.store.put(unit, {}, tensors, result)

    def finished(self, unit: str) -> bool:
        return self.store.exists(unit) and self.store.reusable(unit, {})

    def result(self, unit: str) -> Any:
        return self.store.result(unit)

    def tensors(self, unit: str) -> list[Bytes]:
        return self.store.tensors(unit)

    def check_space(self, staged: int, final: int, scratch: int = 0) -> None:
        """Refuse to begin where the disk cannot hold `staged` bytes of units, `final` bytes of
        output and `scratch` bytes of a stream's files, less what is there already.

        Raises:
            FileError: too little space; what was there is left as it is.
        """
        needed = still_needed(self.folder, staged + final, scratch)
        check_free(self.output.parent, needed, free_space(self.folder))

    def stored(self, unit: str) -> list[StoredTensor]:
        """The same tensors, each as a place in a file."""
        path, start, places = self._path(unit, ".bin"), 0, []
        for tensor in self.tensors(unit):
            places.append(StoredTensor(tensor.spec, path, start))
            start += tensor.spec.nbytes
        return places

    def publish(self) -> None:
        """Give `out` (a file or a folder) its name, in one step, and remove the work folder."""
        sync_folder(self.out if self.out.is_dir() else self.folder)
        write_whole(self.folder / "published.json", to_json(_identity(self.out)))
        if os.path.lexists(self.output):
            if not self.force:
                raise _exists(self.output)
            self._exchange()
        else:
            with named(self.output):
                os.rename(self.out, self.output)
        sync_folder(self.output.parent)
        self.drop()

    def _exchange(self) -> None:
        """Take the older output's place: in one step where the file system can do that (NFS and
        most of FUSE cannot); else the older one goes aside first, and comes back after a kill."""
        try:
            exchange(self.out, self.output)
            return
        except FileError as error:
            code = getattr(error.__cause__, "errno", None)
            if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        with named(self.output):
            if not self.out.is_dir():
                os.replace(self.out, self.output)
                return
            os.rename(self.output, self._aside)
            try:
                os.rename(self.out, self.output)
            except OSError:
                os.rename(self._aside, self.output)
                raise

    @property
    def _aside(self) -> Path:
        return self.folder / "old"

    def _put_back(self) -> None:
        """Give an older output its name again that a killed run had put aside."""
        if os.path.lexists(self._aside) and not os.path.lexists(self.output):
            with named(self.output):
                os.rename(self._aside, self.output)

    def give_up(self, error: Exception) -> None:
        """After an error nothing is left, unless that would throw away an earlier run's work."""
        if not isinstance(error, ChangedInput):
            self.drop()

    def drop(self) -> None:
        """Remove the work folder and give up the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Give up the lock; finished units stay for the next run, half a file does not."""
        if self._lock >= 0:
            if self.folder.is_dir():
                shutil.rmtree(self.out, ignore_errors=True)
                self.store.drop_partials()
            os.close(self._lock)
            self._lock = -1
        if self._open:
            self._open = False
            interruption.work_ends()


def _identity(path: Path) -> list[int]:
    with named(path):
        status = path.stat()
    return [status.st_dev, status.st_ino]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with named(path):
            shutil.rmtree(path)
    else:
        with named(path):
            path.unlink(missing_ok=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _exists(output: Path) -> InputError:
    return InputError(
        f"{output}: exists already", hint="--force replaces it, -o chooses another output"
    )


def work_folder(output: Path) -> Path:
    """Where a run into `output` works. Raises InputError."""
    if output.name in ("", ".."):
        raise InputError(f"{output}: not a name for an output", hint="choose another with -o")
    return output.with_name(output.name + ".partial")


def kept_out(folder: Path) -> InputError:
    """The error of a run that finds another's lock."""
    return InputError(
        f"{folder}: another run is working on this output",
        hint="wait for it, or choose another output with -o",
    )


def is_published(folder: Path, output: Path) -> bool:
    """Whether the work folder is what a run left that was killed after its output had its name."""
    try:
        identity = read_json(folder / "published.json")
    except PtqError:
        return False
    return output.exists() and identity == _identity(output)


def goes_on(folder: Path, job: Mapping[str, Any], restart: bool) -> bool:
    """Whether a run would go on with what lies in its work folder.

    Raises:
        InputError: an interrupted run with other settings; files that are no run's.
    """
    path = folder / "job.json"
    if path.exists() and not restart:
        earlier, now = read_json(path), plain(dict(job))
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: damaged", hint="--restart begins anew")
        keys = sorted({*earlier, *now})
        differing = [key for key in keys if earlier.get(key) != now.get(key)]
        if differing:
            raise InputError(
                f"{folder}: an interrupted run with other {', '.join(differing)}",
                hint="--restart drops its work, -o chooses another output",
            )
        return True
    with named(folder):
        names = [entry.name for entry in folder.iterdir()]
    for name in names:
        if name not in _OWN and not name.startswith("."):
            raise InputError(
                f"{folder / name}: not a run's; {folder} is where this run would work",
                hint="move it away, or choose another output with -o",
            )
    return False


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
            f"{folder}: {_megabytes(needed)} are needed, {_megabytes(free)} free",
            hint="free some space, or choose another place with -o (scratch files: with TMPDIR)",
        )


def check_place(output: Path) -> None:
    """Refuse an output where nothing can be written."""
    parent = output.parent
    if not parent.is_dir():
        raise FileError(f"{parent}: no such folder", hint="make it first")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{parent}: not writable", hint="choose another place with -o")


def check_output(output: Path, force: bool, keep: Sequence[Path]) -> None:
    """Refuse an output that exists, or holds what is being read."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() and not output.exists():
        raise InputError(f"{output}: a link that leads nowhere", hint="remove it first")
    if not force:
        raise _exists(output)
    target = output.resolve()
    for path in (p.resolve() for p in keep):
        if path == target or target in path.parents:
            raise InputError(f"{output}: holds {path}, which is being read")
    if output.is_dir() and not _is_own(output):
        raise InputError(
            f"{output}: a folder that this tool did not write; --force does not replace it",
            hint="remove it yourself, or choose another output with -o",
        )


def _is_own(folder: Path) -> bool:
    """An empty folder, or an output of this tool."""
    names = os.listdir(folder)
    return not names or "quantization.json" in names
