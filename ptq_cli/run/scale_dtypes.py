"""Scales that do not fit the dtype they are stored in: that shows only when weights are read.

A layer whose scales are too small gets the next dtype of a wider range that its format holds, and
with it those that share its input. Where there is none or another was asked for, or where scales
are too large, the run is refused or the layer is left dense (`on_misfit`). The run then begins anew
with what is finished; what was found is kept in the work folder, so that a run that goes on after a
kill plans as this one did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ptq_cli.calibration.sites import model_sites
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.names import fold_names
from ptq_cli.errors import InputError
from ptq_cli.models.linears import dense_modules, group_modules, module_tree
from ptq_cli.numerics.scales import ScaleMisfit, ScaleOverflow
from ptq_cli.plan.layers import unheld
from ptq_cli.plan.mixes import is_mix
from ptq_cli.plan.scale_dtypes import BY_RANGE, is_auto, with_scales
from ptq_cli.run.nearest import round_layer
from ptq_cli.run.work import Quantization
from ptq_cli.storage.staging import Staging

DENSE = "dense"
_UNIT = "scale dtypes"  # no module's name

Found = Mapping[str, str]  # module -> the dtype of its scales, or DENSE


def found_before(staging: Staging) -> Found:
    """What an interrupted run has found."""
    return dict(staging.store.result(_UNIT)) if staging.finished(_UNIT) else {}


def find_scale_dtypes(
    job: Quantization, error: ScaleMisfit, staging: Staging, before: Found
) -> Found:
    """The dtypes of scales that were not right, those found before included.

    job: as it was when it met the error

    Raises:
        InputError: nothing holds the scales of a layer, or what was asked for does not.
    """
    if error.module not in job.layers:
        raise error
    dtypes: dict[str, str] = {}
    refused: dict[str, tuple[ScaleMisfit, Layer | None]] = {}
    for layer in job.layers.values():
        misfit = error if layer.module == error.module else _misfit(job, layer)
        if misfit is None:
            continue
        free = is_auto(job.grid, job.checkpoint.tensors[layer.tensor]) and not isinstance(
            misfit, ScaleOverflow
        )
        tried = {other: _misfit(job, other) for other in _wider(job, layer)}
        fitting = [other for other, still in tried.items() if still is None]
        if fitting and free:
            dtypes[layer.module] = fitting[0].grid.scale_dtype
        elif job.grid.on_misfit == "keep":
            dtypes[layer.module] = DENSE
        else:
            widest = [still for still in tried.values() if still is not None and free][-1:]
            refused[layer.module] = (widest or [misfit])[0], fitting[-1] if fitting else None
    if refused or not dtypes:
        raise _refusal(job, error, refused)
    found = {**before, **_with_those_beside(job, dtypes)}
    if all(found.get(module) == DENSE for module in job.layers):
        raise _refusal(job, error, {})
    for unit in job.plan.units:
        if any(layer.module in found for layer in unit.layers):
            staging.store.drop(unit.name)
    staging.put(_UNIT, [], found)
    return found


def _misfit(job: Quantization, layer: Layer) -> ScaleMisfit | None:
    """Why the layer's scales do not fit, if they do not."""
    try:
        weights = replace(layer, activation=None)
        round_layer(job.checkpoint.weight(layer), weights, job.rounding.fmt, None)
    except ScaleMisfit as error:
        return error
    return None


def _wider(job: Quantization, layer: Layer) -> Iterator[Layer]:
    """The layer with scales of each wider range that the format holds."""
    if layer.grid.scale_dtype not in BY_RANGE:
        return
    for dtype in BY_RANGE[BY_RANGE.index(layer.grid.scale_dtype) + 1 :]:
        other = with_scales(layer, dtype)
        if job.rounding.fmt.misfit(other) is None:
            yield other


