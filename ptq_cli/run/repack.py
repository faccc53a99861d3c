"""Repacking: the codes of a quantized folder in another layout, without loss or not at all.

Every layer is converted once before anything is written, to know that it fits, and again when it is
staged, unless an interrupted run has. A layer fits where the target's tensors decode to the same
codes, scales, zeros, groups and offsets. What does not fit is refused, every layer with its reason,
or (`on_misfit` "keep") becomes a dense tensor in the model's dtype and is declared so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import ALL_TOLD, Layer, Misfit, Plan, Skipped, Unit
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Format
from ptq_cli.core.progress import Progress
from ptq_cli.core.report import LayerReport, RunReport
from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.models.experts import every_expert_is_linear, experts_load_alone
from ptq_cli.models.family import Config
from ptq_cli.models.linears import dense_modules, group_modules, module_tree
from ptq_cli.numerics.output_errors import measure
from ptq_cli.numerics.rounding import grid_by_zeros
from ptq_cli.plan.experts import expert_misfits
from ptq_cli.plan.kv_cache import check_kv_cache
from ptq_cli.plan.layers import check_misfits, keep_together, unheld
from ptq_cli.plan.scale_dtypes import fitting, layers_to_repack, with_scales
from ptq_cli.registry import format_named
from ptq_cli.report.report import make_report, row_from_json
from ptq_cli.run.convert import convert
from ptq_cli.run.in_scheme import in_scheme
from ptq_cli.run.output import run_documents
from ptq_cli.run.quantize_unit import layer_row
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.digest import digest_of
from ptq_cli.storage.experts import one_by_one
from ptq_cli.storage.folder import Assembly, container_of, write_folder
from ptq_cli.storage.gguf_model import check_model
from ptq_cli.storage.quantized import QuantizedFolder
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, as_bytes

_DECLARATIONS = ("quantization_config", "quantization")


@dataclass(frozen=True)
class RepackSettings:
    """What may be chosen where the codes are given. None is "as it is".

    scheme: another one of small floats with the same levels; ""
    """

    format: str = "ptq"
    group_size: int | None = None
    scale_dtype: str = "auto"
    on_misfit: str = "error"
    scheme: str = ""


@dataclass(frozen=True)
class Repack:
    """A planned repacking. `wanted` are the layers as the target has them, `kept` those that become
    dense."""

    folder: QuantizedFolder
    fmt: Format
    plan: Plan
    wanted: Mapping[str, Layer]
    kept: frozenset[str]


def plan_repack(
    folder: QuantizedFolder, fmt: Format, settings: RepackSettings, *, trial: bool = True
) -> Repack:
    """Convert every layer for a trial. Raises InputError where one does not fit.

    trial: without it, only what headers say is known: enough to see that there is nothing to do
    """
    if folder.kv_cache is not None:
        check_kv_cache(fmt)
    grids = _grids(folder, fmt) if trial else {}
    config = folder.checkpoint.config
    if every_expert_is_linear(config, fmt.name):
        folder = replace(folder, checkpoint=one_by_one(folder.checkpoint))
    wanted, misfits = {}, {}
    layers = [
        replace(layer, grid=grids.get(layer.module, layer.grid))
        for layer in layers_to_repack(folder)
    ]
    if settings.scheme:
        layers = in_scheme(layers, settings.scheme, folder, fmt)
    for layer in layers:
        target = _target(layer, fmt, settings)
        misfit = fmt.misfit(target) or _mirrored_misfit(target, fmt)
        if misfit is None and trial:
            try:
                target = _tried(folder.load(layer.module), target, fmt)
            except InputError as error:
                misfit = Misfit(error.message.removeprefix(f"{layer.module}: "), error.hint)
        if misfit is not None:
            misfits[layer.module] = misfit
        wanted[layer.module] = target
    misfits = {**_unread_experts(list(wanted.values()), fmt, config), **misfits}
    if trial:
        options = partial(_helping, folder, misfits)
        check_misfits(fmt, misfits, len(wanted), settings.on_misfit, options)
    kept = frozenset(keep_together(group_modules(list(wanted)), misfits))
    packed = [layer for module, layer in wanted.items() if module not in kept]
    skipped = _skipped(folder, wanted, kept, fmt)
    left_out: tuple[str, ...] = ()
    if trial:
        fmt.config(packed, dense_modules(skipped), module_tree(folder.checkpoint.config))
        dense = [entry.tensor for entry in skipped]
        left_out = container_of(fmt).check(folder.checkpoint, packed, dense, ALL_TOLD)
    plan = Plan(
        method="repack",
        settings=(settings,),
        format=fmt.name,
        units=tuple(Unit(layer.module, (layer,), None, 0) for layer in packed),
        skipped=skipped,
        warnings=(*folder.checkpoint.warnings, *left_out),
        bytes_before=sum(t.spec.nbytes for t in folder.checkpoint.tensors.values()),
        bytes_after=sum(s.nbytes for layer in packed for s in fmt.specs(layer))
        + sum(wanted[m].size * NUMPY_DTYPES[wanted[m].dtype].itemsize for m in kept)
        + sum(folder.checkpoint.tensors[n].spec.nbytes for n in folder.untouched())
        + (folder.kv_cache.nbytes if folder.kv_cache else 0),
        kv_cache=folder.kv_cache,
    )
    return Repack(folder, fmt, plan, wanted, kept)


def _tried(weight: QuantizedWeight, target: Layer, fmt: Format) -> Layer:
    """The target, which holds the weight: with offsets of its own where whole zeros cannot say them
    and the format has such. Raises InputError where it does not hold it."""
    try:
        convert(weight, target, fmt)
    except InputError:
        own = replace(target, grid=replace(target.grid, own_offsets=True))
        if weight.offsets is None or target.grid.own_offsets or fmt.misfit(own) is not None:
            raise
        convert(weight, own, fmt)
        return own
    return target


def _unread_experts(layers: Sequence[Layer], fmt: Format, config: Config) -> dict[str, Misfit]:
    """Experts that no runtime reads from this format. Raises InputError where none reads them dense
    either: they came as one tensor of all."""
    unread = expert_misfits(layers, fmt, config)
    if unread and not experts_load_alone(config):
        (reason,) = {misfit.reason for misfit in unread.values()}
        raise InputError(
            f"{reason}: {fold_names(unread)}",
            hint="--format ptq, or start from the float model with --on-misfit keep",
        )
    return unread


def may_become(folder: QuantizedFolder, fmt: Format) -> bool:
    """Whether headers and config.json say that it can be repacked into a format."""
    try:
        plan = plan_repack(folder, fmt, RepackSettings(fmt.name), trial=False).plan
    except InputError:
        return False
    scales = ((layer, folder.layers[layer.module].grid.scale_dtype) for layer in plan.layers)
    same = all(layer.grid.scale_dtype in (own, "float32") for layer, own in scales)
    if len(plan.layers) < len(folder.layers) or not same:
        return False
    try:
        if fmt.container == "gguf":
            check_model(folder.checkpoint, plan.layers, [entry.tensor for entry in plan.skipped])
    except InputError:
        return False
    return True


def _helping(folder: QuantizedFolder, misfits: Mapping[str, Misfit]) -> list[str]:
    """What helps, a format only if it could hold the folder."""
    found: dict[str, None] = {}
    holding: dict[str, bool] = {}
    for module, misfit in misfits.items():
        for option in re.split(r",? or (?=--|quantize)", misfit.hint or ""):
            if name := re.match(r"--format ([\w-]+)", option):
                if name[1] not in holding:
                    holding[name[1]] = may_become(folder, format_named(name[1]))
                if holding[name[1]]:
                    found[option] = None
            elif option:
                found[_repack_hint(option, folder.layers[module])] = None
    return list(found)[:2]


def _repack_hint(option: str, layer: Layer) -> str:
    """What helps a repacking: what it cannot change is chosen when the float model is quantized."""
    word, _, value = option.partition(" ")
    if word == "--ignore":
        option = f"leave {value} out of --include"
    if word == "--group-size" and value.lstrip("-").isdecimal():
        sizes = (layer.grid.group_size, int(value))
        own, asked = (size if size > 0 else layer.shape[1] for size in sizes)
        if own % asked == 0:  # groups are split without loss, and seldom joined
            return option
    possible = word == "--scale-dtype" or not word.startswith(("--", "leave"))
    late = "when the float model is quantized"
    return option if possible or option.endswith(late) else f"{option} {late}"


def _skipped(
    folder: QuantizedFolder, wanted: Mapping[str, Layer], kept: frozenset[str], fmt: Format
) -> tuple[Skipped, ...]:
    untouched = [folder.checkpoint.tensors[name].spec for name in folder.untouched()]
    dense = [Skipped(spec.name, spec.shape, spec.dtype, "not quantized") for spec in untouched]
    lost = [layer for module, layer in wanted.items() if module in kept]
    return (*dense, *(unheld(layer, fmt) for layer in lost))


def _grids(folder: QuantizedFolder, fmt: Format) -> dict[str, Grid]:
    """The grid of each module. Some layouts do not say that a grid is symmetric; the zeros do, if
    those of all layers agree."""
    stated = {module: layer.grid for module, layer in folder.layers.items()}
    by_zeros = dict(stated)
    for module, layer in folder.layers.items():
        if not layer.grid.sym and not layer.grid.own_offsets:
            weight = folder.load(module)
            grid = by_zeros[module] = grid_by_zeros(weight)
            lost = _mirrored_misfit(replace(layer, grid=grid), fmt)
            if weight.offsets is not None or not grid.sym or lost:
                return stated
    return by_zeros


def _mirrored_misfit(layer: Layer, fmt: Format) -> Misfit | None:
    """Why a format cannot hold a layer whose groups may be mirrored, or None."""
    if not layer.grid.mirrored or fmt.mirrored(layer):
        return None
    middle = layer.grid.mid_code
    return Misfit(
        f"{fmt.name} cannot hold mirrored groups (zeros of {middle - 1} beside {middle})",
        f"quantize the float model again with --format {fmt.name}",
    )


def _target(layer: Layer, fmt: Format, settings: RepackSettings) -> Layer:
    grid = layer.grid
    if settings.group_size is not None:
        grid = replace(grid, group_size=settings.group_size)
    target = replace(layer, grid=grid)
    if settings.scale_dtype != "auto":
        return replace(target, grid=replace(grid, scale_dtype=settings.scale_dtype))
    if not grid.multiples and fmt.misfit(target) is not None:
        return fitting(with_scales(target, fmt.scale_dtype(layer.dtype)), fmt, otherwise=target)
    return target


def run_repack(
    job: Repack, inputs: Mapping[str, str], staging: Staging, options: RunOptions
) -> RunReport:
    """for layer: decode → encode → prove → stage; then the output gets its name. Raises PtqError.

    inputs: fingerprints of what is read, for quantization.json
    """
    begin = time.perf_counter()
    rows: list[LayerReport] = []
    total, weights, work = len(job.plan.layers), sum(x.size for x in job.plan.layers), 0
    staging.check_space(job.plan.bytes_after, job.plan.bytes_after)
    for module, layer in job.wanted.items():
        kept = _stage(job, layer, staging)
        if module in job.kept:
            continue
        rows.append(row_from_json(staging.store.result(module)))
        work += layer.size
        options.listen(Progress("repack", len(rows), total, module, work, weights, kept=kept))
    report = make_report("pack", job.plan, rows, time.perf_counter() - begin)
    chosen = {key: value for key, value in report.settings.items() if value is not None}
    report = replace(report, settings=chosen)
    assembly = _assembly(job, staging, report, inputs)
    source = job.folder.checkpoint
    write_folder(staging.out, assembly, source, options.max_shard, listen=options.listen)
    staging.publish()
    return report


def _stage(job: Repack, layer: Layer, staging: Staging) -> bool:
    """Convert a layer and keep what comes of it, its tensors and its row; True where a run before
    this one has."""
    folder, module = job.folder, layer.module
    names = [spec.name for spec in folder.fmt.specs(folder.layers[module])]
    key = {"tensor": {name: digest_of(folder.checkpoint.read_bytes(name)) for name in names}}
    if staging.store.reusable(module, key):
        return True
    weight = folder.load(module)
    if module in job.kept:
        values: Array = weight.dequantized().astype(NUMPY_DTYPES[layer.dtype])
        dense = as_bytes(layer.tensor, values.reshape(layer.full_shape))
        staging.store.put(module, key, [dense], None)
        return False
    tensors, back = convert(weight, layer, job.fmt)
    row = _row(layer, weight, back, job.fmt)
    packed = [as_bytes(name, values) for name, values in tensors.items()]
    staging.store.put(module, key, packed, asdict(row))
    return False


def _row(layer: Layer, before: QuantizedWeight, after: QuantizedWeight, fmt: Format) -> LayerReport:
    """Measured against the folder that was repacked: plain zeros, but for offsets made exact."""
    found = measure(before.dequantized(), after)
    exact = before.offsets is not None and after.offsets is None
    notes = ("zeros · scales are exact again, they were rounded",) if exact else ()
    row = layer_row(layer, fmt, found, found, None)
    return replace(row, method=layer.method or "repack", notes=notes)


def _assembly(
    job: Repack, staging: Staging, report: RunReport, inputs: Mapping[str, str]
) -> Assembly:
    """The staged layers in the order of what was read, and what else goes into the folder."""
    folder, layers = job.folder, {layer.module: layer for layer in job.plan.layers}
    owner = {
        spec.name: layer.module
        for layer in folder.layers.values()
        for spec in folder.fmt.specs(layer)
    }
    parts: dict[str, Sequence[Bytes | StoredTensor]] = {}
    for name in folder.checkpoint.tensors:
        module = owner.get(name)
        if module is None:
            parts[name] = [folder.checkpoint.copyable(name)]
        else:
            part = module if module in layers else job.wanted[module].tensor
            parts.setdefault(part, staging.store.tensors(module))
    config = {k: v for k, v in folder.checkpoint.config.items() if k not in _DECLARATIONS}
    documents = run_documents(job.plan, report, inputs, layers.values())
    documents["quantization.json"]["from"] = folder.fmt.name
    if config:
        documents["config.json"] = config
    dense = dense_modules(job.plan.skipped)
    own, said = list(parts.items()), staging.said(documents["report.json"])
    cache = folder.kv_cache
    return Assembly(own, layers, dense, job.fmt, documents, config, cache, alone=said)
