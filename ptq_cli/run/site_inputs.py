"""What the linears of a group of sites see: statistics from the source, behind the sites' folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from numpy import float32
from numpy.typing import NDArray

from ptq_cli.calibration.source import Source
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.models.sites import Site, SiteLinear
from ptq_cli.numerics.statistics import smoothed

KEPT = 4  # statistics held at a time: the experts of a mixture have too many

Fold = tuple[Site, NDArray[float32]]


class SiteInputs:
    """An expert sees the tokens routed to it, every other linear of a site all of them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._names = {x: name for name, info in source.sites.items() for x in info.linears}
        self._loaded: dict[tuple[str, ...], SiteStatistics] = {}

    def known(self, linear: SiteLinear, site: Site) -> bool:
        return bool(self._named(site, linear))

    def statistics(
        self, site: Site, folds: Sequence[Fold], linear: SiteLinear | None = None
    ) -> SiteStatistics | None:
        """Of what a linear of the site sees, or of all its inputs, behind the site's own fold if
        there is one; None where the source does not have them."""
        names = self._named(site, linear)
        if not names:
            return None
        found = self._loaded.pop(names, None) or self._load(names)
        self._loaded[names] = found
        if len(self._loaded) > KEPT:
            del self._loaded[next(iter(self._loaded))]
        own = [factors for other, factors in folds if other is site]
        return smoothed(found, own[0]) if own else found

    def _named(self, site: Site, linear: SiteLinear | None) -> tuple[str, ...]:
        """Names in the source. Where only experts' inputs are known, a site's are all of them."""
        if linear is not None and linear.expert:
            return (self._names[linear.module],) if linear.module in self._names else ()
        found = [x for x in site.linears if x.module in self._names]
        every = [x for x in found if not x.expert][:1]
        return tuple(dict.fromkeys(self._names[x.module] for x in every or found))

    def _load(self, names: tuple[str, ...]) -> SiteStatistics:
        parts = (replace(self.source.load(name), site=names[0]) for name in names)
        return reduce(self.source.merged, parts)
