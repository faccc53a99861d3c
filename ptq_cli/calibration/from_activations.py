"""Activations as a source of statistics: `<module>.npy` files, summed up as a tree.

A site's tokens are cut into parts of `PART_TOKENS`, whatever the number of workers (a rest of less
than half a part goes to the last one). Each part has an accumulator of its own; neighbours are
merged two by two, then the results of that, level by level. So bytes do not depend on who sums
what: one process does all of it in `load`, and run/calibrate.py hands parts and merges to workers.

Gradients lie in such files too: `<module>.npy` holds the gradient of the loss at the module's
weight for each of n samples, `[n, *the weight's shape]` or `[n, P]`, in any float dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Parts, Ranges, Source, halves, only_entry
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.numerics.statistics import (
    NonFiniteInput,
    SiteAccumulator,
    piece_tokens,
    statistics_memory,
)
from ptq_cli.storage.digest import Digest, digest_words
from ptq_cli.storage.files import listing
from ptq_cli.storage.npy import InputsFile, open_inputs

PART_TOKENS = 1 << 18
_GRADIENTS = 1 << 22  # squared at a time

InputsFiles = tuple[InputsFile, ...]


@dataclass(frozen=True)
class Activations(Source):
    """Folders or files of activations, matched to sites; statistics are made when asked for.

    inputs: the files of each site
    missing: linears that have none
    gradients: the files of each module of `fisher`
    part_tokens: how tokens are cut; the last bits depend on it
    """

    inputs: Mapping[str, InputsFiles]
    missing: Sequence[str] = ()
    gradients: Mapping[str, InputsFiles] = field(default_factory=dict)
    part_tokens: int = field(default_factory=lambda: PART_TOKENS)

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        """Of each site: the headers of its files and a sample of each; the same of gradients."""
        read = [((site, self.sites[site].linears), files) for site, files in self.inputs.items()]
        slopes = [((module, "gradients"), files) for module, files in self.gradients.items()]
        return [_fingerprint(key, files) for key, files in (*read, *slopes)]

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """`mean_n g²` of the module's gradients, float32 in the shape of the tensor, summed in
        float64.

        Raises:
            InputError: NaN or inf, with file and sample.
        """
        info = self.fisher[module]
        size = prod(info.shape)
        total = np.zeros(size, np.float64)
        for file in self.gradients[module]:
            rows = size // file.in_features  # of the file's rows, in one sample
            step = max(1, min(rows, _GRADIENTS // file.in_features))
            for start in range(0, file.n_tokens, rows):
                for row in range(0, rows, step):
                    stop = min(rows, row + step)
                    piece = file.read(start + row, start + stop).astype(np.float64).ravel()
                    if not np.isfinite(piece).all():
                        raise InputError(
                            f"{file.npy.path}: NaN or inf in sample {start // rows}",
                            hint="take the gradients again",
                        )
                    first = row * file.in_features
                    total[first : first + len(piece)] += piece * piece
        total /= info.n_samples
        return total.astype(np.float32).reshape(info.shape)

    def all_parts(self, site: str) -> Parts:
        """The root of the site's tree."""
        if self.heldout[0] == 1:  # a part could be held out as a whole
            return 0, 1
        tokens = self._n_seen(site)
        return 0, max(1, (tokens + self.part_tokens // 2) // self.part_tokens)

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        """Stream the site's inputs. Raises InputError for NaN or inf, with file and place."""
        parts = self.all_parts(site) if parts is None else parts
        if parts[1] - parts[0] > 1:
            left, right = (self.load(site, half) for half in halves(parts))
            return self.merged(left, right)
        info, part = self.sites[site], self.tokens(site, parts)
        sums = SiteAccumulator(
            info.in_features,
            *self.heldout,
            part.start,
            self._n_seen(site),
            described=self.described,
            whole=self.hessians,
        )
        for file, start, stop in self._pieces(site, part):
            try:
                sums.update(file.read(start, stop))
            except NonFiniteInput as error:
                token = start + error.token - sums.n_seen
                raise InputError(
                    f"{file.npy.path}: {list(file.npy.shape)}: {error.value} at token"
                    f" {token}, channel {error.channel}",
                    hint="capture the activations again",
                ) from None
        return sums.result(site, info.linears)

    def ranges(self, modules: Collection[str]) -> Ranges:
        """Of the sites of these modules, read anew; of all where there are no modules."""
        for site, info in self.sites.items():
            if not modules or not set(info.linears).isdisjoint(modules):
                yield site, self._absmax(site)

    def _absmax(self, site: str) -> NDArray[np.float32]:
        """The largest absolute value of each channel, without a Hessian."""
        found = np.zeros(self.sites[site].in_features, np.float32)
        for file, start, stop in self._pieces(site, range(self._n_seen(site))):
            tokens = file.read(start, stop)
            np.maximum(found, np.abs(tokens).max(axis=0).astype(np.float32), out=found)
        return found

    def _n_seen(self, site: str) -> int:
        """All tokens, held out or not."""
        return sum(file.n_tokens for file in self.inputs[site])

    def bytes_read(self, site: str) -> int:
        """The inputs, taken for two bytes each."""
        info = self.sites[site]
        return 2 * info.in_features * info.n_tokens

    def tokens(self, site: str, parts: Parts) -> range:
        """The tokens of a node."""
        last = parts[1] == self.all_parts(site)[1]
        stop = self._n_seen(site) if last else parts[1] * self.part_tokens
        return range(parts[0] * self.part_tokens, stop)

    def _pieces(self, site: str, tokens: range) -> Iterator[tuple[InputsFile, int, int]]:
        """Files in order, and which of their tokens to read at a time: from, to before."""
        begin, step = 0, piece_tokens(self.sites[site].in_features)
        for file in self.inputs[site]:
            first = max(0, tokens.start - begin)
            last = min(file.n_tokens, tokens.stop - begin)
            for start in range(first, last, step):
                yield file, start, min(last, start + step)
            begin += file.n_tokens

    def only(self, site: str) -> Activations:
        own = only_entry(self.inputs, site)
        return replace(super().only(site), inputs=own, missing=())

    def digest(self, site: str, parts: Parts | None = None) -> str:
        parts = self.all_parts(site) if parts is None else parts
        if parts[1] - parts[0] > 1:
            return digest_words(*(self.digest(site, half) for half in halves(parts)))
        info, part = self.sites[site], self.tokens(site, parts)
        digest = Digest(repr((info, self._n_seen(site), self.heldout, part)))
        for file, start, stop in self._pieces(site, part):
            digest.update(file.read(start, stop).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def part_memory(self, site: str) -> int:
        """Bytes that a part takes at most. One number for all of a site, so that tasks that are
        ordered by it keep its parts together, and few sites are in parts at a time."""
        last = self.all_parts(site)[1]
        longest = max(len(self.tokens(site, part)) for part in ((0, 1), (last - 1, last)))
        return statistics_memory(self.sites[site].in_features, longest, whole=self.hessians)

    def load_memory(self, site: str) -> int:
        """Bytes that `load` takes at most: those of one part, and a Hessian a level of the tree."""
        width = self.sites[site].in_features
        levels = (self.all_parts(site)[1] - 1).bit_length()
        return self.part_memory(site) + (4 * width**2 * (levels + 1) if levels else 0)


def _fingerprint(key: Any, files: Iterable[InputsFile]) -> str:
    digest = hashlib.sha256(repr(key).encode())
    for file in files:
        digest.update(repr((file.npy.shape, file.npy.dtype.str, file.npy.fortran)).encode())
        for start in {0, file.n_tokens // 2, max(0, file.n_tokens - 1)}:
            digest.update(file.read(start, min(start + 1, file.n_tokens)).tobytes())
    return digest.hexdigest()


def find_activations(paths: Iterable[Path], bf16: bool) -> dict[str, InputsFiles]:
    """Activations by module name: `<module>.npy`, or every `.npy` in a folder `<module>/`.

    paths: folders that hold those, or the files themselves; what several of them hold of one
        module is put together

    Raises:
        InputError: a damaged file, shards of different widths.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        for module, file in _modules_in(path):
            found.setdefault(module, []).append(file)
    result = {}
    for module, files in sorted(found.items()):
        inputs = tuple(open_inputs(file, bf16) for file in files)
        widths = {file.in_features: file.npy.path for file in inputs}
        if len(widths) > 1:
            (a, file_a), (b, file_b) = list(widths.items())[:2]
            raise InputError(f"{file_a} has in_features {a}, {file_b} has {b}: one module")
        result[module] = inputs
    return result


def _modules_in(path: Path) -> list[tuple[str, Path]]:
    if not path.is_dir():
        return [(path.name.removesuffix(".npy"), path)]
    pairs = []
    for name in listing(path):
        entry = path / name
        if entry.is_dir():
            shards = [entry / shard for shard in listing(entry) if shard.endswith(".npy")]
            pairs += [(name, shard) for shard in shards]
        elif name.endswith(".npy"):
            pairs.append((name.removesuffix(".npy"), entry))
    return pairs
