"""Units of work: which layers go together, with whose statistics, and the memory they take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ptq_cli.calibration.sites import files_needed
from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Unit
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Method
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.formats.fused import fused_groups
from ptq_cli.models.linears import group_modules
from ptq_cli.models.sites import Site
from ptq_cli.models.ties import is_embedding
from ptq_cli.numerics.output_errors import ROWS_AT_ONCE
from ptq_cli.numerics.statistics import HELDOUT_LIMIT, SAMPLE_LIMIT

# Inputs held out, as they are stored and in float32, and the sample.
_HELD_ROWS = HELDOUT_LIMIT * 2 + SAMPLE_LIMIT


def plan_units(
    layers: Sequence[Layer],
    method: Method,
    source: Source | None,
    missing: str,
    included: Collection[str],
    sites: Sequence[Site],
    beyond: Collection[str] = (),
) -> tuple[Unit, ...]:
    """The units of a run: linears that share their input, with one site's statistics, together.

    missing: what a layer without statistics gets: "error" or "rtn"
    included: tensors that are left alone unless asked for, which may lack statistics
    beyond: tensors that no tokens reach, which may lack them too

    Raises:
        InputError: layers without statistics, or with those of another width.
    """
    by_module = {layer.module: layer for layer in layers}
    site_of = sites_of(by_module, source)
    lost = [
        layer.module
        for layer in layers
        if source is not None and layer.module not in site_of
        if layer.tensor not in included and layer.tensor not in beyond
    ]
    if lost and missing == "error" and method.needs_hessian and source is not None:
        surplus = f"; left over: {fold_names(source.surplus)}" if source.surplus else ""
        raise InputError(
            f"{source.name}: no statistics for {len(lost)} layers: {fold_names(lost)}{surplus}",
            hint="calibrate them, leave them out with --ignore, or allow --fallback rtn"
            + files_needed(lost),
        )
    units = []
    for group in group_modules(by_module, sites):
        parts: dict[tuple[str | None, int, bool], list[Layer]] = {}
        for module in group:
            layer = by_module[module]  # what a method prepares once may depend on the groups
            parts.setdefault((site_of.get(module), *layer.grid.grouping), []).append(layer)
        for (site, *_), members in parts.items():
            blind = is_embedding(members[0].module) or members[0].tensor in beyond
            units.append(_unit(site, members, method, source, blind))
    units = _with_those_beside(units)
    if source is not None and source.in_sequence:
        order = {site: place for place, site in enumerate(source.sites)}
        units.sort(key=lambda unit: order.get(unit.site or "", len(order)))
    return tuple(units)


def _with_those_beside(units: Sequence[Unit]) -> list[Unit]:
    """The units, each with the layers of others that runtimes fuse with its own under one global
    scale: those of one input whose statistics came in files of their own."""
    known = {
        layer.module: (layer, unit.name)
        for unit in units
        for layer in unit.layers
        if layer.grid.scale_dtype == "e4m3"
    }
    beside: dict[str, dict[str, Layer]] = {}
    for group in fused_groups(known):
        for unit in {known[module][1] for module in group}:
            others = {module: known[module][0] for module in group if known[module][1] != unit}
            beside.setdefault(unit, {}).update(others)
    return [replace(unit, beside=tuple(beside.get(unit.name, {}).values())) for unit in units]


def check_calibrated(units: Iterable[Unit], source: Source | None) -> None:
    """Refuse layers whose inputs are rounded with a scale that nothing tells."""
    diagonal = source is not None and source.diagonal
    bare = [
        layer
        for unit in units
        for layer in unit.layers
        if (unit.site is None or diagonal) and layer.calibrated_inputs
    ]
    if not bare:
        return
    inputs = bare[0].activation
    assert inputs is not None
    other = "--activation-scheme dynamic-token"
    if inputs.levels != "integer":
        other = "--scheme NVFP4A16" if inputs.dynamic else "--scheme FP8_DYNAMIC"
    names = fold_names([layer.module for layer in bare])
    raise InputError(
        f"no statistics to take scales of the inputs from for {len(bare)} layers: {names}",
        hint=f"calibrate them, leave them out with --ignore, or {other}",
    )


def _unit(
    site: str | None, members: list[Layer], method: Method, source: Source | None, blind: bool
) -> Unit:
    """blind: it has no inputs (an embedding's rows are looked up), so all columns count alike"""
    nearest = None
    if site is None and method.needs_hessian:
        nearest = "no calibration" if source is None else "no statistics for it"
        if source is not None and blind:
            nearest = None
        members = [replace(layer, reordered=False) for layer in members]
    return Unit(
        name=members[0].module,
        layers=tuple(members),
        site=site,
        memory=_unit_memory(site, members, method, source),
        nearest=nearest,
    )


def _unit_memory(
    site: str | None, members: Sequence[Layer], method: Method, source: Source | None
) -> int:
    """Bytes that a unit takes at most, its process' own 60 MB aside.

    A layer: its weight in float32, two roundings of it, packed and unpacked, 11 bytes each; rows
    of weight and error while it is measured. The site: its Hessian, inputs that were held out or
    sampled, the same of the drift of the inputs and of the stream that the outputs are added to,
    and before anything else the sums it is made of.
    """
    columns = members[0].shape[1]
    drift = site is not None and source is not None and source.drifts
    most = max(
        method.memory(layer.shape, layer.grid, drift) + 11 * layer.size + 8 * ROWS_AT_ONCE * columns
        for layer in members
    )
    packed = sum(layer.size for layer in members)
    if site is None or source is None:
        return most + packed
    statistics = columns * (columns + _HELD_ROWS)
    if drift:
        stream = members[0].shape[0] if source.places[site].adds else 0
        statistics += (columns + stream) * (columns + HELDOUT_LIMIT)
    return packed + max(source.load_memory(site), most + 4 * statistics)


def sites_of(layers: Mapping[str, Layer], source: Source | None) -> dict[str, str]:
    """The site of each module that has statistics. Raises InputError where the widths differ."""
    if source is None:
        return {}
    of_linear = {linear: site for site, info in source.sites.items() for linear in info.linears}
    found = {}
    for module, layer in layers.items():
        site = of_linear.get(module)
        if site is None or len(layer.full_shape) != 2:
            continue
        width = source.sites[site].in_features
        if width != layer.shape[1]:
            raise InputError(
                f"{source.name}: site {site} has in_features {width}, but {layer.tensor}"
                f" {list(layer.full_shape)} has {layer.shape[1]}",
                hint="these statistics belong to another model",
            )
        found[module] = site
    return found


def plan_warnings(units: Sequence[Unit], method: Method, source: Source | None) -> list[str]:
    if not method.needs_hessian:
        return _without_importance(units, source)
    if source is None:
        return [
            "NO CALIBRATION: every layer is rounded to nearest. Give --calibration FILE or"
            " --activations DIR; --require-calibration makes this an error"
        ]
    nearest = [layer.module for unit in units for layer in unit.layers if unit.nearest]
    warnings = []
    if nearest:
        warnings.append(
            f"{len(nearest)} layers have no statistics and are rounded to nearest:"
            f" {fold_names(nearest)}"
        )
    used = [source.sites[unit.site] for unit in units if unit.site is not None]
    return [*warnings, *few_tokens(used)]


def _without_importance(units: Sequence[Unit], source: Source | None) -> list[str]:
    """What an importance matrix lacks, where nothing needs it."""
    bare = [layer.module for unit in units if unit.site is None for layer in unit.layers]
    if source is None or not source.diagonal or not bare:
        return []
    return [
        f"{source.name}: no entries for {len(bare)} layers, which are rounded without:"
        f" {fold_names(bare)}"
    ]


def few_tokens(sites: Iterable[SiteInfo]) -> list[str]:
    """A warning where sites were calibrated on fewer tokens than they have columns."""
    few = [f"{info.site}: {note}" for info in sites for note in few_tokens_note(info)]
    more = f" (and {len(few) - 1} sites more)" if len(few) > 1 else ""
    return [note + more for note in few[:1]]


def few_tokens_note(site: SiteInfo | SiteStatistics) -> list[str]:
    """Notes where too few tokens reach an expert, or fewer stand behind a site's statistics than it
    has columns."""
    notes = []
    if site.own_tokens is not None:
        about = "about " if isinstance(site, SiteInfo) else ""  # the plan knows the average
        own = f"{about}{site.own_tokens} tokens reach it, too few to calibrate on"
        notes.append(f"{own}: it shares the statistics of all experts of its block")
    if site.n_tokens < site.in_features:
        columns = f"fewer than its {site.in_features} columns"
        notes.append(f"calibrated on {site.n_tokens} tokens, {columns}")
    return notes
