"""The plan: from headers and settings alone, everything that a run will do.

Which tensors are quantized, on which grid, with whose statistics; what is copied and why; what it
will weigh. Every mistake a user can make is found here, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.detection import Sites, find_sites
from ptq_cli.models.recipe import merge_sites, recipe_sites
from ptq_cli.models.sharing import group_modules
from ptq_cli.models.sites import Site
from ptq_cli.numerics import layout
from ptq_cli.numerics.measures import ROWS_AT_ONCE
from ptq_cli.numerics.statistics import statistics_memory
from ptq_cli.storage.calibration import StatisticsSource, StreamingSource
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor, is_float
from ptq_cli.storage.folder import check_container
from ptq_cli.storage.tensors import WRITABLE
from ptq_cli.values import (
    FLOAT_DTYPES,
    Activation,
    Format,
    Grid,
    Layer,
    Method,
    Plan,
    Skipped,
    TensorSpec,
    Unit,
)

_LEFT_ALONE = (
    ("embedding", re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)(\.|$)", re.IGNORECASE)),
    ("norm", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+|ln\d*)(\.|$)", re.IGNORECASE)),
    ("output head", re.compile(r"(^|\.)lm_head(\.|$)|^(output|embed_out|score)(\.|$)")),
)

_EMBEDDING = _LEFT_ALONE[0][1]

_QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|SCB)$"
)


# What --scheme is short for.
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": 4, "group_size": 128, "sym": True, "activation_scheme": "none"},
    "W8A8": {"bits": 8, "group_size": -1, "sym": True, "narrow_range": True},
}


@dataclass(frozen=True)
class GridSettings:
    """Settings of the grid, the tensors and the layout: common to every quantizing command."""

    scheme: str = field(
        default="",
        metadata={
            "help": "Short for: W4A16, 4 bits in groups of 128; W8A8, int8 weights per channel and"
            " inputs per token.",
            "choices": tuple(SCHEMES),
        },
    )
    bits: int = field(
        default=4, metadata={"help": "Bits per weight.", "min": 2, "max": 8, "short": "-b"}
    )
    group_size: int = field(
        default=128,
        metadata={
            "help": "Columns that share a scale; -1: the whole row, 0: the whole tensor.",
            "min": -1,
            "short": "-g",
        },
    )
    sym: bool = field(
        default=True,
        metadata={"help": "Zero in the middle of the codes, or chosen per group.", "off": "asym"},
    )
    narrow_range: bool = field(
        default=False,
        metadata={"help": "Symmetric codes within ±(2^(bits−1) − 1), as integer runtimes like it."},
    )
    scale_dtype: str = field(
        default="auto",
        metadata={
            "help": "What scales are stored in; auto: what the format wants, else float16.",
            "choices": ("auto", "float16", "bfloat16", "float32"),
        },
    )
    ignore: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Leave tensors alone whose name holds REGEX.", "metavar": "REGEX"},
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Quantize also what is left alone by default (embeddings, lm_head, tensors"
            " of higher rank seen as [first dimension, all others]).",
            "metavar": "REGEX",
        },
    )
    layers: tuple[Mapping[str, Any], ...] = field(
        default=(), metadata={"help": "Settings of single layers.", "recipe_only": True}
    )
    family: str = field(
        default="",
        metadata={"help": "The family of models that tells the sites.", "recipe_only": True},
    )
    sites: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata={"help": "Linears that share an input, and what feeds them.", "recipe_only": True},
    )
    format: str = field(default="ptq", metadata={"help": "Layout of the output.", "formats": True})
    on_misfit: str = field(
        default="error",
        metadata={
            "help": "What happens to layers that the format cannot hold: an error, or they are"
            " kept as they are and declared so.",
            "choices": ("error", "keep"),
        },
    )


LAYER_KEYS = ("match", "bits", "group_size", "sym", "narrow_range", "scale_dtype", "skip")


def make_plan(
    checkpoint: Checkpoint,
    method: Method,
    settings: GridSettings,
    method_settings: Any,
    fmt: Format,
    source: StatisticsSource | None,
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
    check_float(checkpoint)
    chosen, skipped = choose_tensors(checkpoint, settings)
    sites = model_sites(checkpoint, settings).sites
    turned = transposed_tensors(sites)
    layers = {
        tensor.spec.name: _layer(tensor, settings, method_settings, fmt, checkpoint, turned)
        for tensor in chosen
    }
    layers = {name: replace(layer, activation=activation) for name, layer in layers.items()}
    kept = check_layers(list(layers.values()), fmt, settings.on_misfit, sites)
    for layer in kept:
        del layers[layer.tensor]
        reason = f"format {fmt.name} cannot hold it"
        skipped.append(Skipped(layer.tensor, layer.full_shape, layer.dtype, reason))
    fmt.config(list(layers.values()), dense_modules(skipped))  # refuses what cannot be declared
    left = [entry.tensor for entry in skipped]
    check_container(fmt, checkpoint, list(layers.values()), left)
    _check_names(checkpoint, layers.values(), skipped, fmt)
    included = {t.spec.name for t in chosen if default_reason(t) is not None}
    if getattr(method_settings, "weight", "hessian") == "fisher":
        _check_fisher(layers.values(), source)
    units = _units(layers, method, source, missing, included, sites)
    before = sum(tensor.spec.nbytes for tensor in checkpoint.tensors.values())
    rounded = sum(checkpoint.tensors[name].spec.nbytes for name in layers)
    packed = sum(spec.nbytes for layer in layers.values() for spec in fmt.specs(layer))
    return Plan(
        method=method.name,
        settings=(settings, method_settings),
        format=fmt.name,
        units=units,
        skipped=tuple(skipped),
        warnings=(*checkpoint.warnings, *_warnings(units, method, source)),
        bytes_before=before,
        bytes_after=before - rounded + packed,
    )


def model_sites(checkpoint: Checkpoint, settings: GridSettings | None = None) -> Sites:
    """The sites of a model: those a recipe names, and those its family's table tells.

    Raises:
        InputError: a recipe's family or sites do not fit the checkpoint.
    """
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    family, named = (settings.family, settings.sites) if settings else ("", ())
    found = find_sites(specs, checkpoint.config or None, family or None)
    if not named:
        return found
    return replace(found, sites=merge_sites(found.sites, recipe_sites(named, specs)))


def transposed_tensors(sites: Sequence[Site]) -> frozenset[str]:
    """Tensors that are stored [in_features, out_features]."""
    linears = (linear for site in sites for linear in site.linears)
    return frozenset(linear.tensor for linear in linears if linear.transposed)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds packed weights."""
    return bool(_packed(checkpoint)) or bool(checkpoint.root and _declared(checkpoint))


