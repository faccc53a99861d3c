"""The sites of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptq_cli.models.detect import Sites, find_sites
from ptq_cli.models.recipe import merge_sites, recipe_sites
from ptq_cli.models.sites import Site
from ptq_cli.storage.checkpoint import Checkpoint


def model_sites(
    checkpoint: Checkpoint, family: str = "", named: Sequence[Mapping[str, Any]] = ()
) -> Sites:
    """The sites of a model: those a recipe names, and those its family's table tells.

    Raises:
        InputError: a recipe's family or sites do not fit the checkpoint.
    """
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    found = find_sites(specs, checkpoint.config or None, family or None)
    if not named:
        return found
    return replace(found, sites=merge_sites(found.sites, recipe_sites(named, specs)))


def transposed_tensors(sites: Sequence[Site]) -> frozenset[str]:
    """Tensors that are stored [in_features, out_features]."""
    linears = (linear for site in sites for linear in site.linears)
    return frozenset(linear.tensor for linear in linears if linear.transposed)
