"""Statistics of smoothed inputs: folded when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Parts, Source
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.numerics.statistics import smoothed
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.folded import Folds


@dataclass(frozen=True)
class SmoothedSource(Source):
    """Statistics of `base` behind its folds. (Fisher information was taken of other weights.)

    factors: what the inputs are divided by, [in_features], by the module of each linear
    """

    base: Source
    factors: Mapping[str, NDArray[np.float32]]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def sites(self) -> Mapping[str, SiteInfo]:
        return self.base.sites

    @property
    def files(self) -> Sequence[Path]:
        return self.base.files

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        statistics = self.base.load(site, parts)
        factors = self.factors.get(statistics.linears[0])
        return statistics if factors is None else smoothed(statistics, factors)

    def load_memory(self, site: str) -> int:
        """Another Hessian to fold."""
        return self.base.load_memory(site) + 4 * self.sites[site].in_features ** 2

    def only(self, site: str) -> SmoothedSource:
        linears = self.sites[site].linears if site in self.sites else ()
        own = {module: self.factors[module] for module in linears if module in self.factors}
        return replace(self, base=self.base.only(site), factors=own)

    def digest(self, site: str, parts: Parts | None = None) -> str:
        factors = (self.factors.get(module) for module in self.sites[site].linears)
        words = (values.tobytes().hex() for values in factors if values is not None)
        return digest_words(str(self.base.digest(site, parts)), *words)


def smoothed_source(base: Source, folds: Folds) -> SmoothedSource:
    """Statistics of `base` behind these folds."""
    factors = {linear.module: values for site, values in folds for linear in site.linears}
    return SmoothedSource(base, factors)
