"""Several statistics files of one model as one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_file import CalibrationFile
from ptq_cli.calibration.source import FisherInfo, Parts, Source
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.numerics.statistics import statistics_memory
from ptq_cli.storage.digest import digest_words


@dataclass(frozen=True)
class Merged(Source):
    """Several calibrations of one model, as one source: the union of their sites, each site merged
    from every file that has it."""

    parts: tuple[CalibrationFile, ...]

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        return [part.checkpoint.fingerprint for part in self.parts]

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        return reduce(self.merged, [part.load(site) for part in self.parts if site in part.sites])

    def load_memory(self, site: str) -> int:
        """Two Hessians and their sum; that of tokens which one file alone would have held out."""
        width = self.sites[site].in_features
        return statistics_memory(width, self.heldout[1]) + 12 * width**2

    def only(self, site: str) -> Merged:
        return replace(super().only(site), parts=tuple(part.only(site) for part in self.parts))

    def digest(self, site: str, parts: Parts | None = None) -> str:
        digests = [part.digest(site) for part in self.parts if site in part.sites]
        return digest_words(*digests, str(self.heldout[1]))

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """The mean over all samples."""
        total = self.fisher[module].n_samples
        weighted = [
            part.load_fisher(module) * (part.fisher[module].n_samples / total)
            for part in self.parts
            if module in part.fisher
        ]
        mean: NDArray[np.float32] = np.sum(np.stack(weighted), axis=0)
        return mean


def merge_calibrations(parts: tuple[CalibrationFile, ...]) -> Merged:
    """Several calibrations of one model as one; tokens were held out as the first of them says.

    Raises:
        InputError: they do not agree on which linears share their inputs.
    """
    _check_sites(parts)
    fisher: dict[str, FisherInfo] = {}
    for part in parts:
        for module, info in part.fisher.items():
            before = fisher[module].n_samples if module in fisher else 0
            fisher[module] = replace(info, n_samples=before + info.n_samples)
    weak = [reason for part in parts for reason in part.weak]
    if len({part.checkpoint.fingerprint for part in parts}) < len(parts):
        weak.append("the same statistics are merged more than once")
    return Merged(
        parts,
        name=", ".join(part.name for part in parts),
        sites={site: info for part in reversed(parts) for site, info in part.sites.items()},
        heldout=parts[0].heldout,
        files=[path for part in parts for path in part.files],
        warnings=tuple(dict.fromkeys(weak)),
        weak=tuple(dict.fromkeys(weak)),
        fisher=fisher,
    )


def _check_sites(parts: Sequence[CalibrationFile]) -> None:
    """Raise an error where two files give a linear to sites of other linears."""
    found: dict[str, tuple[CalibrationFile, SiteInfo]] = {}
    for part in parts:
        for info in part.sites.values():
            for linear in info.linears:
                first, other = found.setdefault(linear, (part, info))
                if other.linears != info.linears:
                    raise InputError(
                        f"{part.name}: {linear} shares its inputs with other linears than in"
                        f" {first.name}",
                        hint="calibrate again, in the same way",
                    )
