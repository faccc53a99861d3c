"""Files: errors that name them, exact reads, durable writes, one atomic rename.

Reads are `pread` of a known length, not memory maps: a file that shrinks while it is read is then
an error and not a signal that ends the process.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import FileError, InputError
from ptq_cli.storage import interruption

MAX_JSON = 10 << 20
FULL = "free some space, or choose another place with -o"
PARTIAL = ".partial"  # ending of what is being written


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a FileError that names `path`."""
    try:
        yield
    except OSError as error:
        raise file_error(path, error) from error


def file_error(path: Path | str, error: OSError) -> FileError:
    """The system's own word on a file, for people."""
    hint = FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return FileError(f"{path}: {error.strerror or error}", hint=hint)


def regular_file(path: Path) -> int:
    """The size of a regular file. Raises FileError, also for folders, pipes and devices."""
    with named(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: not a regular file")
    return status.st_size


def listing(folder: Path) -> list[str]:
    """The names in a folder, sorted. Files are found by exact match in it, never by joining names
    that come from a checkpoint."""
    with named(folder):
        return sorted(os.listdir(folder))


def read_into(path: Path, offset: int, buffer: NDArray[np.uint8]) -> None:
    """Fill `buffer` from the file at `offset`. Raises FileError where the file is too short."""
    with named(path), FileIO(path) as file:
        read_exactly(file, offset, buffer)


def read_exactly(file: FileIO, offset: int, buffer: NDArray[np.uint8]) -> None:
    """Fill `buffer` from an open file at `offset`. Raises FileError where the file is too short."""
    view = buffer.data
    while view:
        with named(file.name):
            n = os.preadv(file.fileno(), [view[: 1 << 30]], offset)
        if n == 0:
            raise FileError(
                f"{file.name}: ends at byte {offset}, {len(view)} bytes too early; it changed"
                " while it was read"
            )
        view, offset = view[n:], offset + n


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """A JSON document of at most `limit` bytes. Raises InputError, duplicate keys included."""
    return parse_json(read_small(path, limit), path)


def read_document(path: Path, limit: int = MAX_JSON) -> Any:
    """A JSON document of a model, with `Infinity` and `NaN`, which Python's json knows and
    transformers before 5 writes into config.json. Raises InputError, duplicate keys included."""
    return parse_json(read_small(path, limit), path, constants=float)


def read_small(path: Path, limit: int = MAX_JSON) -> bytes:
    """The whole of a file that a person could have written. Raises InputError beyond `limit`."""
    size = regular_file(path)
    if size > limit:
        raise InputError(f"{path}: {size} bytes, more than the {limit} allowed")
    with named(path):
        return path.read_bytes()


def parse_json(text: bytes, path: Path | str, constants: Callable[[str], Any] | None = None) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN. Raises InputError naming `path`.

    constants: what `NaN`, `Infinity` and `-Infinity` are read as; None: they are refused
    """
    constants = constants or _no_constants
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=constants
        )
    except RecursionError:
        raise InputError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _no_constants(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def to_json(value: Any) -> str:
    """Sorted, strict, readable JSON with a final newline: the same bytes for the same value."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def like_document(value: Any, source: Any) -> str:
    """A model's document as readable JSON, made from one that was read: its keys in the order they
    stand in, sorted where they were sorted there; `Infinity` and `NaN` as they are."""
    is_sorted = json.dumps(source) == json.dumps(source, sort_keys=True)
    return json.dumps(value, indent=1, sort_keys=is_sorted) + "\n"


def without_constants(value: Any) -> Any:
    """A document with infinities and NaN in words that strict JSON has, transformers 5's:
    `{"__float__": "NaN"}`."""
    if isinstance(value, Mapping):
        return {key: without_constants(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_constants(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": json.dumps(value)}
    return value


def write_file(path: Path, *pieces: bytes | str | memoryview, durable: bool = True) -> None:
    """Write a whole file, and where it is to be durable, wait until it is on the disk."""
    with named(path), open(path, "wb") as file:
        for piece in pieces:
            file.write(piece.encode() if isinstance(piece, str) else piece)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def copy_file(path: Path, other: Path) -> None:
    """Copy a file of whatever size, and wait until it is on the disk."""
    with named(f"{path} → {other}"), open(path, "rb") as file, open(other, "wb") as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        os.fsync(copy.fileno())


def write_whole(path: Path, *pieces: bytes | str | memoryview, durable: bool = True) -> None:
    """Write a file under another name, then rename: the path holds the old bytes or the new."""
    with replacing(path, durable=durable) as partial:
        write_file(partial, *pieces, durable=durable)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to; at the end it is renamed to `path`, or removed after an error."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    interruption.work_begins()
    try:
        yield partial
        with named(path):
            os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        interruption.work_ends()


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    with named(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Give a file that a library wrote the umask's mode and wait until it is on the disk."""
    mask = os.umask(0o077)
    os.umask(mask)
    with named(path):
        os.chmod(path, 0o666 & ~mask)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    with named(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Swap two names of one file system in one step (Linux renameat2, RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, flag = -100, 2
    with named(second):
        code = libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), flag)
        if code != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
