"""Smoothing, the stage before rounding: factors for every site, found, tried and folded.

Sites that share a tensor (v_proj is a linear of one and feeds another) are worked on together, one
after the other (run/settle.py). The stage leaves factors behind, not weights: storage/folded.py
folds them into whatever is read after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Source
from ptq_cli.core.progress import Listener, Progress
from ptq_cli.core.report import LayerReport
from ptq_cli.models.sites import Site
from ptq_cli.run.settle import Group, Settling, SiteOutcome
from ptq_cli.storage.folded import FOLDS_FILE, FoldedCheckpoint, folded_checkpoint, write_folds
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes

Fold = tuple[Site, NDArray[np.float32]]


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
    settling: Settling, sites: Sequence[Site], source: Source, staging: Staging
) -> None:
    """Find and judge the factors of a group of connected sites, on statistics of their inputs
    before anything of the group is folded or rounded; stage them."""
    group = Group(settling, sites, source)
    result = group.settle()
    tensors = [as_bytes(site.name, factors) for site, factors in group.folds]
    staging.put(unit_of(sites), tensors, result)


@dataclass
class Smoothed:
    """What the stage has found so far, group by group.

    rtn: of each module, plain rounding of the weight as it was: (rel_err, held-out rel_err)
    compared: of each module, the error of each method that was tried
    """

    settling: Settling
    folds: list[Fold] = field(default_factory=list)
    outcomes: list[SiteOutcome] = field(default_factory=list)
    rtn: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    compared: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def take(self, group: Sequence[Site], staging: Staging) -> list[Fold]:
        """Take in a group that is settled; its folds."""
        unit = unit_of(group)
        result = staging.store.result(unit)
        factors = {t.spec.name: t.data.view(np.float32).copy() for t in staging.store.tensors(unit)}
        folds = [(site, factors[site.name]) for site in group if site.name in factors]
        self.folds += folds
        self.outcomes += [_outcome(entry) for entry in result["sites"]]
        self.rtn |= {module: tuple(pair) for module, pair in result["rtn"].items()}
        self.compared |= result["compared"]
        return folds

    @property
    def checkpoint(self) -> FoldedCheckpoint:
        """The run's checkpoint behind the folds."""
        return folded_checkpoint(self.settling.checkpoint, self.folds)

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """What became of the sites, for the report."""
        return tuple(asdict(outcome) for outcome in self.outcomes)

    def annotate(self, row: LayerReport) -> LayerReport:
        """A row whose baseline is plain rounding of the original weight, not of the smoothed."""
        module, name = row.module, self.settling.smoother.name
        label = f"{name}+{row.method}"
        if row.method == name or not self._folded(module):
            label = row.method
        row = replace(row, method=label)
        if module in self.rtn:
            rel, heldout = self.rtn[module]
            ours = row.rel_err if row.heldout_rel_err is None else row.heldout_rel_err
            plain = rel if heldout is None else heldout
            gain = plain / ours if ours > 0 else None
            row = replace(row, rtn_rel_err=rel, rtn_heldout_rel_err=heldout, gain_vs_rtn=gain)
        if module in self.compared:
            errors = self.compared[module]
            row = replace(row, compared=errors, best=min(errors, key=lambda name: errors[name]))
        return row

    def _folded(self, module: str) -> bool:
        return any(module in o.linears for o in self.outcomes if o.fed_by is not None)

    def write(self, out: Path) -> None:
        """Leave the factors beside the weights: an evaluation needs them."""
        if self.folds:
            write_folds(out / FOLDS_FILE, self.folds)


def _outcome(entry: Mapping[str, Any]) -> SiteOutcome:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return SiteOutcome(**values)


def smooth(
    settling: Settling,
    sites: Sequence[Site],
    source: Source,
    staging: Staging,
    listen: Listener,
) -> Smoothed:
    """for group of sites: statistics → factors → stage; finished ones are taken from `staging`.

    Raises:
        InputError, NumericalError: a tensor is not finite, or scales do not fit their dtype.
    """
    groups = connected(sites)
    smoothed = Smoothed(settling)
    listen(Progress("smooth", 0, len(groups), groups[0][0].name))
    for done, group in enumerate(groups, 1):
        kept = staging.finished(unit_of(group))
        if not kept:
            settle_group(settling, group, source, staging)
        smoothed.take(group, staging)
        listen(Progress("smooth", done, len(groups), group[0].name, kept=kept))
    return smoothed