def _with_those_beside(job: Quantization, dtypes: Found) -> Found:
    """The same with the linears that share an input with one of them: runtimes fuse these."""
    sites = model_sites(job.checkpoint, job.grid.family, job.grid.sites).sites
    found = dict(dtypes)
    for group in group_modules(job.layers, sites):
        own = [dtypes[module] for module in group if module in dtypes]
        if DENSE in own:
            found |= dict.fromkeys(group, DENSE)
        elif own:
            for layer in (job.layers[module] for module in group):
                if is_auto(job.grid, job.checkpoint.tensors[layer.tensor]):
                    found[layer.module] = max(*own, layer.grid.scale_dtype, key=BY_RANGE.index)
    return found


def _refusal(
    job: Quantization,
    error: ScaleMisfit,
    refused: Mapping[str, tuple[ScaleMisfit, Layer | None]],
) -> InputError:
    """The error of a run that cannot go on, with what would help.

    refused: why a layer's scales do not fit, and the layer with such as would, if there are any
    """
    layers, fmt = job.layers, job.rounding.fmt
    first, fitting = refused.get(error.module) or next(iter(refused.values()), (error, None))
    large = isinstance(first, ScaleOverflow)
    hints = [] if first.hint is None or first.hint.startswith("--scale-dtype") else [first.hint]
    if is_mix(job.grid.scheme):  # whose types have scales of their own
        hints = [f"--tensor-type {first.module}=F32"]
    elif fitting is not None:
        hints.append(f"--scale-dtype {fitting.grid.scale_dtype}")
    elif fmt.name != "ptq" and layers[first.module].grid.scale_dtype == "float16":
        hints.append("--format ptq" + (" --scale-dtype float32" if large else ""))
    if 0 < len(refused) < len(layers):
        hints.append("--on-misfit keep, which leaves such layers dense")
    more = len(refused) - 1
    others = f" (and {more} layers more: {fold_names(list(refused))})" if more > 0 else ""
    hint = ", or ".join(hints) or "--ignore leaves a tensor dense"
    return InputError(first.message + others, hint=hint)


def with_scale_dtypes(job: Quantization, found: Found) -> Quantization:
    """The job with these layers' scales in other dtypes, or these layers left dense."""
    if not found:
        return job

    def changed(layers: Mapping[str, Layer]) -> dict[str, Layer]:
        return {
            key: with_scales(layer, found.get(layer.module, layer.grid.scale_dtype))
            for key, layer in layers.items()
            if found.get(layer.module) != DENSE
        }

    smoothing = job.smoothing
    if smoothing is not None:
        smoothing = replace(smoothing, layers=changed(smoothing.layers))
    layers = changed({layer.module: layer for layer in job.plan.layers})
    return replace(job, plan=_changed_plan(job, found, layers), smoothing=smoothing)


def _changed_plan(job: Quantization, found: Found, layers: Mapping[str, Layer]) -> Plan:
    plan, fmt, tensors = job.plan, job.rounding.fmt, job.checkpoint.tensors
    dense = [layer for layer in plan.layers if layer.module not in layers]
    units = [
        replace(unit, layers=tuple(layers[x.module] for x in unit.layers if x.module in layers))
        for unit in plan.units
    ]
    skipped = (*plan.skipped, *(unheld(layer, fmt) for layer in dense))
    if dense:  # refuses what cannot be declared
        fmt.config(
            list(layers.values()), dense_modules(skipped), module_tree(job.checkpoint.config)
        )
    size = plan.bytes_after + sum(tensors[layer.tensor].spec.nbytes for layer in dense)
    for sign, several in ((-1, plan.layers), (1, layers.values())):
        size += sign * sum(spec.nbytes for layer in several for spec in fmt.specs(layer))
    by_dtype = defaultdict(list)
    for layer in plan.layers:
        if layer.module in found:
            by_dtype[found[layer.module]].append(layer.module)
    said = [f"{_said(dtype)}: {fold_names(names)}" for dtype, names in by_dtype.items()]
    return replace(
        plan,
        units=tuple(unit for unit in units if unit.layers),
        skipped=skipped,
        warnings=(*plan.warnings, *said),
        bytes_after=size,
    )


def _said(dtype: str) -> str:
    if dtype == DENSE:
        return "left dense, since their scales do not fit the format"
    return f"scales that do not fit a narrower dtype are {dtype}"
