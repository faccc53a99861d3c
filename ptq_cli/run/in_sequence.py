"""Smoothing and rounding in sequence: each block sees what the quantized blocks before it produce.

Sites that share a tensor settle their factors together, when the run reaches the first linear of
theirs: a factor of o_proj's inputs changes v_proj, so it has to be known before v_proj is rounded.
Their inputs at that time come from the rounded layers before them and from their own linears as
floats (`TokenSource.look_ahead`). Factors are found and judged on those inputs just as the parallel
pass does, then the site is folded, rounded on what the stream now brings it, and so on: the second
site of a group is *rounded* on what the first, smoothed and rounded, gives it.

Beside it runs the float model. What it gives a smoothed site is divided by the factors before the
two are compared, so targets and held-out errors are those of the float model's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_tokens import Ahead, Place, Rounded, TokenSource
from ptq_cli.calibration.gradients import FisherInfo
from ptq_cli.core.plugins import Work
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.sites import Site
from ptq_cli.numerics.statistics import smoothed
from ptq_cli.run.nearest import measure_plain
from ptq_cli.run.smooth import (
    Found,
    Smoothed,
    Smoothing,
    connected,
    settle_group,
    unit_of,
)
from ptq_cli.storage.folded import FoldsByTensor, add_folds, folded_checkpoint
from ptq_cli.storage.staging import Staging


@dataclass(frozen=True)
class Group:
    """Sites that settle together, and the places of the first and last linear they touch; None
    where the forward has none of them."""

    sites: tuple[Site, ...]
    first: Place | None
    last: Place | None

    @property
    def order(self) -> tuple[int, int]:
        return (-1, 0) if self.first is None else self.first.order


def place_groups(sites: Sequence[Site], tokens: TokenSource) -> list[Group]:
    """The groups in the order of the forward; those it does not have come first.

    Raises:
        InputError: sites that share a tensor across blocks.
    """
    place_of = {f"{x}.weight": place for place in tokens.places.values() for x in place.linears}
    groups = []
    for group in connected(sites):
        tensors = {tensor for site in group for tensor in site.tensors} & place_of.keys()
        places = sorted((place_of[tensor] for tensor in tensors), key=lambda place: place.order)
        if len({place.block for place in places}) > 1:
            names = ", ".join(site.name for site in group)
            raise InputError(
                f"sites {names} share tensors across blocks, which cannot be smoothed in sequence",
                hint="--parallel-layers",
            )
        groups.append(Group(group, places[0], places[-1]) if places else Group(group, None, None))
    return sorted(groups, key=lambda group: group.order)


def smoothing_scratch(tokens: TokenSource) -> int:
    """Bytes of a stream's files: as `TokenSource.scratch`, and as much for looking ahead."""
    return 2 * tokens.scratch


class SmoothedTokens:
    """A `StreamingSource` (storage/calibration.py) of what the model sees as it is smoothed and
    rounded.

    checkpoint: its tensors with the folds that are known so far
    """

    def __init__(self, job: Smoothing, tokens: TokenSource, staging: Staging) -> None:
        self.job, self.tokens, self.staging = job, tokens, staging
        self.name, self.files, self.sites = tokens.name, tokens.files, tokens.sites
        self.surplus: tuple[str, ...] = ()
        self.fisher: Mapping[str, FisherInfo] = {}
        self._folds: FoldsByTensor = {}
        self.checkpoint = replace(folded_checkpoint(job.checkpoint, ()), folds=self._folds)
        self._site_of = {x: site for site, info in self.sites.items() for x in info.linears}
        self._groups = place_groups(job.sites, tokens)
        self._pending: list[Group] = []

    @property
    def scratch(self) -> int:
        return smoothing_scratch(self.tokens)

    def memory(self, workers: int | None, memory: int | None) -> int:
        """As `TokenSource.memory`."""
        return self.tokens.memory(workers, memory)

    def load_memory(self, site: str) -> int:
        """As `TokenSource.load_memory`, and another Hessian to fold."""
        return self.tokens.load_memory(site) + 4 * self.sites[site].in_features ** 2

    def work(self, site: str) -> Work:
        """As `TokenSource.work`."""
        return self.tokens.work(site)

    def begin(
        self, work: Path, rounded: Rounded, workers: int | None = None, memory: int | None = None
    ) -> None:
        """As `TokenSource.begin`; what an interrupted run settled is taken over."""
        for group in self._groups:
            if self.staging.finished(unit_of(group.sites)):
                self._take(group)
            else:
                self._pending.append(group)

        def current(name: str) -> Tensor | None:
            tensor = rounded(name)
            return self.checkpoint.read(name) if tensor is None and name in self._folds else tensor

        self.tokens.begin(work, current, workers, memory)

    def load(self, site: str) -> SiteStatistics:
        """The statistics of a site behind its own fold, which is settled first where it is not yet.

        Raises:
            NoTokens, InputError, NumericalError: as `TokenSource.load` and the search for factors.
        """
        here = self.tokens.places[site].order
        while self._pending and self._pending[0].order <= here:
            self._settle(self._pending.pop(0))
        statistics = self.tokens.load(site)
        self._keep_plain(statistics)
        return statistics

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """Raises InputError: tokens have no gradients."""
        return self.tokens.load_fisher(module)

    def finish(self) -> Smoothed:
        """What the pass found, once every layer is rounded."""
        while self._pending:
            self._settle(self._pending.pop(0))
        found = Found(self.job)
        for group in self._groups:
            found.take(group.sites, self.staging)
        found.rtn = {
            module: tuple(pair)
            for site in self.sites
            if self.staging.finished(_plain(site))
            for module, pair in self.staging.result(_plain(site)).items()
        }
        return found.smoothed(self.checkpoint, self)

    def _settle(self, group: Group) -> None:
        """Find the group's factors, and go on with what they leave."""
        if group.first is None or group.last is None:
            settle_group(self.job, group.sites, Ahead(self.name, {}), self.staging)
            return
        self.tokens.go_to(group.first)
        ahead = self.tokens.look_ahead(group.last)
        settle_group(self.job, group.sites, ahead, self.staging)
        ahead.drop()
        self._take(group)
        self.tokens.refresh()

    def _take(self, group: Group) -> None:
        folds = Found(self.job).take(group.sites, self.staging)
        add_folds(self._folds, folds)
        for site, factors in folds:
            for linear in site.linears:
                if linear.module in self._site_of:
                    self.tokens.divisors[self._site_of[linear.module]] = factors

    def _keep_plain(self, statistics: SiteStatistics) -> None:
        """Keep the errors of plain rounding of the site's weights as they were, on these inputs as
        they were."""
        layers = [
            layer
            for layer in self.job.layers.values()
            if layer.module in statistics.linears and layer.tensor in self._folds
        ]
        unit = _plain(statistics.site)
        if not layers or self.staging.finished(unit):
            return
        factors = self.tokens.divisors.get(statistics.site)
        before = statistics if factors is None else smoothed(statistics, 1 / factors)
        errors = {}
        for layer in layers:
            plain = measure_plain(self.job.checkpoint.weight(layer), layer, before, self.job.fmt)
            errors[layer.module] = (plain.rel_err, plain.heldout_rel_err)
        self.staging.put(unit, [], errors)


def _plain(site: str) -> str:
    """The name of the unit that holds the errors of plain rounding."""
    return f"plain {site}"
