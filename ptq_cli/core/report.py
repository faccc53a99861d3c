"""The rows and the whole of an error report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.core.layer import Skipped


@dataclass(frozen=True)
class LayerReport:
    """One row of the error report. Numbers are numbers; None is "not measured".

    compared, best: the error of every method that was tried on the layer, and the least one's name
    activations: of `ptq eval --activation-scheme`
    input_bits: what the layer's inputs are rounded to when it runs, or None
    levels: the small floats that codes are ("e2m1", "e4m3"), or None where they are integers
    type: what the format calls its numbers (ggml's types), or None
    weight_rel_err: where that was measured, the errors are those of the outputs with rounded
        inputs, and this is that of the weight alone, with float inputs
    weak: why errors on these inputs say little (numerics/weak_inputs.py), or None
    drift: how much of the correction for drift was taken, 0 to 1, where there was one
    own_tokens: of an expert, those that reach it, held-out ones aside
    calibrated_on: what `tokens` are: the expert's "own", or, as these are too few, those of all
        experts beside it: of its "site"
    """

    layer: str
    module: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    sym: bool
    method: str
    calibrated: bool
    loss: float
    rel_err: float
    heldout_rel_err: float | None
    rtn_rel_err: float
    rtn_heldout_rel_err: float | None
    gain_vs_rtn: float | None
    sqnr_db: float | None
    max_abs_err: float
    tokens: int
    dead_columns: int
    damp_percent: float | None
    fallback: str | None
    seconds: float
    bytes: int
    bits_per_weight: float
    notes: tuple[str, ...] = ()
    compared: Mapping[str, float] | None = None
    best: str | None = None
    activations: ActivationErrors | None = None
    input_bits: int | None = None
    weight_rel_err: float | None = None
    weak: Mapping[str, float] | None = None
    drift: float | None = None
    levels: str | None = None
    type: str | None = None
    own_tokens: int | None = None
    calibrated_on: str | None = None


@dataclass(frozen=True)
class OutputErrors:
    """Of a layer's outputs on inputs: mean absolute error, Σ‖ΔY‖²/Σ‖Y‖², and that in decibels."""

    mae: float
    rel_err: float
    sqnr_db: float | None


@dataclass(frozen=True)
class ActivationErrors:
    """Errors of a layer's outputs with integer inputs, beside those of its weight alone, and of the
    original weight plainly rounded at the same grid with integer inputs."""

    scheme: str
    integer: OutputErrors
    weight_only: OutputErrors
    plain: OutputErrors


@dataclass(frozen=True)
class RunReport:
    """The report of a run: rows, totals, what was left alone, warnings (report.py writes it).

    quality: what `ptq eval --tokens` measured of the model's predictions (evaluation/perplexity.py)
    sites: what smoothing made of each site (run/settle.SiteOutcome)
    earlier: whether an earlier run had made the output already, and this is its report
    weak: why its errors say little of the model (report/weak.py); they stand among `warnings`, too
    kv_cache: how much of FP8's range the keys and values of each block use (run/kv_cache.py)
    """

    command: str
    rows: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    totals: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    sites: tuple[Mapping[str, Any], ...] = ()
    earlier: bool = False
    weak: tuple[str, ...] = ()
    kv_cache: tuple[Mapping[str, Any], ...] = ()
