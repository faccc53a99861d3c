"""Statistics from an importance matrix of llama.cpp: of the Hessian its diagonal is known, of the
inputs nothing else. Each linear is a site of its own.

Experts that no token reaches have the statistics of all experts of their tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Parts, Source, only_entry
from ptq_cli.core.names import first_and_others
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.core.tensors import is_float
from ptq_cli.core.text import CONVERTED
from ptq_cli.errors import InputError, stated_in
from ptq_cli.models.family import text_config
from ptq_cli.models.gguf_names import names_of_model
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.digest import Digest
from ptq_cli.storage.imatrix import Importance, digest_of_file, read_imatrix

_WEAK = (
    "an importance matrix holds the diagonal of the Hessian alone, and no inputs to measure errors"
    " on"
)


@dataclass(frozen=True)
class Place:
    """Where a matrix is in a GGUF file: number `number` of the `of` that the tensor `stored` holds.
    width: its in_features"""

    stored: str
    number: int
    of: int
    width: int


@dataclass(frozen=True)
class Entry:
    """What is said of a linear: number `number` of the `of` that its tensor holds."""

    importance: Importance
    number: int
    of: int

    @property
    def own_tokens(self) -> int:
        """Those behind the sums."""
        counts, per_count = self.importance.counts, self.importance.per_count
        return int(counts[self.number if len(counts) > 1 else 0]) * per_count

    def means(self) -> NDArray[np.float32]:
        """Mean squares of the inputs, float32 [in_features]."""
        sums = self.importance.sums().reshape(self.of, -1)
        counts = np.broadcast_to(np.array(self.importance.counts, np.float32), self.of)
        if counts[self.number] == 0:
            return np.asarray(sums.sum(axis=0) / max(float(counts.sum()), 1.0), np.float32)
        return np.asarray(sums[self.number] / counts[self.number], np.float32)


@dataclass(frozen=True, kw_only=True)
class ImatrixSource(Source):
    """entries: by site, which is the linear's module"""

    entries: Mapping[str, Entry]
    path: Path

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        return [digest_of_file(self.path)]

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        means, info = self.entries[site].means(), self.sites[site]
        size, none = np.sqrt(means), np.empty((0, info.in_features), np.float32)
        return SiteStatistics(
            site, info.linears, np.diag(means), info.n_tokens, info.n_tokens,
            absmax=size, absmean=size, heldout=none, sample=none, own_tokens=info.own_tokens,
        )  # fmt: skip

    def load_memory(self, site: str) -> int:
        width = self.sites[site].in_features
        return 4 * width * (width + 4) + 4 * self.entries[site].importance.n_values

    def only(self, site: str) -> ImatrixSource:
        return replace(super().only(site), entries=only_entry(self.entries, site))

    def digest(self, site: str, parts: Parts | None = None) -> str:
        entry = self.entries[site]
        digest = Digest(repr((entry.number, entry.of, entry.importance.counts)))
        digest.update(entry.importance.sums().view(np.uint8))
        return digest.hexdigest()


def imatrix_source(checkpoint: Checkpoint, path: Path) -> ImatrixSource:
    """The statistics of a model's linears that an importance matrix has.

    Raises:
        InputError: it has none for this model, or of another width; all such are listed.
    """
    entries, used, wrong = {}, set(), {}
    found = read_imatrix(path)
    sites = {}
    for name, place in gguf_places(checkpoint).items():
        importance, module = found.get(place.stored), name.removesuffix(".weight")
        if importance is None:
            continue
        used.add(place.stored)
        sizes = importance.n_values, len(importance.counts)
        if sizes[0] != place.of * place.width or sizes[1] not in (1, place.of):
            whole = f"{place.of} experts of {place.width}" if place.of > 1 else f"{place.width}"
            said = f"{sizes[0]} values for tensor {name!r}, which has {whole} columns"
            wrong[module] = f"{path}: {place.stored}: {said}"
            continue
        entries[module] = Entry(importance, place.number, place.of)
        n_tokens = entries[module].own_tokens
        alone = n_tokens or sum(map(int, importance.counts)) * importance.per_count
        own = None if n_tokens else 0
        sites[module] = SiteInfo(module, (module,), place.width, alone, own)
    if wrong:
        raise InputError(first_and_others(wrong), hint="it was made for another model")
    if not sites:
        shown = next(iter(found))
        raise InputError(
            f"{path}: none of its {len(found)} entries, like {shown!r}, is of a tensor of"
            f" {checkpoint.path}",
            hint="it was made for another model",
        )
    return ImatrixSource(
        name=str(path), sites=sites, files=(path,), surplus=sorted(found.keys() - used),
        warnings=(f"{path}: {_WEAK}",), weak=(_WEAK,), diagonal=True, entries=entries, path=path,
    )  # fmt: skip


def gguf_places(checkpoint: Checkpoint) -> dict[str, Place]:
    """Where each matrix of a model is in a GGUF file.

    Raises:
        InputError: a model that is not in GGUF, and whose names there are not known.
    """
    specs = {n: s for n, s in checkpoint.specs.items() if is_float(s) and len(s.shape) == 2}
    if checkpoint.gguf is not None:
        view = checkpoint.gguf
        return {
            name: Place(stored, number, len(names), view.tensors[name].spec.shape[-1])
            for stored, names in view.members().items()
            for number, name in enumerate(names)
            if name in specs
        }
    with stated_in(checkpoint.path):
        names, config = names_of_model(checkpoint.config, CONVERTED), text_config(checkpoint.config)
    found = {}
    for name, spec in specs.items():
        with suppress(InputError):  # what is no part of the file
            width = spec.shape[0 if names.placing(name, config).transposed else 1]
            found[name] = Place(names.tensor_name(name), names.expert(name) or 0, 1, width)
    counts = Counter(place.stored for place in found.values())
    return {name: replace(place, of=counts[place.stored]) for name, place in found.items()}
