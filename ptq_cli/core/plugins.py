"""The records that plug-ins are: methods, smoothers, formats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray, TensorSpec
from ptq_cli.core.weight import QuantizedWeight


@dataclass(frozen=True)
class MethodResult:
    """What a method made of one weight: the rounded weight and what there is to say about it.

    drift: how much of the correction for drift was taken, 0 to 1, where there was one
    """

    weight: QuantizedWeight
    damp_percent: float | None = None
    notes: tuple[str, ...] = ()
    drift: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to round weights: a plug-in record (methods/ has one each, registry.py names them).

    settings: the frozen dataclass of its settings; cli options, recipe keys and the report's
        `settings` are made from its fields
    prepare: what the linears of one site share (a factored Hessian, say), from the site's
        statistics, or from None where there is no calibration; it serves all grids of the same
        `grouping`
    apply: rounds one weight, float32 or float64 [out_features, in_features]; the last argument is
        the weight of each squared rounding error in the scale search, of the same shape (Fisher
        information), or None where the method's own serves
    needs_hessian: whether it reads more of the Hessian than its diagonal; without statistics it
        then does nothing of its own
    memory: bytes that `prepare` and `apply` need for a weight of this shape, beyond the weight
        itself, the result and the statistics; the last argument says whether those have the drift
    effort: roughly how many products of a weight with a square of its columns it takes as long as
    is_nearest: whether, with these settings, `apply` is `round_to_nearest` of the whole range of
        each group; it is then not called
    searches_ranges: whether it is itself rounding to nearest, in ranges that are searched: where
        the whole range is better, nothing has failed
    needs_fisher, reorders, corrects_drift, couples_rows: whether, with these settings, it reads
        Fisher information; forms groups in an order of its own (a g_idx); makes up for the drift
        of the inputs; lets rows make up for one another
    """

    name: str
    help: str
    settings: type[Any]
    prepare: Callable[[SiteStatistics | None, Grid, Any], Any]
    apply: Callable[[FloatArray, Any, Grid, Any, FloatArray | None], MethodResult]
    needs_hessian: bool
    memory: Callable[[tuple[int, int], Grid, bool], int]
    effort: float
    is_nearest: Callable[[Any], bool] = lambda settings: False
    searches_ranges: bool = False
    needs_fisher: Callable[[Any], bool] = lambda settings: False
    reorders: Callable[[Any], bool] = lambda settings: False
    corrects_drift: Callable[[Any], bool] = lambda settings: False
    couples_rows: Callable[[Any], bool] = lambda settings: False


