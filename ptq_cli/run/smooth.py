"""Smoothing, the stage before rounding: factors for every site, found, tried and folded.

Sites that share a tensor (v_proj is a linear of one and feeds another) are worked on together, one
after the other (run/settle.py). The stage leaves factors behind, not weights: storage/folded.py
folds them into whatever is read after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptq_cli.calibration.source import Source
from ptq_cli.core.progress import Listener, Progress
from ptq_cli.core.report import LayerReport
from ptq_cli.models.sites import Site
from ptq_cli.report.report import row_error, row_rtn_error
from ptq_cli.run.settle import Group, Smoothing
from ptq_cli.run.site_inputs import Fold
from ptq_cli.storage.folded import FoldedCheckpoint, folded_checkpoint
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes


def connected(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites in groups that share tensors, each in the order given."""
    groups: list[tuple[list[Site], set[str]]] = []
    for site in sites:
        tensors = set(site.tensors)
        touching = [group for group in groups if group[1] & tensors]
        merged = ([s for group in touching for s in group[0]] + [site], set(tensors))
        for group in touching:
            merged[1].update(group[1])
            groups.remove(group)
        groups.append(merged)
    return [tuple(members) for members, _ in groups]


def unit_of(group: Sequence[Site]) -> str:
    """The name of the unit that holds a group's factors."""
    return f"smoothing {group[0].name}"


def settle_group(
    smoothing: Smoothing, sites: Sequence[Site], source: Source, staging: Staging
) -> None:
    """Find and judge the factors of a group of connected sites, on statistics of their inputs
    before anything of the group is folded or rounded; stage them."""
    group = Group(smoothing, sites, source)
    result = group.settle()
    tensors = [as_bytes(site.name, factors) for site, factors in group.folds]
    staging.put(unit_of(sites), tensors, result)


@dataclass
class Smoothed:
    """What the stage has found so far, group by group.

    outcomes: what became of the sites, for the report
    rtn: of each module, plain rounding of the weight as it was: (rel_err, held-out rel_err)
    compared: of each module, the error of each method that was tried
    """

    smoothing: Smoothing
    folds: list[Fold] = field(default_factory=list)
    outcomes: list[Mapping[str, Any]] = field(default_factory=list)
    rtn: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    compared: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def take(self, group: Sequence[Site], staging: Staging) -> list[Fold]:
        """Take in a group that is settled; its folds."""
        unit = unit_of(group)
        result = staging.store.result(unit)
        factors = {t.spec.name: t.data.view(np.float32).copy() for t in staging.store.tensors(unit)}
        folds = [(site, factors[site.name]) for site in group if site.name in factors]
        self.folds += folds
        self.outcomes += result["sites"]
        self.rtn |= {module: tuple(pair) for module, pair in result["rtn"].items()}
        self.compared |= result["compared"]
        return folds

    @property
    def checkpoint(self) -> FoldedCheckpoint:
        """The run's checkpoint behind the folds."""
        return folded_checkpoint(self.smoothing.checkpoint, self.folds)

    def annotate(self, row: LayerReport) -> LayerReport:
        """A row whose baseline is plain rounding of the original weight, not of the smoothed."""
        module, name = row.module, self.smoothing.smoother.name
        folded = any(module in site["linears"] for site in self.outcomes if site["fed_by"])
        if folded and row.method != name:
            row = replace(row, method=f"{name}+{row.method}")
        if module in self.rtn:
            rel, heldout = self.rtn[module]
            row = replace(row, rtn_rel_err=rel, rtn_heldout_rel_err=heldout)
            gain = row_rtn_error(row) / row_error(row) if row_error(row) > 0 else None
            row = replace(row, gain_vs_rtn=gain)
        if module in self.compared:
            errors = self.compared[module]
            row = replace(row, compared=errors, best=min(errors, key=lambda name: errors[name]))
        return row


def smooth(smoothing: Smoothing, source: Source, staging: Staging, listen: Listener) -> Smoothed:
    """for group of sites: statistics → factors → stage; finished ones are taken from `staging`.

    Raises:
        InputError, NumericalError: a tensor is not finite, or scales do not fit their dtype.
    """
    groups = connected(smoothing.sites)
    smoothed = Smoothed(smoothing)
    listen(Progress("smooth", 0, len(groups), groups[0][0].name))
    for done, group in enumerate(groups, 1):
        kept = staging.finished(unit_of(group))
        if not kept:
            settle_group(smoothing, group, source, staging)
        smoothed.take(group, staging)
        listen(Progress("smooth", done, len(groups), group[0].name, kept=kept))
    return smoothed
