"""The few frozen values that cross the walls of the house.

Arrays inside them are never written to after construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatArray = NDArray[np.floating[Any]]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a checkpoint's header states it; `dtype` is safetensors' word ("BF16", "U8")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
}  # fmt: skip

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@lru_cache(1024)
def _runs(width: int, in_features: int) -> tuple[tuple[slice, slice], ...]:
    full = in_features // width
    runs = [(slice(0, full * width), slice(0, full))] if full else []
    if in_features % width:
        runs.append((slice(full * width, in_features), slice(full, full + 1)))
    return tuple(runs)


@dataclass(frozen=True)
class Grid:
    """The points a weight may be rounded to: `weight ≈ scales · (codes − zeros)`.

    bits: width of a code, 2 to 8.
    group_size: columns that share a scale; −1 a whole row, 0 the whole tensor. The last group of
        a row may be short.
    sym: zero in the middle, `zeros = 2^(bits−1)`; else zeros are chosen per group.
    narrow_range: symmetric only; codes stay within ±(2^(bits−1) − 1) of zero (±127, ±7).
    scale_dtype: "float16", "bfloat16" or "float32"; scales are rounded to it before codes are
        chosen.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    narrow_range: bool = False
    scale_dtype: str = "float16"

    @cached_property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    @cached_property
    def min_code(self) -> int:
        return 1 if self.narrow_range else 0

    @cached_property
    def mid_code(self) -> int:
        """The zero of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def width(self, in_features: int) -> int:
        """Columns in a full group of a row with `in_features` columns (at least 1)."""
        whole_row = self.group_size <= 0 or self.group_size > in_features
        return max(1, in_features if whole_row else self.group_size)

    def n_groups(self, in_features: int) -> int:
        """Groups in a row."""
        return max(1, ceil(in_features / self.width(in_features)))

    def starts(self, in_features: int) -> list[int]:
        """First column of each group, then `in_features`."""
        return [*range(0, in_features, self.width(in_features)), in_features]

    def runs(self, in_features: int) -> tuple[tuple[slice, slice], ...]:
        """Runs of equally long groups: (their columns, the groups)."""
        return _runs(self.width(in_features), in_features)

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of scales and zeros for a weight of `shape`."""
        return (1, 1) if self.group_size == 0 else (shape[0], self.n_groups(shape[1]))

    def g_idx(self, in_features: int) -> NDArray[np.int32]:
        """Group of each column where columns were not reordered, int32 [in_features]."""
        return (np.arange(in_features) // self.width(in_features)).astype(np.int32)


@dataclass(frozen=True)
class Activation:
    """How a layer's inputs are rounded when it runs (W8A8).

    dynamic: every token finds its own scale (without `per_token`: all tokens together find one);
        else one scale for the tensor, known beforehand (QuantizedWeight.input_scale)
    """

    bits: int = 8
    sym: bool = True
    dynamic: bool = True
    per_token: bool = True


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight.

    codes: uint8 [out_features, in_features], 0 … 2^bits − 1
    scales: `grid.scale_dtype` [out_features, n_groups] ([1, 1] for a whole-tensor grid)
    zeros: uint8, the same shape as scales
    g_idx: int32 [in_features] where `act_order desc` reordered the groups, else None
    offsets: the dtype and shape of scales, where the layout it was read from stores
        `scales · codes + offsets` and no zeros say the same exactly; zeros then are the nearest
    input_scale, input_zero: of inputs with a static scale: `input ≈ input_scale · (code −
        input_zero)`; the zero is unsigned like all codes and only where the inputs are not
        symmetric
    """

    codes: Codes
    scales: Array
    zeros: Codes
    grid: Grid
    g_idx: NDArray[np.int32] | None = None
    offsets: Array | None = None
    input_scale: float | None = None
    input_zero: int | None = None

    def column_groups(self) -> NDArray[np.int32]:
        """Group of each column, int32 [in_features]."""
        return self.grid.g_idx(self.codes.shape[1]) if self.g_idx is None else self.g_idx

    def panel(self, rows: slice) -> QuantizedWeight:
        """Some of its rows, in the same memory. (The group is not the whole tensor.)"""
        return replace(
            self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows]
        )

    def dequantized(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """`scales · (codes − zeros)` (or with offsets) as float32 [rows, in_features]."""
        result: NDArray[np.float32] = self.codes[rows].astype(np.float32)
        if self.offsets is None:
            self._by_group(np.subtract, result, self.zeros, rows)
        self._by_group(np.multiply, result, self.scales, rows)
        if self.offsets is not None:
            self._by_group(np.add, result, self.offsets, rows)
        return result

    def _by_group(
        self, operation: np.ufunc, result: NDArray[np.float32], values: Array, rows: slice
    ) -> None:
        """`result = operation(result, values of each column's group)`, in place."""
        own = values[slice(None) if len(values) == 1 else rows].astype(np.float32)
        if self.g_idx is not None:
            operation(result, own[:, self.g_idx], out=result)
            return
        for columns, groups in self.grid.runs(result.shape[1]) if result.size else ():
            part = result[:, columns].reshape(len(result), groups.stop - groups.start, -1)
            operation(part, own[:, groups, None], out=part)
            if not np.may_share_memory(part, result):  # a short last group: reshape copied
                result[:, columns] = part.reshape(len(result), -1)


@dataclass(frozen=True)
class Layer:
    """A tensor that is quantized, seen as a matrix.

    module: the tensor's name without `.weight`
    tensor: the tensor's name in the checkpoint
    shape: (out_features, in_features); a tensor of higher rank is [first, all others]
    full_shape: the shape in the checkpoint
    dtype: safetensors' word for the float dtype in the checkpoint
    reordered: whether the groups follow a g_idx of their own (act_order desc)
    method: what rounded it, once that is known
    activation: how the layer's inputs are rounded too, or None
    transposed: stored [in_features, out_features] in the checkpoint (GPT-2's Conv1D)
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    full_shape: tuple[int, ...]
    dtype: str
    grid: Grid
    reordered: bool = False
    method: str = ""
    activation: Activation | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def as_stored(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """A weight [out_features, in_features] in the shape of the checkpoint's tensor."""
        return (weight.T if self.transposed else weight).reshape(self.full_shape)


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration knows of the inputs of one site (of every linear that shares them).

    hessian: float32 [in_features, in_features], `inputs.T @ inputs / n_tokens`
    n_tokens: tokens behind every statistic here (held-out ones are in none)
    absmax, absmean: float32 [in_features], per channel
    minimum, maximum, mean, std: over all values
    histogram: int64 counts of |value| in bins of 1/128 octave, the first of which is bin
        `histogram_start` (numerics/statistics.py states the bins)
    heldout: inputs that the statistics have not seen, [n, in_features], in the dtype they came in
    sample: evenly spaced tokens that the statistics have seen, for searches that need inputs
        themselves, [n, in_features]
    n_seen: tokens read, held-out ones included
    drift: where layers before the site are rounded: float32 [in_features, in_features],
        `(inputs_fp - inputs).T @ inputs / n_tokens` (numerics/drift.py), else None
    heldout_float: what the float model gives the site at the held-out tokens, beside `drift`
    """

    site: str
    linears: tuple[str, ...]
    hessian: NDArray[np.float32]
    n_tokens: int
    n_seen: int
    absmax: NDArray[np.float32]
    absmean: NDArray[np.float32]
    minimum: float
    maximum: float
    mean: float
    std: float
    histogram: NDArray[np.int64]
    histogram_start: int
    heldout: Array
    sample: Array
    drift: NDArray[np.float32] | None = None
    heldout_float: NDArray[np.float32] | None = None

    @property
    def in_features(self) -> int:
        return int(self.hessian.shape[0])


@dataclass(frozen=True)
class MethodResult:
    """What a method made of one weight: the rounded weight and what there is to say about it."""

    weight: QuantizedWeight
    damp_percent: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """The least work that can be lost and redone alone: the linears of one site.

    name: the site, or the module where a layer shares its input with none
    site: the site whose statistics serve, or None where there is no calibration
    memory: bytes that working on it needs, at most
    nearest: why its layers are rounded to nearest whatever the method, or None
    """

    name: str
    layers: tuple[Layer, ...]
    site: str | None
    memory: int
    nearest: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """One row of the error report. Numbers are numbers; None is "not measured".

    compared, best: the error of every method that was tried on the layer, and the least one's name
    activations: of `ptq eval --activation-scheme`
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
class Skipped:
    """A tensor that is copied byte for byte, and why."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read."""

    method: str
    settings: Any
    format: str
    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for unit in self.units for layer in unit.layers)


@dataclass(frozen=True)
class RunReport:
    """The report of a run: rows, totals, what was left alone, warnings (report.py writes it).

    quality: what `ptq eval --tokens` measured of the model's predictions (quality.py)
    sites: what smoothing made of each site (smoothing.SiteOutcome)
    """

    command: str
    rows: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    totals: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    sites: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Work:
    """Arithmetic, for an estimate of the time it takes.

    products: multiply-adds in products of float32 matrices
    passes: float32 values that one elementwise operation reads and writes
    calls: operations, on arrays of whatever size
    """

    products: float = 0.0
    passes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products, self.passes + other.passes, self.calls + other.calls
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.passes * factor, self.calls * factor)


@dataclass(frozen=True)
class Method:
    """A way to round weights: a plug-in record (methods/ has one each, registry.py names them).

    settings: the frozen dataclass of its settings; cli options, recipe keys and the report's
        `settings` are made from its fields
    prepare: what the linears of one site share (a factored Hessian, say), from the site's
        statistics, or from None where there is no calibration; called once per unit
    apply: rounds one weight, float32 or float64 [out_features, in_features]; the last argument is
        the weight of each squared rounding error in the scale search, of the same shape (Fisher
        information), or None where the method's own serves
    needs_hessian: whether statistics change the result
    memory: bytes that `prepare` and `apply` need for a weight of this shape, beyond the weight
        itself, its Hessian and the result
    work: roughly what `prepare` for a site of that many columns, and `apply` for a weight of that
        shape, compute
    is_nearest: whether, with these settings, `apply` is `round_to_nearest` of the whole range of
        each group; it is then not called
    """

    name: str
    help: str
    settings: type[Any]
    prepare: Callable[[SiteStatistics | None, Grid, Any], Any]
    apply: Callable[[FloatArray, Any, Grid, Any, FloatArray | None], MethodResult]
    needs_hessian: bool
    memory: Callable[[tuple[int, int], Grid], int]
    work: Callable[[tuple[int, int], Grid, Any], tuple[Work, Work]]
    is_nearest: Callable[[Any], bool] = lambda settings: False


@dataclass(frozen=True)
class SmoothingCase:
    """What a search for smoothing factors looks at: one site.

    weights: of its linears, float32 [out_features, in_features]
    statistics: of its inputs; `sample` holds some of them
    ties: int [in_features], numbers of channels that must share a factor, or None
    grid: the points its weights will be rounded to
    """

    weights: tuple[FloatArray, ...]
    statistics: SiteStatistics
    ties: NDArray[np.integer[Any]] | None
    grid: Grid


@dataclass(frozen=True)
class SmoothingChoice:
    """Factors that a search proposes: the inputs' divisors, float32 [in_features], all positive.

    strength: the setting they came from: alpha, or AWQ's ratio
    """

    strength: float
    factors: NDArray[np.float32]


@dataclass(frozen=True)
class Smoother:
    """A way to move difficulty between inputs and weights before rounding: a plug-in record.

    settings: the frozen dataclass of its settings
    defaults: defaults of the grid's settings that differ under it
    method: the name of the method that rounds what it has smoothed, unless another is asked for
    search: factors for a site, the best first; empty where none is better than no factors
    work: roughly what `search` computes for a site: shapes of its weights, tokens in the sample
    """

    name: str
    help: str
    settings: type[Any]
    defaults: Mapping[str, Any]
    method: str
    search: Callable[[SmoothingCase, Any], tuple[SmoothingChoice, ...]]
    work: Callable[[Sequence[tuple[int, int]], int, Grid, Any], Work]


@dataclass(frozen=True)
class Format:
    """A layout of quantized weights in safetensors files: a plug-in record (formats/).

    misfit: why a layer cannot be held and what would help, or None
    specs: names, dtypes and shapes of the tensors a layer becomes
    encode, decode: a rounded weight to those tensors and back; written apart from each other
    config: config.json's `quantization_config`, from the layers and the modules left dense
    metadata: what the file's own metadata says of its layers
    layers: the layers of a checkpoint in this layout, from its metadata, config.json and headers;
        `read` gives one (small) tensor by its name. Empty where it is another layout. Every tensor
        of `specs` is then there. Raises InputError where the parts contradict one another or
        cannot be proven to be understood
    scale_dtype: what scales are rounded to, from the model's dtype ("BF16"); None: any will do
    config_keys: where in config.json the object of `config` belongs
    config_file: a file beside config.json that repeats that object
    model_config: keys that config.json must have besides, from the source's config.json
    container: how the weights are stored: "safetensors", or another that storage/containers.py
        knows
    file_metadata: the metadata of the weights file where its readers want just that; None: this
        tool's own entry, which holds `metadata`
    by_rows: whether row n of the weight is row n of every tensor of a layer, whatever the others
    """

    name: str
    help: str
    misfit: Callable[[Layer], str | None]
    specs: Callable[[Layer], tuple[TensorSpec, ...]]
    encode: Callable[[Layer, QuantizedWeight], dict[str, Array]]
    decode: Callable[[Layer, Mapping[str, Array]], QuantizedWeight]
    config: Callable[[Sequence[Layer], Sequence[str]], Mapping[str, Any] | None]
    metadata: Callable[[Sequence[Layer]], Mapping[str, Any]]
    layers: Callable[
        [Mapping[str, Any], Mapping[str, Any], Mapping[str, TensorSpec], Callable[[str], Array]],
        tuple[Layer, ...],
    ]
    scale_dtype: Callable[[str], str] | None = None
    config_keys: tuple[str, ...] = ("quantization_config",)
    config_file: str | None = None
    file_metadata: Mapping[str, str] | None = None
    model_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    container: str = "safetensors"
    by_rows: Callable[[Layer], bool] = lambda layer: False
