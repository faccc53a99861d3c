"""`--kv-cache`: which scales there will be, and whether the format holds them."""

from __future__ import annotations

from ptq_cli.calibration.source import Source
from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.plugins import Format
from ptq_cli.errors import InputError
from ptq_cli.formats.common import model_dtype
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.registry import FORMATS, format_named
from ptq_cli.storage.checkpoint import Checkpoint


def plan_kv_cache(
    checkpoint: Checkpoint, settings: GridSettings, fmt: Format, source: Source | None
) -> KVCache | None:
    """How the model's cache is rounded, or None. (Without tokens the setting is refused as one that
    nothing reads.)

    Raises:
        InputError: the format has no place for its scales, or some block caches something else.
    """
    if not settings.kv_cache or source is None or not source.places:
        return None
    if not source.attentions:
        raise InputError(
            "--kv-cache rounds the keys and values of each head, and some blocks of this model"
            " cache something else",
            hint="leave --kv-cache away",
        )
    dtypes = {spec.dtype for spec in checkpoint.specs.values() if len(spec.shape) > 1}
    cache = KVCache(
        modules=source.attentions,
        n_heads=source.kv_heads,
        per_head=settings.kv_cache == "fp8-head",
        dtype=model_dtype(checkpoint.config, dtypes),
    )
    check_kv_cache(fmt)
    return cache


def check_kv_cache(fmt: Format) -> None:
    """Raises InputError where a format has no place for the scales of a rounded cache."""
    if fmt.kv_cache is None:
        holding = [f"--format {name}" for name in FORMATS if format_named(name).kv_cache]
        raise InputError(
            f"{fmt.name} has no scales for a key-value cache in FP8", hint=" or ".join(holding)
        )
