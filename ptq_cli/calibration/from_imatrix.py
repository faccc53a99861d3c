"""Statistics from an importance matrix of llama.cpp: of the Hessian its diagonal is known, of the
inputs nothing else. Each linear is a site of its own.

Experts that no token reaches have the statistics of all experts of their tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from ptq_cli.errors import InputError
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
        largest = float(size.max(initial=0))
        return SiteStatistics(
            site, info.linears, np.diag(means), info.n_tokens, info.n_tokens,
            absmax=size, absmean=size, minimum=-largest, maximum=largest, mean=0.0,
            std=float(np.sqrt(means.mean())), histogram=np.zeros(1, np.int64), histogram_start=0,
            heldout=none, sample=none, own_tokens=info.own_tokens,
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
    places = gguf_places(checkpoint)
    widths = _input_widths(checkpoint, places)
    for name, (stored, number, of) in places.items():
        importance = found.get(stored)
        if importance is None:
            continue
        module, width = name.removesuffix(".weight"), widths[name]
        used.add(stored)
        fits = importance.n_values == of * width and len(importance.counts) in (1, of)
        if not fits:
            wrong[module] = _misfit(f"{path}: {stored}", importance, name, width, of)
            continue
        entries[module] = Entry(importance, number, of)
        n_tokens = entries[module].own_tokens
        alone = n_tokens or sum(map(int, importance.counts)) * importance.per_count
        own = None if n_tokens else 0
        sites[module] = SiteInfo(module, (module,), width, alone, own)
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


def _misfit(entry: str, importance: Importance, name: str, width: int, of: int) -> str:
    """Why an entry is not of this tensor."""
    whole = f"{of} experts of {width}" if of > 1 else f"{width} columns"
    return f"{entry}: {importance.n_values} values for tensor {name!r}, which has {whole}"


def gguf_places(checkpoint: Checkpoint) -> dict[str, tuple[str, int, int]]:
    """Each matrix of a model → the tensor of a GGUF file that it is stored in, as which of how
    many.

    Raises:
        InputError: a model that is not in GGUF, and whose names there are not known.
    """
    matrices = {n for n, s in checkpoint.specs.items() if is_float(s) and len(s.shape) == 2}
    if checkpoint.gguf is not None:
        members = checkpoint.gguf.members()
        return {
            name: (stored, number, len(names))
            for stored, names in members.items()
            for number, name in enumerate(names)
            if name in matrices
        }
    names, found = names_of_model(checkpoint.config), {}
    for name in matrices:
        with suppress(InputError):  # it is no part of the file
            found[name] = (names.tensor_name(name), names.expert(name) or 0)
    of = Counter(stored for stored, _ in found.values())
    return {name: (stored, number, of[stored]) for name, (stored, number) in found.items()}


def _input_widths(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """How many values go into each matrix, which GPT-2 stores transposed."""
    turned = set()
    if checkpoint.gguf is None:
        own, config = names_of_model(checkpoint.config), text_config(checkpoint.config)
        turned = {name for name in names if own.placing(name, config).transposed}
    shapes = {name: checkpoint.tensors[name].spec.shape for name in names}
    return {name: shape[0 if name in turned else 1] for name, shape in shapes.items()}
