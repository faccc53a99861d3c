"""Layers: each chosen tensor on its grid, and whether the format can hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

from ptq_cli.calibration.source import Source
from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer, Misfit, Skipped
from ptq_cli.core.names import fold_names, fold_reasons
from ptq_cli.core.plugins import Format
from ptq_cli.errors import InputError, stated_in
from ptq_cli.formats import common
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.models.linears import group_modules
from ptq_cli.models.sites import Site
from ptq_cli.plan.grid_settings import GRID_KEYS, GridSettings
from ptq_cli.plan.hints import Unread, helping
from ptq_cli.plan.schemes import check_fixed, scheme_grid, scheme_inputs, scheme_settings
from ptq_cli.plan.select_tensors import rule_of
from ptq_cli.plan.tensor_types import TensorTypes
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor


def make_layer(
    tensor: StoredTensor,
    settings: GridSettings,
    fmt: Format,
    checkpoint: Checkpoint,
    transposed: frozenset[str],
    reordered: bool,
    activation: Activation | None,
) -> Layer:
    """One tensor on the grid that the settings give it, rules of a recipe last.

    transposed: names of the tensors that are stored [in_features, out_features]
    reordered: whether the method forms groups in an order of its own
    activation: how the layer's inputs are rounded when it runs, or None; a rule's scheme says that
        itself

    Raises:
        InputError: --narrow-range without --sym; a scheme that has no such bits.
    """
    spec, rule = tensor.spec, rule_of(settings, tensor)
    values = {key: getattr(settings, key) for key in GRID_KEYS}
    if "scheme" in rule:
        values |= scheme_settings(rule["scheme"])
        activation = scheme_inputs(rule["scheme"])
    values = {key: rule.get(key, own) for key, own in values.items() if key in GRID_KEYS}
    scheme = values.pop("scheme")
    with stated_in(spec.name):
        check_fixed(scheme, values)
    if settings.global_scale != "float32" and not fmt.global_scale:
        raise InputError(
            f"format {fmt.name} holds no global scale", hint="leave --global-scale out"
        )
    if values["scale_dtype"] == "auto":
        stated = common.stated_dtype(checkpoint.config)
        values["scale_dtype"] = fmt.scale_dtype(stated or spec.dtype)
    grid = Grid(**values | scheme_grid(scheme))
    if grid.scale_dtype == "e4m3" and fmt.global_scale:
        grid = replace(grid, global_scale=0.0)  # the weights will tell
    if grid.narrow_range and not grid.sym:
        hint = "--no-narrow-range"
        raise InputError(f"{spec.name}: --narrow-range goes with --sym only", hint=hint)
    shape = (spec.shape[0], prod(spec.shape[1:]))
    return Layer(
        module=spec.name.removesuffix(".weight"),
        tensor=spec.name,
        shape=shape[::-1] if spec.name in transposed else shape,
        full_shape=spec.shape,
        dtype=spec.dtype,
        grid=grid,
        reordered=reordered,
        activation=activation,
        transposed=spec.name in transposed,
    )


def of_type(layer: Layer, mixed: TensorTypes) -> Layer:
    """The layer as a block type of a mix has it, if there is one."""
    return replace(layer, grid=TYPES[mixed.of(layer.tensor)].grid) if mixed.mix else layer


def mirrored_where_held(layer: Layer, fmt: Format) -> Layer:
    """The layer, its symmetric groups mirrored where that is better and the format holds it."""
    return replace(layer, grid=replace(layer.grid, mirrored=fmt.mirrored(layer)))


def check_fisher(layers: Iterable[Layer], source: Source | None) -> None:
    """Every layer needs Fisher information, in the shape of its weight."""
    found = {} if source is None else source.fisher
    lost = [layer.module for layer in layers if layer.module not in found]
    if lost:
        raise InputError(
            f"--weight fisher: no Fisher information of {len(lost)} layers: {fold_names(lost)}",
            hint="ptq calibrate --gradients DIR",
        )
    for layer in layers:
        shape = found[layer.module].shape
        if shape != layer.full_shape:
            raise InputError(
                f"--weight fisher: {layer.module} has {list(shape)}, its weight"
                f" {list(layer.full_shape)}"
            )


def keep_together(groups: Iterable[Sequence[str]], misfits: Mapping[str, Misfit]) -> set[str]:
    """Modules that do not fit, and those that share an input with one: runtimes fuse them."""
    together = [group for group in groups if not misfits.keys().isdisjoint(group)]
    return {module for group in together for module in group}


def check_misfits(
    fmt: Format,
    misfits: Mapping[str, Misfit],
    total: int,
    on_misfit: str,
    options_of: Callable[[], list[str]],
) -> None:
    """Refuse layers that a format cannot hold, unless they may be kept and are not all there are.

    options_of: gives the options that would get past it

    Raises:
        InputError: all of them, by reason, with the options that would help.
    """
    if not misfits or (on_misfit != "error" and len(misfits) < total):
        return
    reasons: dict[str, list[str]] = {}
    for module, misfit in misfits.items():
        reasons.setdefault(misfit.reason, []).append(module)
    options = options_of()
    if len(misfits) < total:
        options.append("--on-misfit keep, which leaves such layers dense")
    counted = f"format {fmt.name} cannot hold {len(misfits)} of {total} layers"
    said = fold_reasons(reasons)
    if len(reasons) == 1:
        ((reason, modules),) = reasons.items()
        said = f"{reason}: {fold_names(modules)}"
    raise InputError(
        f"{counted}: {said}",
        hint=", or ".join(options) or "--format ptq, which holds every layer",
    )


def unheld(layer: Layer, fmt: Format) -> Skipped:
    """A layer that is kept as it is."""
    return Skipped(layer.tensor, layer.full_shape, layer.dtype, cannot_hold(fmt.name))


def cannot_hold(fmt: str) -> str:
    """Why a layer that does not fit is kept as it is."""
    return f"format {fmt} cannot hold it"


def check_layers(
    layers: Sequence[Layer],
    fmt: Format,
    settings: GridSettings,
    sites: Sequence[Site],
    kinds: Mapping[str, str],
    unread: Unread,
) -> set[str]:
    """The modules to keep as they are, with those that share their input: runtimes fuse them.

    kinds: tensors that stay dense unless asked for, and why
    unread: gives modules that the format could hold, but that no runtime reads from it

    Raises:
        InputError: layers that the format cannot hold, all of them listed, or two tensors that
            would become one module.
    """
    misfits = {layer.module: misfit for layer in layers if (misfit := fmt.misfit(layer))}
    misfits = {**unread(layers, fmt), **misfits}
    options = partial(helping, layers, misfits, fmt, settings, kinds, unread)
    check_misfits(fmt, misfits, len(layers), settings.on_misfit, options)
    modules = [layer.module for layer in layers]
    twice = Counter(modules) - Counter(set(modules))
    if twice:
        raise InputError(f"two tensors would become module {min(twice)!r}", hint="--ignore one")
    return keep_together(group_modules(modules, sites), misfits)


def check_names(
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
