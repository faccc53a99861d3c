"""What scales are stored in where nobody says it: what the format wants for the model's dtype, or
where it cannot hold the layer so, the first dtype with which it can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.formats import common
from ptq_cli.models.family import Config
from ptq_cli.models.linears import group_modules
from ptq_cli.models.sites import Site
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.mixes import is_mix
from ptq_cli.plan.schemes import scheme_grid
from ptq_cli.plan.select_tensors import rule_of
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.quantized import QuantizedFolder

# Each has a wider range than those before it.
BY_RANGE = ("float16", "bfloat16", "float32")


def is_auto(settings: GridSettings, tensor: StoredTensor) -> bool:
    """Whether the dtype of a tensor's scales is left to the tool: no scheme has one of its own."""
    if is_mix(settings.scheme):
        return False
    rule = rule_of(settings, tensor)
    if "scale_dtype" in scheme_grid(rule.get("scheme", settings.scheme)):
        return False
    return bool(rule.get("scale_dtype", settings.scale_dtype) == "auto")


def with_scale_dtypes(
    layers: Sequence[Layer],
    settings: GridSettings,
    fmt: Format,
    checkpoint: Checkpoint,
    sites: Sequence[Site],
) -> list[Layer]:
    """The layers with the dtype of their model, and where it is left to the tool, of scales that
    the format can hold."""
    known = model_dtypes(layers, checkpoint.config, checkpoint.specs.values(), sites)
    layers = [replace(layer, model_dtype=known[layer.module]) for layer in layers]
    return [
        fitting(layer, fmt, layer) if is_auto(settings, checkpoint.tensors[layer.tensor]) else layer
        for layer in layers
    ]


def model_dtypes(
    layers: Iterable[Layer],
    config: Config,
    specs: Iterable[TensorSpec],
    sites: Sequence[Site] = (),
) -> dict[str, str]:
    """The dtype in which loaders hold each module; linears that share their input, which runtimes
    fuse, have the same.

    specs: of the model's tensors; matrices count
    """
    dtypes = {layer.module: layer.dtype for layer in layers}
    halves = {spec.dtype for spec in specs if len(spec.shape) > 1} & {"F16", "BF16"}
    found: dict[str, str] = {}
    for group in group_modules(dtypes, sites):
        own = {dtypes[module] for module in group}
        if own & halves:  # where a model has both, either may be the model's
            own |= halves
        found |= dict.fromkeys(group, common.model_dtype(config, own))
    return found


def fitting(layer: Layer, fmt: Format, otherwise: Layer) -> Layer:
    """The layer as it is where the format can hold it, or else with scales of the first dtype with
    which it can; `otherwise` where there is none."""
    tries = [layer, *(with_scales(layer, dtype) for dtype in BY_RANGE)]
    return next((other for other in tries if fmt.misfit(other) is None), otherwise)


def with_scales(layer: Layer, dtype: str) -> Layer:
    """The layer with scales in another dtype."""
    return replace(layer, grid=replace(layer.grid, scale_dtype=dtype))


def layers_to_repack(folder: QuantizedFolder) -> list[Layer]:
    """The layers of what is quantized already, with the dtype of their model."""
    config, specs = folder.checkpoint.config, folder.checkpoint.specs
    layers, stated = folder.layers.values(), common.stated_dtype(config)
    dense = [specs[name] for name in folder.untouched()]
    packed = [TensorSpec(layer.tensor, layer.dtype, layer.full_shape) for layer in layers]
    known = model_dtypes(layers, config, [*dense, *packed])
    return [
        replace(layer, dtype=stated or layer.dtype, model_dtype=known[layer.module])
        for layer in layers
    ]
