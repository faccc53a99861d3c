"""What the tokens do not reach: blocks that predict further tokens, and tensors that the model's
forward does not know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Skipped, Unit
from ptq_cli.core.names import fold_names
from ptq_cli.models.linears import PREDICTOR
from ptq_cli.models.predictors import predictor_tensors
from ptq_cli.plan.select_tensors import UNREACHED
from ptq_cli.storage.checkpoint import Checkpoint


def unreached(
    checkpoint: Checkpoint, source: Source | None, kept: Collection[str]
) -> dict[str, str]:
    """Tensors that the forward on tokens leaves aside, and what is said of them; those of blocks
    that predict further tokens are no such. kept: left alone for another reason"""
    if source is None or not source.in_sequence:
        return {}
    reached = {f"{linear}.weight" for place in source.places.values() for linear in place.linears}
    reached |= {*kept, *predictor_tensors(checkpoint.tensors, checkpoint.config)}
    return {name: UNREACHED for name in checkpoint.tensors if name not in reached}


def unreached_warnings(
    units: Iterable[Unit],
    skipped: Iterable[Skipped],
    predictors: Collection[str],
    source: Source | None,
) -> list[str]:
    """What is to be said of what no tokens reach. predictors: tensors of blocks that predict
    further tokens"""
    blind = [
        layer.module
        for unit in units
        for layer in unit.layers
        if unit.site is None and layer.tensor in predictors
    ]
    warnings = []
    if blind and source is not None:
        warnings.append(
            f"{len(blind)} layers of multi-token prediction, which no token reaches, are rounded"
            f" to nearest: {fold_names(blind)}"
        )
    dense = [entry.tensor for entry in skipped if entry.reason in (UNREACHED, PREDICTOR)]
    if dense and source is not None and source.in_sequence:
        warnings.append(
            f"{len(dense)} tensors that the model's forward does not have stay in floating point:"
            f" {fold_names(dense)}"
        )
    return warnings


def without_input_scales(
    layers: Sequence[Layer], predictors: Collection[str], source: Source | None
) -> tuple[list[Layer], list[Skipped]]:
    """The layers, and those of blocks that predict further tokens which would need a scale of their
    inputs that nothing tells: these stay dense."""
    sites = () if source is None else source.sites.values()
    known = {linear for site in sites for linear in site.linears}
    kept, dense = [], []
    for layer in layers:
        if layer.tensor in predictors and layer.calibrated_inputs and layer.module not in known:
            dense.append(Skipped(layer.tensor, layer.full_shape, layer.dtype, PREDICTOR))
        else:
            kept.append(layer)
    return kept, dense
