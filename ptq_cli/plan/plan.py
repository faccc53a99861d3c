"""The plan: from headers and settings alone, everything that a run will do.

Which tensors are quantized, on which grid, with whose statistics; what is copied and why; what it
will weigh. Every mistake a user can make is found here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptq_cli.calibration.sites import model_sites, transposed_tensors
from ptq_cli.calibration.source import Source
from ptq_cli.core.grid import Activation
from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.layer import GgufTypes, Layer, Misfit, Plan, Skipped
from ptq_cli.core.plugins import Format, Method
from ptq_cli.models.linears import dense_modules, left_alone, module_tree
from ptq_cli.models.predictors import predictor_tensors
from ptq_cli.plan.experts import expert_misfits
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.hints import Unread
from ptq_cli.plan.kv_cache import plan_kv_cache
from ptq_cli.plan.layers import (
    check_fisher,
    check_layers,
    check_names,
    make_layer,
    mirrored_where_held,
    of_type,
    unheld,
)
from ptq_cli.plan.scale_dtypes import with_scale_dtypes
from ptq_cli.plan.select_tensors import choose_tensors
from ptq_cli.plan.tensor_types import tensor_types
from ptq_cli.plan.units import check_calibrated, plan_units, plan_warnings
from ptq_cli.plan.unreached import unreached, unreached_warnings, without_input_scales
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folder import container_of


def make_plan(
    checkpoint: Checkpoint,
    method: Method,
    settings: GridSettings,
    method_settings: Any,
    fmt: Format,
    source: Source | None,
    *,
    missing: str = "error",
    activation: Activation | None = None,
) -> Plan:
    """Make the plan of a quantization.

    activation: how the layers' inputs are rounded when they run, None: not at all
    source: where statistics come from; None: there is no calibration
    missing: what a linear without statistics gets: "error" or "rtn"

    Raises:
        InputError: whatever cannot work, with names and numbers.
    """
    mixed = tensor_types(checkpoint, settings, fmt, source)
    included = left_alone(checkpoint.specs, checkpoint.config)
    beyond = unreached(checkpoint, source, included)
    chosen, skipped = choose_tensors(checkpoint, settings, mixed, beyond)
    sites = model_sites(checkpoint, settings.family, settings.sites).sites
    transposed, reordered = transposed_tensors(sites), method.reorders(method_settings)
    wanted = [
        make_layer(tensor, settings, fmt, checkpoint, transposed, reordered, activation)
        for tensor in chosen
    ]
    wanted = [of_type(layer, mixed) for layer in wanted]
    wanted = with_scale_dtypes(wanted, settings, fmt, checkpoint, sites)
    predictors = predictor_tensors(checkpoint.specs, checkpoint.config)
    wanted, bare = without_input_scales(wanted, predictors, source)
    unasked = {} if mixed.mix else included
    kept = check_layers(wanted, fmt, settings, sites, unasked, _unread_of(checkpoint))
    layers = [mirrored_where_held(x, fmt) for x in wanted if x.module not in kept]
    skipped += [*bare, *(unheld(layer, fmt) for layer in wanted if layer.module in kept)]
    types = mixed.told_of(entry.tensor for entry in skipped)
    left_out = _check_writable(checkpoint, layers, skipped, fmt, types)
    if method.needs_fisher(method_settings):
        check_fisher(layers, source)
    cache = plan_kv_cache(checkpoint, settings, fmt, source)
    free = {*included, *beyond}
    units = plan_units(layers, method, source, missing, free, sites, predictors)
    check_calibrated(units, source)
    blind = unreached_warnings(units, skipped, predictors, source)
    before = sum(tensor.spec.nbytes for tensor in checkpoint.tensors.values())
    return Plan(
        method=method.name,
        settings=(settings, method_settings),
        format=fmt.name,
        units=units,
        skipped=tuple(skipped),
        warnings=(*checkpoint.warnings, *left_out, *blind, *plan_warnings(units, method, source)),
        bytes_before=before,
        bytes_after=before + _growth(checkpoint, layers, fmt, cache),
        kv_cache=cache,
        types=types,
    )


def _unread_of(checkpoint: Checkpoint) -> Unread:
    """Gives modules that a format could hold, but that no runtime reads from it."""
    fused = {name for name, tensor in checkpoint.tensors.items() if tensor.part_of is not None}

    def unread(layers: Sequence[Layer], fmt: Format) -> Mapping[str, Misfit]:
        return expert_misfits(layers, fmt, checkpoint.config, fused)

    return unread


def _check_writable(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    skipped: Sequence[Skipped],
    fmt: Format,
    types: GgufTypes,
) -> tuple[str, ...]:
    """Refuse what could not be declared, stored or named: raises InputError. Else what is to be
    said of tensors that are left dense."""
    fmt.config(layers, dense_modules(skipped), module_tree(checkpoint.config))
    dense = [entry.tensor for entry in skipped]
    left_out = container_of(fmt).check(checkpoint, layers, dense, types)
    check_names(checkpoint, layers, skipped, fmt)
    return left_out


def _growth(
    checkpoint: Checkpoint, layers: Sequence[Layer], fmt: Format, cache: KVCache | None
) -> int:
    """Bytes by which a checkpoint grows where layers are packed: below 0 as a rule."""
    grown = sum(spec.nbytes for spec in cache.specs()) if cache else 0
    for layer in layers:
        grown += sum(spec.nbytes for spec in fmt.specs(layer))
        grown -= checkpoint.tensors[layer.tensor].spec.nbytes
    if checkpoint.gguf is not None and not container_of(fmt).filled:  # all else is copied
        rounded = {layer.tensor for layer in layers}
        for name in checkpoint.tensors.keys() - rounded:
            grown += checkpoint.extent(name) - checkpoint.tensors[name].spec.nbytes
    return grown