def _packed(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if _QUANTIZED_NAMES.search(name)]


def _declared(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("quantization_config"))


def check_float(checkpoint: Checkpoint) -> None:
    """Refuse what is quantized already, and dtypes that could not be copied."""
    packed = _packed(checkpoint)
    if is_quantized(checkpoint):
        what = f"tensor {packed[0]!r}" if packed else "config.json has a quantization_config"
        raise InputError(
            f"{checkpoint.path}: quantized already ({what})", hint="start from the float model"
        )
    for stored in checkpoint.tensors.values():
        if stored.spec.dtype not in WRITABLE:
            raise InputError(
                f"{stored.file}: tensor {stored.spec.name!r}: dtype {stored.spec.dtype} can be"
                " neither quantized nor copied"
            )


def default_reason(tensor: StoredTensor) -> str | None:
    """Why a tensor is left alone unless asked for, or None where it is quantized."""
    spec = tensor.spec
    if not is_float(spec):
        return f"dtype {spec.dtype}"
    if prod(spec.shape) == 0:
        return "empty"
    if len(spec.shape) != 2:
        return f"rank {len(spec.shape)}"
    for kind, pattern in _LEFT_ALONE:
        if pattern.search(spec.name.removesuffix(".weight")):
            return kind
    return None if spec.name.endswith(".weight") else "not a .weight"


def choose_tensors(
    checkpoint: Checkpoint, settings: GridSettings
) -> tuple[list[StoredTensor], list[Skipped]]:
    """The tensors to quantize, in the order of the files, and those that are copied."""
    ignore = _patterns("--ignore", settings.ignore, checkpoint)
    include = _patterns("--include", settings.include, checkpoint)
    rules = _patterns("[[layers]] match", [rule["match"] for rule in settings.layers], checkpoint)
    pairs = zip(rules, settings.layers, strict=True)
    ignore += [pattern for pattern, rule in pairs if rule.get("skip")]
    chosen, skipped = [], []
    for tensor in checkpoint.tensors.values():
        spec, reason = tensor.spec, default_reason(tensor)
        possible = is_float(spec) and len(spec.shape) >= 2 and prod(spec.shape) > 0
        if reason and possible and any(p.search(spec.name) for p in include):
            reason = None
        if any(p.search(spec.name) for p in ignore):
            reason = "ignored"
        if reason:
            skipped.append(Skipped(spec.name, spec.shape, spec.dtype, reason))
        else:
            chosen.append(tensor)
    if not chosen:
        raise InputError(
            f"{checkpoint.path}: none of its {len(skipped)} tensors is left to quantize",
            hint="--include REGEX takes tensors in",
        )
    for pattern in include:
        if not any(pattern.search(tensor.spec.name) for tensor in chosen):
            raise InputError(
                f"--include {pattern.pattern!r} matches no tensor that could be quantized in"
                f" {checkpoint.path}"
            )
    return chosen, skipped


