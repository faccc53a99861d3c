"""Run a command again and again, each time with one state-changing call that kills or fails.

    python -m tests.attacks.faults kill|ENOSPC|EIO|EACCES STEP FOLDER OLD COMMAND…

Every call of the process that changes the file system is counted: mkdir, open for writing, write,
pwrite, truncate, fsync, rename, replace, link, exchange, unlink, rmdir, chmod, and safetensors' own
writing (at its beginning and half way). At the N-th the process dies by SIGKILL, or the call fails;
N goes through 1, 1 + STEP … until the command ends before it gets there. Then the command runs once
more, undisturbed. One line of JSON a case: what was hit, the exit codes, the state of `FOLDER/out`
after each, what else lies there, how many finished units, and whether there was a traceback.

Forks, so that the imports are paid for once. OLD: there is an output already, and --force. A first
word `parts=N` of COMMAND cuts a site's tokens into parts of N, `place=out.gguf` names another
output than `out`, with its report beside it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

COUNTED = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "chmod", "link", "pwrite")


class Fault:
    """Counts calls; the chosen one dies or fails."""

    def __init__(self, kind: str, target: int, log: int) -> None:
        self.kind, self.target, self.log, self.count = kind, target, log, 0

    def hit(self, name: str) -> None:
        self.count += 1
        if self.count != self.target:
            return
        os.write(self.log, name.encode())
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.kind)
        raise OSError(code, os.strerror(code), name)

    def wrap(self, name, function):
        def wrapped(*arguments, **options):
            self.hit(name)
            return function(*arguments, **options)

        return wrapped

    def install(self) -> None:
        from ptq_cli.storage import files, tensors

        for name in COUNTED:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        os.remove = os.unlink
        files.exchange = self.wrap("exchange", files.exchange)
        tensors.serialize_file = self.halfway(tensors.serialize_file)
        plain = builtins.open

        def opened(path, mode="r", *rest, **options):
            if not set(mode) & set("wax+"):
                return plain(path, mode, *rest, **options)
            self.hit("open")
            return Written(plain(path, mode, *rest, **options), self)

        builtins.open = io.open = opened

    def halfway(self, serialize):
        from safetensors import SafetensorError

        def wrapped(tensors, path, metadata):
            try:
                self.hit("serialize")
                serialize(tensors, path, metadata=metadata)
                size = os.path.getsize(path)
                whole = Path(path).read_bytes()
                os.truncate(path, size // 2)
                self.hit("serialize, half way")
            except OSError as error:
                raise SafetensorError(f"I/O error: {error}") from None
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, whole)
            os.close(descriptor)

        return wrapped


class Written:
    """A file open for writing, whose writes are counted."""

    def __init__(self, file, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data):
        self._fault.hit("write")
        return self._file.write(data)

    def truncate(self, size):
        self._fault.hit("truncate")
        return self._file.truncate(size)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *details):
        return self._file.__exit__(*details)

    def __getattr__(self, name):
        return getattr(self._file, name)


def run_once(arguments: list[str], kind: str | None, target: int) -> tuple[int, str, str]:
    """Exit code (negative: the signal), what was hit (undisturbed: what was imported), stderr."""
    read_log, write_log = os.pipe()
    read_err, write_err = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(write_err, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            from ptq_cli.cli.main import run

            if kind is not None:
                Fault(kind, target, write_log).install()
            code = run(arguments)
            if kind is None:
                os.write(write_log, " ".join(sys.modules).encode())
        finally:
            os._exit(code)
    for descriptor in (write_log, write_err):
        os.close(descriptor)
    with os.fdopen(read_err, "rb") as err, os.fdopen(read_log, "rb") as log:
        words, what = err.read().decode(errors="replace"), log.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), what, words


def state(path: Path) -> str:
    """A digest of all that is there."""
    if not path.exists():
        return "absent"
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


def fresh(output: Path, old: bool, as_file: bool) -> None:
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    if old and as_file:
        output.write_text("old")
    elif old:
        output.mkdir()
        (output / "quantization.json").write_text("old")


def beside(output: Path) -> list[str]:
    """What lies beside an output and its report."""
    return sorted(set(os.listdir(output.parent)) - {output.name, f"{output.stem}.report.json"})


def main(kind: str, step: int, folder: Path, old: bool, command: list[str]) -> None:
    from ptq_cli.calibration import from_activations

    os.fsync = os.fstat  # nobody cuts the power

    if command[0].startswith("parts="):
        from_activations.PART_TOKENS = int(command.pop(0).removeprefix("parts="))
    place = "out"
    if command[0].startswith("place="):
        place = command.pop(0).removeprefix("place=")
    output, as_file = folder / place, command[0] == "calibrate" or place != "out"
    arguments = [*command, "-o", str(output)]
    alone = command[0] in ("pack", "dequantize")  # which have no workers
    arguments += [] if alone else ["--workers", "1"]
    arguments += ["--force"] if old else []
    fresh(output, old, as_file)
    before = state(output)
    code, modules, _ = run_once(arguments, None, 0)
    assert code == 0
    for name in {*modules.split()} - {*sys.modules}:
        with contextlib.suppress(ImportError):
            import_module(name)
    whole = state(output)
    target = 1
    while True:
        fresh(output, old, as_file)
        code, what, words = run_once(arguments, kind, target)
        if not what:
            break
        named = {before: "before", whole: "whole"}
        after, left = state(output), beside(output)
        units = len(list(folder.glob(f"{place}.partial/units/*.json")))
        second = run_once(arguments, None, 0)
        case = {
            "call": f"{target} {what}",
            "code": code,
            "state": named.get(after, "other"),
            "left": left,
            "units": units,
            "traceback": "Traceback" in words or "internal error" in words,
            "words": words[-300:],
            "again": second[0],
            "again_words": second[2][-300:],
            "again_state": named.get(state(output), "other"),
            "again_left": beside(output),
        }
        print(json.dumps(case), flush=True)
        target += step


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1", sys.argv[5:])
