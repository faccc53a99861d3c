"""The work folder of a run, `<output>.partial/`, and the one rename that ends it.

    job.json          what the run is: command, settings, inputs' fingerprints, version
    units/<hash>.bin  the tensors of a finished unit, one after the other
    units/<hash>.json their specs and checksum, and the unit's result; its being there makes the
                      unit finished
    out/              the finished output, until it is renamed to its place

Every file is written under another name, fsynced and renamed. The folder is locked as long as a run
works in it. File names are hashes: a tensor's name never chooses a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.files import (
    exchange,
    named,
    read_json,
    regular_file,
    sync_folder,
    to_json,
    write_whole,
)
from ptq_cli.storage.tensors import Bytes
from ptq_cli.values import TensorSpec

_OWN = ("job.json", "units", "out")


class Staging:
    """The locked work folder of one output.

    output: the path that the run ends at; job: what makes two runs the same
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
        if output.name in ("", ".."):
            raise InputError(f"{output}: not a name for an output", hint="choose another with -o")
        self.folder = output.with_name(output.name + ".partial")
        _check_output(output, force, keep)
        self._lock = self._locked_folder()
        try:
            self.resumed = self._take_over(job, restart)
            self.units.mkdir(exist_ok=True)
            shutil.rmtree(self.out, ignore_errors=True)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def units(self) -> Path:
        return self.folder / "units"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def _locked_folder(self) -> int:
        while True:
            with named(self.folder):
                self.folder.mkdir(exist_ok=True)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                descriptor = os.open(self.folder, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == self.folder.stat().st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(
                    f"{self.folder}: another run is working on this output",
                    hint="wait for it, or choose another output with -o",
                ) from None
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _take_over(self, job: Mapping[str, Any], restart: bool) -> bool:
        """Go on with what an interrupted run left, or begin. True where there was something."""
        path = self.folder / "job.json"
        if path.exists() and not restart:
            earlier = read_json(path)
            if not isinstance(earlier, dict):
                raise InputError(f"{path}: damaged", hint="--restart begins anew")
            differing = sorted(
                key for key in {*earlier, *job} if earlier.get(key) != _plain(job.get(key))
            )
            if differing:
                raise InputError(
                    f"{self.folder}: an interrupted run with other {', '.join(differing)}",
                    hint="--restart drops its work, -o chooses another output",
                )
            return True
        entries = list(self.folder.iterdir())
        for entry in entries:
            if entry.name not in _OWN and not entry.name.startswith(".job.json."):
                raise InputError(
                    f"{entry}: not a run's; {self.folder} is where this run would work",
                    hint="move it away, or choose another output with -o",
                )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_whole(path, to_json(dict(job)))
        return False

    def _path(self, unit: str, suffix: str) -> Path:
        return self.units / (
            hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest() + suffix
        )

    def put(self, unit: str, tensors: Sequence[Bytes], result: Any) -> None:
        """Keep a finished unit: its tensors, and what there is to say about it (JSON)."""
        path = self._path(unit, ".bin")
        partial = path.with_suffix(".tmp")
        digest = hashlib.sha256()
        with named(path):
            with open(partial, "wb") as file:
                for tensor in tensors:
                    file.write(tensor.data.data)
                    digest.update(tensor.data.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        entry = {
            "unit": unit,
            "tensors": [[t.spec.name, t.spec.dtype, list(t.spec.shape)] for t in tensors],
            "result": result,
        }
        digest.update(to_json(entry).encode())
        write_whole(self._path(unit, ".json"), to_json({**entry, "sha256": digest.hexdigest()}))

    def finished(self, unit: str) -> bool:
        """Whether the unit is there, whole: its bytes and its entry match their checksum."""
        if not self._path(unit, ".json").exists():
            return False
        try:
            tensors, digest = self.tensors(unit), hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.data.data)
            entry = dict(self._entry(unit))
            checksum = entry.pop("sha256")
            digest.update(to_json(entry).encode())
            return bool(entry["unit"] == unit and checksum == digest.hexdigest())
        except (InputError, KeyError, TypeError, ValueError):
            return False

    def _entry(self, unit: str) -> Any:
        return read_json(self._path(unit, ".json"))

    def result(self, unit: str) -> Any:
        return self._entry(unit)["result"]

    def tensors(self, unit: str) -> list[Bytes]:
        """The tensors of a finished unit, memory-mapped (nobody else writes in this folder)."""
        path = self._path(unit, ".bin")
        specs = [TensorSpec(n, d, tuple(s)) for n, d, s in self._entry(unit)["tensors"]]
        size = sum(spec.nbytes for spec in specs)
        if regular_file(path) != size:
            raise FileError(f"{path}: not the {size} bytes that were written")
        with named(path):
            data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        tensors, start = [], 0
        for spec in specs:
            tensors.append(Bytes(spec, data[start : start + spec.nbytes]))
            start += spec.nbytes
        return tensors

    def publish(self) -> None:
        """Give `out` (a file or a folder) its name, in one step, and remove the work folder."""
        sync_folder(self.out if self.out.is_dir() else self.folder)
        if self.output.exists():
            if not self.force:
                raise _exists(self.output)
            exchange(self.out, self.output)
        else:
            with named(self.output):
                os.rename(self.out, self.output)
        sync_folder(self.output.parent)
        self.drop()

    def drop(self) -> None:
        """Remove the work folder and give up the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Give up the lock; the work stays for the next run."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _exists(output: Path) -> InputError:
    return InputError(
        f"{output}: exists already", hint="--force replaces it, -o chooses another output"
    )


def _check_output(output: Path, force: bool, keep: Sequence[Path]) -> None:
    """Refuse an output that exists, cannot be written, or holds what is being read."""
    parent = output.parent
    if not parent.is_dir():
        raise FileError(f"{parent}: no such folder", hint="make it first")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{parent}: not writable", hint="choose another place with -o")
    if os.path.lexists(output):
        if output.is_symlink() and not output.exists():
            raise InputError(f"{output}: a link that leads nowhere", hint="remove it first")
        if not force:
            raise _exists(output)
        target = output.resolve()
        for path in (p.resolve() for p in keep):
            if path == target or target in path.parents:
                raise InputError(f"{output}: holds {path}, which is being read")
