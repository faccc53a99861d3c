"""What a checkpoint holds: tensors, sites and what feeds them, outlier channels, and which layers
matter most."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ptq_cli.calibration.sites import model_sites
from ptq_cli.calibration.source import Source
from ptq_cli.core.names import by_number
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.formats.small_floats import numbers
from ptq_cli.models.linears import left_alone
from ptq_cli.models.sites import Site, SiteLinear
from ptq_cli.numerics.smoothquant import channel_importance
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.plan import make_plan
from ptq_cli.registry import format_named, method
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing, read_json
from ptq_cli.storage.quantized import QuantizedFolder, already_quantized, check_float

LOUD = 10.0  # a channel is an outlier from this many times the median channel's absmax on
TOP = 5


def inspect_model(checkpoint: Checkpoint, source: Source | None) -> dict[str, Any]:
    """Of a float checkpoint, or of a quantized one: seen as what it decodes to, with how it is
    quantized as `quantized_as`; or not read, `kind` is then "foreign". `tensors`, `family`,
    `notes`, `sites`, `fisher`, `quantizing`, `totals`.

    `quantizing` says what the default grid would make of it: `layers`, `bits`, `group_size`,
    `bytes_before` and `bytes_after` of the whole checkpoint, or `refused`, why it cannot be.

    With statistics each site also has `tokens`, `absmax`, `loud_channels` and `importance`:
    `max|x_j| · mean_i|W_ij|`, the largest first. `fisher` ranks modules by the mean
    diagonal Fisher information of their weights.
    """
    found, origin = model_sites(checkpoint), checkpoint.origin
    foreign = origin is None and already_quantized(checkpoint) is not None
    decoded = f"quantized before ({origin}): shown as what it decodes to"
    return {
        "path": str(checkpoint.path),
        "kind": "foreign" if foreign else "float",
        **({} if origin is None else {"quantized_as": origin}),
        "family": found.family,
        "notes": [*found.notes, *([] if origin is None else [decoded])],
        "tensors": _tensors(checkpoint),
        "sites": [_site(site, checkpoint, source) for site in found.sites],
        "fisher": _fisher(source),
        "quantizing": _quantizing(checkpoint),
        "totals": _totals(checkpoint),
    }


def inspect_quantized(folder: QuantizedFolder) -> dict[str, Any]:
    """Of a quantized folder: `tensors`, `format`, `layers` with grid, method, size (`bytes` of
    all their tensors, `bits_per_weight`), `kv_cache` where its cache is rounded, `totals`."""
    packed, methods = folder.packed_names, _methods(folder.checkpoint)
    layers = [
        {
            "module": layer.module,
            "shape": list(layer.full_shape),
            "bits": layer.grid.bits,
            "numbers": None if layer.grid.integers else numbers(layer.grid),
            "type": folder.fmt.type_of(layer),
            "group_size": layer.grid.group_size,
            "sym": layer.grid.sym,
            "method": layer.method or methods.get(layer.module),
            "inputs": _inputs(layer.activation),
            "bytes": size,
            "bits_per_weight": 8 * size / layer.size,
        }
        for layer in folder.layers.values()
        for size in (sum(spec.nbytes for spec in folder.fmt.specs(layer)),)
    ]
    return {
        "path": str(folder.checkpoint.path),
        "kind": "quantized",
        "format": folder.fmt.name,
        "layers": layers,
        "kv_cache": None if folder.kv_cache is None else folder.kv_cache.setting,
        "tensors": _tensors(folder.checkpoint, packed),
        "totals": _totals(folder.checkpoint),
    }


def _methods(checkpoint: Checkpoint) -> dict[str, str]:
    """What rounded each module, where quantization.json says so: most layouts do not."""
    if "quantization.json" not in listing(checkpoint.folder):
        return {}
    content = read_json(checkpoint.folder / "quantization.json")
    layers = content.get("layers") if isinstance(content, dict) else None
    layers = layers if isinstance(layers, dict) else {}
    return {module: word for module, word in layers.items() if isinstance(word, str)}


def _inputs(activation: Any) -> str | None:
    if activation is None:
        return None
    kind = f"{activation.bits} bits" if activation.levels == "integer" else f"FP{activation.bits}"
    if not activation.dynamic:
        return f"{kind}, static"
    if activation.group_size:
        return f"{kind}, dynamic in groups of {activation.group_size}"
    return f"{kind}, dynamic per {'token' if activation.per_token else 'tensor'}"


def _quantizing(checkpoint: Checkpoint) -> dict[str, Any]:
    settings = GridSettings()
    entry: dict[str, Any] = {"bits": settings.bits, "group_size": settings.group_size}
    how = method("rtn")
    try:
        check_float(checkpoint)
        plan = make_plan(checkpoint, how, settings, how.settings(), format_named("ptq"), None)
    except InputError as error:
        return entry | {"refused": str(error).replace("\n", "; ")}
    sizes = {"bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after}
    return entry | {"layers": len(plan.layers)} | sizes


def _tensors(checkpoint: Checkpoint, packed: Collection[str] = ()) -> list[dict[str, Any]]:
    otherwise = "not quantized" if packed else None
    reasons: dict[str, str | None] = dict.fromkeys(checkpoint.specs, otherwise)
    reasons |= left_alone(checkpoint.specs, checkpoint.config)
    reasons |= dict.fromkeys(packed)
    return [
        {
            "tensor": stored.spec.name,
            "dtype": stored.spec.dtype,
            "shape": list(stored.spec.shape),
            "bytes": stored.spec.nbytes,
            "left_alone": reasons[stored.spec.name],
        }
        for stored in (checkpoint.tensors[name] for name in by_number(checkpoint.tensors))
    ]


def _totals(checkpoint: Checkpoint) -> dict[str, Any]:
    specs = [stored.spec for stored in checkpoint.tensors.values()]
    return {
        "tensors": len(specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "dtypes": {d: sum(s.dtype == d for s in specs) for d in sorted({s.dtype for s in specs})},
    }


def _site(site: Site, checkpoint: Checkpoint, source: Source | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "site": site.name,
        "linears": [linear.module for linear in site.linears],
        "in_features": site.in_features,
        "fed_by": None if site.feeder is None else site.feeder.weight,
        "reason": site.reason,
        "certainty": site.certainty,
    }
    modules = set(entry["linears"])
    known = [] if source is None else [s for s, i in source.sites.items() if modules & {*i.linears}]
    if source is None or not known or site.missing:
        return entry
    statistics = source.load(known[0])
    weights = [_weight(checkpoint, linear) for linear in site.linears]
    importance = channel_importance(statistics.absmax, weights)
    highest = np.argsort(-importance, kind="stable")[:TOP]
    median = float(np.median(statistics.absmax))
    loud = np.flatnonzero(statistics.absmax > LOUD * median)
    return entry | {
        "tokens": statistics.n_tokens,
        "absmax": float(statistics.absmax.max()),
        "median_absmax": median,
        "loud_channels": [int(channel) for channel in loud],
        "importance": [
            {"channel": int(channel), "importance": float(importance[channel])}
            for channel in highest
        ],
    }


def _weight(checkpoint: Checkpoint, linear: SiteLinear) -> Array:
    rows, columns = checkpoint.tensors[linear.tensor].spec.shape
    weight = checkpoint.matrix(linear.tensor, (rows, columns))
    return weight.T if linear.transposed else weight


def _fisher(source: Source | None) -> list[dict[str, Any]]:
    """Modules by falling mean Fisher information; `share` is a module's part of the whole sum."""
    if source is None:
        return []
    sums = {
        module: float(source.load_fisher(module).sum(dtype=np.float64)) for module in source.fisher
    }
    total = sum(sums.values())
    rows = [
        {
            "module": module,
            "mean": value / max(1, int(np.prod(source.fisher[module].shape))),
            "share": value / total if total else 0.0,
            "samples": source.fisher[module].n_samples,
        }
        for module, value in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row["mean"], row["module"]))
