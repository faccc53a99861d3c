"""Statistics of smoothed inputs: folded when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.gradients import FisherInfo
from ptq_cli.calibration.source import StatisticsSource
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.numerics.statistics import smoothed
from ptq_cli.storage.folded import Folds


@dataclass(frozen=True)
class SmoothedSource:
    """Statistics of the smoothed inputs. factors: by the module of each linear, [in_features]"""

    base: StatisticsSource
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

    @property
    def surplus(self) -> Sequence[str]:
        return self.base.surplus

    @property
    def fisher(self) -> Mapping[str, FisherInfo]:
        return {}  # it was taken of other weights

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        raise KeyError(module)

    def load_memory(self, site: str) -> int:
        return self.base.load_memory(site) + 4 * self.sites[site].in_features ** 2

    def load(self, site: str) -> SiteStatistics:
        statistics = self.base.load(site)
        factors = self.factors.get(statistics.linears[0])
        return statistics if factors is None else smoothed(statistics, factors)


def smoothed_source(base: StatisticsSource, folds: Folds) -> SmoothedSource:
    """Statistics of `base` behind these folds."""
    factors = {linear.module: values for site, values in folds for linear in site.linears}
    return SmoothedSource(base, factors)