def _patterns(setting: str, words: Sequence[str], checkpoint: Checkpoint) -> list[re.Pattern[str]]:
    patterns = []
    for word in words:
        try:
            pattern = re.compile(word)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{setting} {word!r}: not a regular expression: {error}") from None
        if not any(pattern.search(name) for name in checkpoint.tensors):
            raise InputError(
                f"{setting} {word!r} matches no tensor of {checkpoint.path}",
                hint=f"names look like {next(iter(checkpoint.tensors), 'nothing')!r}",
            )
        patterns.append(pattern)
    return patterns


def dense_modules(skipped: Sequence[Skipped]) -> list[str]:
    """Linears that are left in floating point: runtimes want them declared."""
    return [
        entry.tensor.removesuffix(".weight")
        for entry in skipped
        if entry.tensor.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype in FLOAT_DTYPES
        and not _EMBEDDING.search(entry.tensor.removesuffix(".weight"))
    ]


def _layer(
    tensor: StoredTensor,
    settings: GridSettings,
    method_settings: Any,
    fmt: Format,
    checkpoint: Checkpoint,
    turned: frozenset[str],
) -> Layer:
    spec = tensor.spec
    values = {key: getattr(settings, key) for key in LAYER_KEYS[1:-1]}
    for rule in settings.layers:
        if re.search(rule["match"], spec.name):
            values |= {key: rule[key] for key in rule if key in values}
    if values["scale_dtype"] == "auto":
        wanted = fmt.scale_dtype(_model_dtype(checkpoint, spec)) if fmt.scale_dtype else "float16"
        values["scale_dtype"] = wanted
    grid = Grid(**values)
    if grid.narrow_range and not grid.sym:
        raise InputError(f"{spec.name}: --narrow-range goes with --sym only")
    shape = (spec.shape[0], prod(spec.shape[1:]))
    return Layer(
        module=spec.name.removesuffix(".weight"),
        tensor=spec.name,
        shape=shape[::-1] if spec.name in turned else shape,
        full_shape=spec.shape,
        dtype=spec.dtype,
        grid=grid,
        reordered=getattr(method_settings, "act_order", "none") == "desc",
        transposed=spec.name in turned,
    )


def _check_fisher(layers: Iterable[Layer], source: StatisticsSource | None) -> None:
    """Every layer needs Fisher information, in the shape of its weight."""
    found = {} if source is None else source.fisher
    lost = [layer.module for layer in layers if layer.module not in found]
    if lost:
        raise InputError(
            f"--weight fisher: no Fisher information of {len(lost)} layers: {', '.join(lost[:10])}",
            hint="ptq calibrate --gradients DIR",
        )
    for layer in layers:
        shape = found[layer.module].shape
        if shape != layer.full_shape:
            raise InputError(
                f"--weight fisher: {layer.module} has {list(shape)}, its weight"
                f" {list(layer.full_shape)}"
            )


