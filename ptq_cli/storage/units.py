"""Finished units in the work folder: files found by hash, believed by key and checksum.

    <hash>.bin   the tensors of a unit, one after the other, unless they lie in their places in the
                 weights files of the output already
    <hash>.json  `sha256`, a digest of the rest: `unit`, `key` (digests of every input tensor, of
                 the statistics and of the settings), `data` (digest of the tensors), `tensors`,
                 `result`; its being there makes the unit finished

Every file is written under another name and renamed. A tensor's name never chooses a path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.digest import Digest, digest_words
from ptq_cli.storage.files import PARTIAL, named, read_json, regular_file, to_json, write_whole
from ptq_cli.storage.shards import mapped, put_tensor
from ptq_cli.storage.tensors import Bytes

Key = Mapping[str, Any]

# A unit that took less than this is not waited for on the disk: it survives a kill all the same,
# and a power failure that tears it shows in its checksum and costs less than the waiting.
WORTH_SYNCING = 1.0


class ChangedInput(InputError):
    """An input is not the one that the interrupted run saw. The finished work stays."""


@dataclass(frozen=True)
class UnitStore:
    """The finished units in a folder. It is but paths, so any process can have one.

    places: where tensors belong in files that are there; placing: new ones are written there
    """

    folder: Path
    places: Mapping[str, StoredTensor] = field(default_factory=dict)
    placing: bool = False

    def path(self, unit: str, suffix: str) -> Path:
        name = hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / (name + suffix)

    def put(
        self, unit: str, key: Key, tensors: Sequence[Bytes], result: Any, seconds: float = 60.0
    ) -> None:
        """Keep a finished unit: its tensors, and what there is to say about it (JSON)."""
        digest = Digest()
        for tensor in tensors:
            digest.update(tensor.data)
        entry = {
            "unit": unit,
            "key": dict(key),
            "data": digest.hexdigest(),
            "tensors": [[t.spec.name, t.spec.dtype, list(t.spec.shape)] for t in tensors],
            "placed": self.placing,
            "result": result,
        }
        durable = seconds >= WORTH_SYNCING
        if self.placing:
            for tensor in tensors:
                put_tensor(tensor, self.places[tensor.spec.name], durable=durable)
        else:
            pieces = [tensor.data.data for tensor in tensors]
            write_whole(self.path(unit, ".bin"), *pieces, durable=durable)
        text = to_json(entry | {"sha256": _check(entry)}).encode()
        write_whole(self.path(unit, ".json"), text, durable=durable)

    def exists(self, unit: str) -> bool:
        """Whether there is something to look at."""
        return self.path(unit, ".json").exists()

    def drop_partials(self) -> None:
        """Remove what killed processes left half written."""
        for path in self.folder.glob(f".*{PARTIAL}"):
            with named(path):
                path.unlink(missing_ok=True)

    def reusable(self, unit: str, key: Key) -> bool:
        """Whether the unit is there, whole, and made from the same inputs and settings.

        Raises:
            ChangedInput: it was made from others; the message names them.
        """
        try:
            entry = self.entry(unit)
            names = differing(entry["key"], plain(key))
        except (InputError, KeyError, TypeError, ValueError):
            return False
        if names:
            raise ChangedInput(
                f"{self.folder.parent}: unit {unit!r} was finished by an interrupted run with"
                f" another {', '.join(names)}",
                hint="--restart drops its work, -o chooses another output",
            )
        return self.whole(unit)

    def whole(self, unit: str) -> bool:
        """Whether the unit is there, and its tensors are those that were kept."""
        try:
            digest = Digest()
            for tensor in self.tensors(unit):
                digest.update(np.asarray(tensor.data))
            return bool(self.entry(unit)["data"] == digest.hexdigest())
        except (InputError, KeyError, TypeError, ValueError):
            return False

    def drop(self, unit: str) -> None:
        """Remove what is there of a unit."""
        for suffix in (".json", ".bin"):
            with named(self.path(unit, suffix)):
                self.path(unit, suffix).unlink(missing_ok=True)

    def entry(self, unit: str) -> Any:
        """What is kept of a finished unit beside its tensors: the module's docstring has the names,
        and `placed` says whether its tensors are in their places. Raises InputError."""
        path = self.path(unit, ".json")
        entry = read_json(path, limit=1 << 30)
        whole = isinstance(entry, dict) and entry.pop("sha256", None) == _check(entry)
        if not whole or entry["unit"] != unit:
            raise InputError(f"{path}: damaged")
        return entry

    def result(self, unit: str) -> Any:
        return self.entry(unit)["result"]

    def stored(self, unit: str) -> list[StoredTensor]:
        """The tensors of a finished unit, each as a place in a file."""
        path, entry = self.path(unit, ".bin"), self.entry(unit)
        specs = [TensorSpec(n, d, tuple(s)) for n, d, s in entry["tensors"]]
        if entry["placed"]:
            return [self.places[spec.name] for spec in specs]
        *offsets, size = accumulate((spec.nbytes for spec in specs), initial=0)
        if regular_file(path) != size:
            raise FileError(f"{path}: not the {size} bytes that were written")
        return list(map(StoredTensor, specs, repeat(path), offsets))

    def tensors(self, unit: str) -> list[Bytes]:
        """The same, memory-mapped (nobody else writes in this folder)."""
        return [mapped(tensor) for tensor in self.stored(unit)]


def _check(entry: Mapping[str, Any]) -> str:
    return digest_words(json.dumps(entry, sort_keys=True, allow_nan=False))


def plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(value))


def differing(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The entries, nested ones too, that are not the same, named for people as options are."""
    names = []
    for key in sorted({*earlier, *now}):
        old, new = earlier.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += differing(old, new, f"{key} ")
        elif old != new:
            names.append(prefix + (repr(key) if prefix else key.replace("_", "-")))
    return names