@dataclass(frozen=True)
class SmoothingCase:
    """What a search for smoothing factors looks at: one site.

    weights: of its linears, float32 [out_features, in_features]
    statistics: of its inputs; `sample` holds some of them
    ties: int [in_features], numbers of channels that must share a factor, or None
    grid: the points its weights will be rounded to
    activation: how its inputs will be rounded, or None
    """

    weights: tuple[FloatArray, ...]
    statistics: SiteStatistics
    ties: NDArray[np.integer[Any]] | None
    grid: Grid
    activation: Activation | None = None


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
    check: raises InputError where settings cannot work with one of these group sizes
    inputs: with these settings, how inputs are rounded at run time (numerics' ActivationSettings);
        None: not at all
    compares: whether, with these settings, methods are tried on every layer beside the one chosen
    floats: whether its factors are worth having without any rounding (`bits` 16)
    effort: as `Method.effort`, of `search`
    needs_hessian: whether `search` reads more of the Hessian than its diagonal
    """

    name: str
    help: str
    settings: type[Any]
    defaults: Mapping[str, Any]
    method: str
    search: Callable[[SmoothingCase, Any], tuple[SmoothingChoice, ...]]
    effort: float
    check: Callable[[Any, Collection[int]], None] = lambda settings, group_sizes: None
    inputs: Callable[[Any], Any] = lambda settings: None
    compares: Callable[[Any], bool] = lambda settings: False
    floats: bool = False
    needs_hessian: bool = True


@dataclass(frozen=True)
class Contents:
    """What layers are told from: what the weights file's metadata says of them, config.json, the
    headers, and `read`, which gives one (small) tensor by its name."""

    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Array]


@dataclass(frozen=True)
class ModuleTree:
    """What transformers' modules are, where that is not what the checkpoint's names say.

    renames: beginnings of names in the checkpoint and in the tree; the first that fits counts
    own_class: its linears are of a class that computes with `weight` itself
    """

    renames: tuple[tuple[str, str], ...] = ()
    own_class: bool = False

    def names(self, module: str) -> tuple[str, ...]:
        """Names to declare a module by: the checkpoint's, and the tree's if it is another."""
        for stored, inside in self.renames:
            if f"{module}.".startswith(stored):
                renamed = f"{inside}{module.removeprefix(stored)}"
                return (module,) if renamed == module else (module, renamed)
        return (module,)


AS_NAMED = ModuleTree()


@dataclass(frozen=True)
class CacheLayout:
    """How a format holds the scales of a rounded key-value cache; the tensors are those that
    `KVCache` names.

    declare: what `Format.config` states besides
    read: the cache of a checkpoint in the format, or None. Raises InputError where it is not
        understood
    """

    declare: Callable[[KVCache], Mapping[str, Any]]
    read: Callable[[Contents], KVCache | None]


@dataclass(frozen=True)
class Format:
    """A layout of quantized weights in safetensors files: a plug-in record (formats/).

    misfit: why a layer cannot be held and what would help, or None
    specs: names, dtypes and shapes of the tensors a layer becomes
    encode, decode: a rounded weight to those tensors and back; written apart from each other
    config: config.json's `quantization_config`, from the layers, the modules left dense and the
        module tree of the runtimes
    metadata: what the file's own metadata says of its layers
    layers: the layers of a checkpoint in this layout; empty where it is another. Every tensor of
        `specs` is then there. Raises InputError where the parts contradict one another or cannot
        be proven to be understood
    scale_dtype: what scales are rounded to, from the model's dtype ("BF16")
    config_keys: where in config.json the object of `config` belongs
    config_file: a file beside config.json that repeats that object
    model_config: keys that config.json must have besides, from the source's config.json
    container: how the weights are stored: "safetensors", or another that storage/folder.py
        knows
    file_metadata: the metadata of the weights file where its readers want just that; None: this
        tool's own entry, which holds `metadata`
    by_rows: whether row n of the weight is row n of every tensor of a layer, whatever the others
    global_scale: whether it holds one beside "e4m3" scales; without, theirs is 1
    mirrored: whether it holds the mirrored groups of a layer's symmetric grid (`Grid.mirrored`), as
        zeros or as negative scales, and its runtimes compute with them
    kv_cache: how it holds the scales of a rounded key-value cache; None: it does not
    type_of: what it calls the numbers of a layer (ggml's types), or None
    """

    name: str
    help: str
    misfit: Callable[[Layer], Misfit | None]
    specs: Callable[[Layer], tuple[TensorSpec, ...]]
    encode: Callable[[Layer, QuantizedWeight], dict[str, Array]]
    decode: Callable[[Layer, Mapping[str, Array]], QuantizedWeight]
    layers: Callable[[Contents], tuple[Layer, ...]]
    config: Callable[[Sequence[Layer], Sequence[str], ModuleTree], Mapping[str, Any] | None] = (
        lambda *_: None
    )
    metadata: Callable[[Sequence[Layer]], Mapping[str, Any]] = lambda layers: {}
    scale_dtype: Callable[[str], str] = lambda model: "float16"
    config_keys: tuple[str, ...] = ("quantization_config",)
    config_file: str | None = None
    file_metadata: Mapping[str, str] | None = None
    model_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    container: str = "safetensors"
    by_rows: Callable[[Layer], bool] = lambda layer: False
    global_scale: bool = True
    mirrored: Callable[[Layer], bool] = lambda layer: False
    kv_cache: CacheLayout | None = None
    type_of: Callable[[Layer], str | None] = lambda layer: None


@dataclass(frozen=True)
class PackedTensor:
    """A float tensor as a layout holds it that is only read.

    name, shape: as the model has it
    parts: names of the stored tensors that it is decoded from, by the layout's words for them
    block: rows and columns that share a scale, where the layout has such
    entries: whether entry n of its first axis (an expert) is decoded from entry n of each part
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    block: tuple[int, int] = (1, 1)
    entries: bool = False


@dataclass(frozen=True)
class ReadOnlyLayout:
    """A layout of quantized weights that is read as a source and never written: a plug-in record.

    tensors: the tensors of a checkpoint in this layout; empty where it is another. Raises
        InputError where the parts contradict one another
    decode: the float32 values of one, from its parts; of some of its entries from theirs, in the
        shape of those. Raises InputError for what means no number
    """

    name: str
    tensors: Callable[[Contents], tuple[PackedTensor, ...]]
    decode: Callable[[PackedTensor, Mapping[str, Array]], NDArray[np.float32]]