def _model_dtype(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """The dtype a runtime computes in: config.json's, else the tensor's."""
    config = checkpoint.config
    stated = config.get("dtype") or config.get("torch_dtype")
    return layout.model_dtype(config) if stated else spec.dtype


def keep_together(groups: Iterable[Sequence[str]], misfits: Mapping[str, str]) -> set[str]:
    """Modules that do not fit, and those that share an input with one: runtimes fuse them."""
    together = [group for group in groups if not misfits.keys().isdisjoint(group)]
    return {module for group in together for module in group}


def misfit_error(fmt: Format, misfits: Mapping[str, str], total: int) -> InputError:
    """All layers that a format cannot hold, by reason."""
    reasons: dict[str, list[str]] = {}
    for module, reason in misfits.items():
        reasons.setdefault(reason, []).append(module)
    said = "; ".join(f"{reason}: {', '.join(modules)}" for reason, modules in reasons.items())
    if len(misfits) == total:
        return InputError(f"format {fmt.name} can hold none of the {total} layers; {said}")
    return InputError(
        f"format {fmt.name} cannot hold {len(misfits)} of {total} layers; {said}",
        hint="--on-misfit keep leaves such layers dense",
    )


def check_layers(
    layers: Sequence[Layer], fmt: Format, on_misfit: str, sites: Sequence[Site] = ()
) -> list[Layer]:
    """The layers to keep as they are, with those that share their input: runtimes fuse them.

    Raises:
        InputError: layers that the format cannot hold, all of them listed, or two tensors that
            would become one module.
    """
    misfits = {layer.module: reason for layer in layers if (reason := fmt.misfit(layer))}
    if misfits and (on_misfit == "error" or len(misfits) == len(layers)):
        raise misfit_error(fmt, misfits, len(layers))
    modules = [layer.module for layer in layers]
    twice = (
        {module for module in modules if modules.count(module) > 1}
        if (len(set(modules)) < len(modules))
        else set()
    )
    if twice:
        raise InputError(f"two tensors would become module {min(twice)!r}", hint="--ignore one")
    kept = keep_together(group_modules(modules, sites), misfits)
    return [layer for layer in layers if layer.module in kept]


def _check_names(
    checkpoint: Checkpoint, layers: Iterable[Layer], skipped: Iterable[Skipped], fmt: Format
) -> None:
    """Refuse a packed tensor's name that another tensor of the output has already."""
    taken = {entry.tensor for entry in skipped}
    for layer in layers:
        for spec in fmt.specs(layer):
            if spec.name in taken:
                raise InputError(
                    f"{checkpoint.path}: {layer.tensor!r} would be packed as {spec.name!r}, which"
                    " is a name that is taken",
                    hint="leave the former out with --ignore",
                )
            taken.add(spec.name)


def _units(
    layers: Mapping[str, Layer],
    method: Method,
    source: StatisticsSource | None,
    missing: str,
    included: set[str],
    sites: Sequence[Site],
) -> tuple[Unit, ...]:
    by_module = {layer.module: layer for layer in layers.values()}
    site_of = sites_of(by_module, source)
    lost = [
        layer.module
        for layer in layers.values()
        if source is not None and layer.module not in site_of and layer.tensor not in included
    ]
    if lost and missing == "error" and method.needs_hessian and source is not None:
        surplus = f"; left over: {', '.join(source.surplus[:10])}" if source.surplus else ""
        raise InputError(
            f"{source.name}: no statistics for {len(lost)} layers: {', '.join(lost[:10])}{surplus}",
            hint="calibrate them, leave them out with --ignore, or allow --fallback rtn",
        )
    units = []
    for group in group_modules(by_module, sites):
        parts: dict[str | None, list[Layer]] = {}
        for module in group:
            parts.setdefault(site_of.get(module), []).append(by_module[module])
        for site, members in parts.items():
            units.append(_unit(site, members, method, source))
    if isinstance(source, StreamingSource):
        order = {site: place for place, site in enumerate(source.sites)}
        units.sort(key=lambda unit: order.get(unit.site or "", len(order)))
    return tuple(units)


def _unit(
    site: str | None, members: list[Layer], method: Method, source: StatisticsSource | None
) -> Unit:
    nearest = None
    if site is None and method.needs_hessian:
        nearest = "no calibration" if source is None else "no statistics for it"
        members = [replace(layer, reordered=False) for layer in members]
    return Unit(
        name=members[0].module,
        layers=tuple(members),
        site=site,
        memory=_unit_memory(site, members, method),
        nearest=nearest,
    )


def _unit_memory(site: str | None, members: Sequence[Layer], method: Method) -> int:
    """Bytes that a unit takes at most, its process' own 60 MB aside.

    A layer: its weight in float32, two roundings of it, packed and unpacked, 12 bytes each; rows
    of weight and error while it is measured. The site: its Hessian, and before anything else the
    sums it is made of.
    """
    columns = members[0].shape[1]
    most = max(
        method.memory(layer.shape, layer.grid) + 12 * layer.size + 12 * ROWS_AT_ONCE * columns
        for layer in members
    )
    packed = sum(layer.size for layer in members)
    if site is None:
        return most + packed
    return packed + max(statistics_memory(columns), most + 4 * columns * columns)


def sites_of(layers: Mapping[str, Layer], source: StatisticsSource | None) -> dict[str, str]:
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


def _warnings(units: Sequence[Unit], method: Method, source: StatisticsSource | None) -> list[str]:
    if not method.needs_hessian:
        return []
    if source is None:
        return [
            "NO CALIBRATION: every layer is rounded to nearest. Give --calibration FILE or"
            " --activations DIR; --require-calibration makes this an error"
        ]
    nearest = [layer.module for unit in units if unit.nearest for layer in unit.layers]
    warnings = []
    if nearest:
        warnings.append(
            f"{len(nearest)} layers have no statistics and are rounded to nearest:"
            f" {', '.join(nearest[:10])}"
        )
    used = [source.sites[unit.site] for unit in units if unit.site is not None]
    few = few_tokens([(info.site, info.n_tokens, info.in_features) for info in used])
    return [*warnings, *few]


def few_tokens(sites_: Sequence[tuple[str, int, int]]) -> list[str]:
    """A warning where sites were calibrated on fewer tokens than they have columns."""
    few = [s for s in sites_ if s[1] < s[2]]
    if not few:
        return []
    site, tokens, columns = few[0]
    more = f" (and {len(few) - 1} sites more)" if len(few) > 1 else ""
    return [f"{site}: calibrated on {tokens} tokens, fewer than its {columns} columns{more}"]
