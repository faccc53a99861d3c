"""Smoothing on the way through the blocks: each site on what the quantized blocks before it give.

Sites that share a tensor settle their factors together, when the loop reaches the first linear of
theirs: a factor of o_proj's inputs changes v_proj, so it has to be known before v_proj is rounded.
Their inputs at that time come from the rounded layers before them and from their own linears as
floats (`Streams.look_ahead`); then each is *rounded* on what those before it, smoothed and rounded,
give it. What the float model gives a smoothed site is divided by the factors before the two are
compared, so targets and held-out errors are those of the float model's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Place
from ptq_cli.calibration.streams import Streams
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.models.sites import Site
from ptq_cli.numerics.statistics import smoothed
from ptq_cli.run.nearest import round_layer
from ptq_cli.run.settle import Smoothing
from ptq_cli.run.smooth import Smoothed, connected, settle_group, unit_of
from ptq_cli.run.work import Work
from ptq_cli.storage.folded import FoldsByTensor, add_folds, folded_checkpoint

Order = tuple[int, int]  # a block and one of its stages
BEFORE: Order = (-1, 0)


@dataclass(frozen=True)
class Group:
    """Sites that settle together, the stage of the first linear they touch, and the place of the
    last; None where the forward has none of them."""

    sites: tuple[Site, ...]
    order: Order = BEFORE
    last: Place | None = None


def place_groups(sites: Sequence[Site], places: Mapping[str, Place]) -> list[Group]:
    """The groups in the order of the forward; those it does not have come first.

    Raises:
        InputError: sites that share a tensor across blocks.
    """
    place_of = {f"{x}.weight": place for place in places.values() for x in place.linears}
    groups = []
    for group in connected(sites):
        tensors = {tensor for site in group for tensor in site.tensors} & place_of.keys()
        touched = sorted((place_of[tensor] for tensor in tensors), key=lambda place: place.order)
        if len({place.block for place in touched}) > 1:
            names = ", ".join(site.name for site in group)
            raise InputError(
                f"sites {names} share tensors across blocks, which cannot be smoothed in sequence",
                hint="--parallel-layers",
            )
        groups.append(Group(group, touched[0].order, touched[-1]) if touched else Group(group))
    return sorted(groups, key=lambda group: group.order)


class SmoothInSequence:
    """What the loop over the blocks does before it rounds a stage's units.

    Once it is made, the work's checkpoint has the folds that an interrupted run settled; each group
    that settles adds its own.

    divisors: what the inputs of smoothed sites are divided by, [in_features]
    """

    def __init__(self, work: Work, smoothing: Smoothing) -> None:
        assert work.source is not None  # the plan has seen to it
        self.work, self.smoothing = work, smoothing
        self._groups = place_groups(smoothing.sites, work.source.places)
        self._folds: FoldsByTensor = {}
        self.divisors: dict[str, NDArray[np.float32]] = {}
        self._site_of = {x: site for site, i in work.source.sites.items() for x in i.linears}
        work.checkpoint = replace(folded_checkpoint(work.checkpoint, ()), folds=self._folds)
        finished = [g for g in self._groups if work.staging.finished(unit_of(g.sites))]
        self._pending = [group for group in self._groups if group not in finished]
        for group in finished:
            self._take(group)

    @property
    def orders(self) -> list[Order]:
        """Where groups are still to be settled."""
        return [group.order for group in self._pending if group.order != BEFORE]

    def settle(self, order: Order, streams: Streams) -> None:
        """Find the factors of the groups that begin at this stage, and go on with what they
        leave."""
        while self._pending and self._pending[0].order <= order:
            group = self._pending.pop(0)
            ahead = streams.look_ahead(group.last)
            settle_group(self.smoothing, group.sites, ahead, self.work.staging)
            ahead.drop()
            self._take(group)
            if group.last is not None:
                streams.main.refresh()

    def _take(self, group: Group) -> None:
        folds = Smoothed(self.smoothing).take(group.sites, self.work.staging)
        add_folds(self._folds, folds)
        for site, factors in folds:
            for linear in site.linears:
                if linear.module in self._site_of:
                    self.divisors[self._site_of[linear.module]] = factors

    def keep_plain(self, statistics: SiteStatistics | None) -> None:
        """Keep the errors of plain rounding of the site's weights as they were, on these inputs as
        they were."""
        if statistics is None:
            return
        layers = [
            layer
            for layer in self.smoothing.layers.values()
            if layer.module in statistics.linears and layer.tensor in self._folds
        ]
        unit = _plain(statistics.site)
        if not layers or self.work.staging.finished(unit):
            return
        factors = self.divisors.get(statistics.site)
        before = statistics if factors is None else smoothed(statistics, 1 / factors)
        errors, fmt = {}, self.smoothing.rounding.fmt
        for layer in layers:
            weight = self.smoothing.checkpoint.weight(layer)
            _, plain = round_layer(weight, layer, fmt, before)
            errors[layer.module] = (plain.rel_err, plain.heldout_rel_err)
        self.work.staging.put(unit, [], errors)

    def result(self) -> Smoothed:
        """What was found, once every layer is rounded."""
        found, staging = Smoothed(self.smoothing), self.work.staging
        for group in self._groups:
            found.take(group.sites, staging)
        found.rtn = {
            module: tuple(pair)
            for site in dict.fromkeys(self._site_of.values())
            if staging.finished(_plain(site))
            for module, pair in staging.store.result(_plain(site)).items()
        }
        return found


def _plain(site: str) -> str:
    """The name of the unit that holds the errors of plain rounding."""
    return f"plain {site}"
