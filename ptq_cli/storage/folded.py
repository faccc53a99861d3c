"""A checkpoint and its statistics after smoothing: nothing is rewritten, tensors and statistics are
folded when they are read."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.models.folding import as_stored, fold_tensor, row_divisor
from ptq_cli.models.sites import Norm, Preceding, Rows, Site, SiteLinear
from ptq_cli.numerics.smoothquant import check_factors
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from ptq_cli.storage.files import listing, named, regular_file
from ptq_cli.storage.gguf_view import GgufView
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes, as_bytes, own_metadata, serialize

FOLDS_FILE = "smooth_scales.st"

Folds = Sequence[tuple[Site, NDArray[np.float32]]]
FoldsByTensor = dict[str, list[tuple[Site, NDArray[np.float32]]]]


@dataclass(frozen=True)
class FoldedCheckpoint(Checkpoint):
    """A checkpoint whose sites are folded. `read` rounds to the stored dtype, `matrix` does not.

    base: the checkpoint as it lies on the disk; folds: of each changed tensor, in order (a
        sequential run adds to them as it goes: `add_folds`)
    """

    base: Checkpoint = field(kw_only=True)
    folds: Mapping[str, Folds] = field(kw_only=True)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def origin(self) -> str | None:
        return self.base.origin

    @property
    def gguf(self) -> GgufView | None:
        return self.base.gguf

    @property
    def documents(self) -> Mapping[str, Any]:
        return self.base.documents

    def extent(self, name: str) -> int:
        return self.base.extent(name)

    def copyable(self, name: str) -> StoredTensor | Bytes:
        return self.base.copyable(name)

    def streams(self, layer: Layer) -> bool:
        return layer.tensor not in self.folds and self.base.streams(layer)

    def read(self, name: str) -> Array:
        values = self.base.read(name)
        if name not in self.folds:
            return values
        return as_stored(name, fold_tensor(name, values, self.folds[name]), values.dtype)

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        if name not in self.folds:
            return self.base.read_bytes(name)
        return as_bytes(name, self.read(name)).data

    def matrix(self, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        values = self.base.matrix(name, shape)
        if name not in self.folds:
            return values
        return fold_tensor(name, values, self.folds[name]).astype(np.float32, copy=False)

    def part(self, names: Iterable[str]) -> FoldedCheckpoint:
        own = list(names)
        tensors = {name: self.tensors[name] for name in own}
        return replace(self, tensors=tensors, base=self.base.part(own))

    def holding(self, tensors: Mapping[str, StoredTensor]) -> FoldedCheckpoint:
        return replace(self, tensors=tensors, base=self.base.holding(tensors))

    def output_scale(self, layer: Layer) -> NDArray[np.float32] | None:
        scale = np.ones(layer.shape[0], np.float32)
        feeds = False
        for site, factors in self.folds.get(layer.tensor, ()):
            feeder = site.feeder
            if isinstance(feeder, Preceding) and feeder.weight == layer.tensor:
                scale *= row_divisor(len(scale), factors, feeder.rows)
                feeds = True
        return scale if feeds else None


def folded_checkpoint(base: Checkpoint, folds: Folds) -> FoldedCheckpoint:
    """`base` with these sites folded, one after the other.

    folds: sites with their settled factors
    """
    by_tensor: FoldsByTensor = {}
    add_folds(by_tensor, folds)
    own = {f.name: getattr(base, f.name) for f in fields(Checkpoint)}
    return FoldedCheckpoint(**own, base=base, folds=by_tensor)


def add_folds(by_tensor: FoldsByTensor, folds: Folds) -> None:
    """Put further folds behind those of each tensor."""
    for site, factors in folds:
        for name in site.tensors:
            by_tensor.setdefault(name, []).append((site, factors))


def stage_folded(
    checkpoint: FoldedCheckpoint, names: Sequence[str], staging: Staging
) -> Checkpoint:
    """The checkpoint with these tensors folded, rounded to their dtype and laid into the work
    folder, so that they can be copied like any other."""
    places = {}
    for name in names:
        unit = f"folded {name}"
        if not staging.finished(unit):
            staging.put(unit, [as_bytes(name, checkpoint.read(name))], None)
        places[name] = staging.store.stored(unit)[0]
    folds = {name: folds for name, folds in checkpoint.folds.items() if name not in places}
    held = checkpoint.holding({**checkpoint.base.tensors, **places})
    return replace(held, folds=folds)


def write_folds(path: Path, folds: Folds) -> None:
    """Keep the factors beside the weights: a safetensors file under a name that no runtime loads.

    `<site>` F32 [in_features] for each folded site; the metadata states the sites.
    """
    tensors = [as_bytes(site.name, factors) for site, factors in folds]
    content = {"kind": "smoothing", "version": 1, "sites": [_entry(site) for site, _ in folds]}
    serialize(path, tensors, own_metadata(content))


def read_folds(folder: Path) -> Folds:
    """The folds that `write_folds` left in a folder; none where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if FOLDS_FILE not in listing(folder):
        return ()
    path = folder / FOLDS_FILE
    checkpoint = open_checkpoint(path)
    try:
        content = json.loads(checkpoint.metadata["ptq"])
        if content["kind"] != "smoothing" or content["version"] != 1:
            raise ValueError
        sites = [_site(entry) for entry in content["sites"]]
        folds = [(site, checkpoint.read(site.name).astype(np.float32)) for site in sites]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: not a file of smoothing factors") from None
    for site, factors in folds:
        check_factors(factors, site.in_features)
    return folds


def folds_between(before: Path, after: Path) -> Folds:
    """The folds that lie between the models of two folders: those of `after`, or none where they
    are those that `before` has been through already, as a smoothed float model that was quantized.

    Raises:
        InputError: the file is damaged.
    """
    folds = read_folds(after)
    if not folds or FOLDS_FILE not in listing(before):
        return folds
    regular_file(before / FOLDS_FILE)
    with named(before / FOLDS_FILE):
        same = filecmp.cmp(before / FOLDS_FILE, after / FOLDS_FILE, shallow=False)
    return () if same else folds


def _entry(site: Site) -> dict[str, Any]:
    entry = asdict(site)
    for linear in entry["linears"]:
        if not linear["expert"]:
            del linear["expert"]
    return entry


def _site(entry: Mapping[str, Any]) -> Site:
    linears = tuple(SiteLinear(**linear) for linear in entry["linears"])
    feeder = dict(entry["feeder"])
    fed_by: Norm | Preceding
    if "rows" in feeder:
        fed_by = Preceding(**{**feeder, "rows": Rows(**feeder["rows"])})
    else:
        fed_by = Norm(**feeder)
    return Site(str(entry["name"]), linears, int(entry["in_features"]), fed_by)
