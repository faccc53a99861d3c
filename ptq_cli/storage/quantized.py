"""Quantized weights, opened: outputs of this tool and whatever else is in a layout that it knows;
and how to tell them from float models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.layer import Layer
from ptq_cli.core.names import by_number, fold_names
from ptq_cli.core.plugins import Contents, Format, PackedTensor
from ptq_cli.core.tensors import FLOAT_DTYPES
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, NotRead, stated_in
from ptq_cli.formats.sources import mlx_weights, quantized_as
from ptq_cli.models.linears import adapter_tensors
from ptq_cli.registry import FORMATS, READ_ONLY, format_named, read_only_layout
from ptq_cli.storage import files
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.companions import GGUF_SUFFIX
from ptq_cli.storage.decoded import decoded_weight
from ptq_cli.storage.gguf_file import SCALES, first_shard, read_gguf_header
from ptq_cli.storage.gguf_model import open_gguf
from ptq_cli.storage.tensors import WRITABLE, quantized_entry
from ptq_cli.storage.weights import INDEX_SUFFIX, MERGE_FIRST, SUFFIX, check_whole

# What this tool's own weights files without one quantized layer say.
_SMOOTHED: tuple[str, dict[str, Any]] = ("ptq", {})
_MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class QuantizedFolder:
    """An opened output: its layers, and their weights one by one; kv_cache: how the keys and values
    that its attentions cache are rounded too, or None."""

    checkpoint: Checkpoint
    fmt: Format
    layers: Mapping[str, Layer]
    kv_cache: KVCache | None = None

    def load(self, module: str) -> QuantizedWeight:
        """The rounded weight of one module. Raises InputError for an unknown name."""
        if module not in self.layers:
            raise InputError(
                f"{self.checkpoint.path}: no quantized module {module!r}",
                hint=f"there is {next(iter(self.layers), 'none')!r}, for instance",
            )
        return decoded_weight(self.checkpoint, self.fmt, self.layers[module])

    @property
    def packed_names(self) -> set[str]:
        """Names of the tensors that a layer or the cache owns."""
        names = {spec.name for layer in self.layers.values() for spec in self.fmt.specs(layer)}
        return names.union(spec.name for spec in self.kv_cache.specs()) if self.kv_cache else names

    def untouched(self) -> Iterator[str]:
        """Names of the tensors that neither a layer nor the cache owns."""
        packed = self.packed_names
        return (name for name in self.checkpoint.tensors if name not in packed)


def _config_in(folder: Path) -> Mapping[str, Any] | None:
    """config.json of a folder, where it has one."""
    if "config.json" not in files.listing(folder):
        return None
    found = files.read_document(folder / "config.json")
    return found if isinstance(found, dict) else None


def open_quantized(path: Path, config: Mapping[str, Any] | None = None) -> QuantizedFolder:
    """Open a quantized folder (or weights file): this tool's, or another's in a layout it knows.

    config: config.json of the model it was made from, by which a GGUF file without one has the
        checkpoint's names

    Raises:
        InputError: something else, or layers that contradict the tensors.
    """
    gguf = gguf_of(path)
    if gguf is not None:
        fmt = format_named("gguf")
        root = path if path.is_dir() else None
        own = None if root is None else _config_in(root)
        opened, found = open_gguf(gguf, root, fmt, config if own is None else own)
        if not found:
            raise InputError(f"{gguf}: no tensor in it is quantized")
        if opened.scaled:
            raise NotRead(
                f"{gguf}: {fold_names(opened.scaled)} have scales beside them",
                hint="as a source it may be read: ptq rtn, ptq gptq, ptq dequantize",
            )
        return QuantizedFolder(opened, fmt, _by_module(found))
    checkpoint = open_checkpoint(path)
    folder = None if find_read_only(checkpoint) else find_quantized(checkpoint)
    if folder is not None:
        return folder
    if quantized_entry(checkpoint.path, checkpoint.metadata) == _SMOOTHED:
        raise InputError(
            f"{path}: nothing in it is quantized, these are smoothed float weights",
            hint="quantize them, and take what that writes: ptq rtn, gptq or pack",
        )
    unknown = "not a quantized checkpoint in a layout this tool knows"
    already = already_quantized(checkpoint)
    if mlx_weights(checkpoint.specs):
        hint = "this looks like MLX's, whose bits and groups stand in config.json beside it"
        raise InputError(f"{path}: {unknown}", hint=hint)
    if already is not None:
        what, shown = already
        said = f" ({shown})" if shown else ""
        hint = "as a source it may be read: ptq rtn, ptq gptq, ptq dequantize"
        raise NotRead(f"{path}: {unknown}: {what}{said}", hint=hint)
    raise InputError(f"{path}: {unknown}", hint=f"it knows {', '.join(FORMATS)}")


def find_quantized(checkpoint: Checkpoint) -> QuantizedFolder | None:
    """The layers of a checkpoint in whatever layout this tool knows; None where it is in none.

    Raises:
        InputError: layers that contradict the tensors; one shard of several.
    """
    check_whole(checkpoint.weights)
    own = quantized_entry(checkpoint.path, checkpoint.metadata)
    names = [name for name in FORMATS if name != "ptq"] if own is None else [own[0]]
    config = declared_config(checkpoint)
    contents = Contents({} if own is None else own[1], config, checkpoint.specs, checkpoint.read)
    for name in names:
        with stated_in(checkpoint.weights):
            fmt = format_named(name)
            layers = fmt.layers(contents)
            cache = fmt.kv_cache.read(contents) if layers and fmt.kv_cache else None
        if layers:
            return QuantizedFolder(checkpoint, fmt, _by_module(layers), cache)
    return None


def find_read_only(checkpoint: Checkpoint) -> tuple[str, tuple[PackedTensor, ...]] | None:
    """The name of a layout that is only read and the tensors of a checkpoint that are in it, or
    None. Raises InputError where the tensors contradict one another."""
    if quantized_entry(checkpoint.path, checkpoint.metadata) is not None:
        return None
    contents = Contents({}, declared_config(checkpoint), checkpoint.specs, checkpoint.read)
    for name in READ_ONLY:
        with stated_in(checkpoint.weights):
            tensors = read_only_layout(name).tensors(contents)
        if tensors:
            return name, tensors
    return None


def _by_module(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layer 10 after layer 9, wherever they are stored."""
    named = {layer.module: layer for layer in layers}
    return {module: named[module] for module in by_number(named)}


def holds_quantized(path: Path) -> bool:
    """Whether a path holds quantized weights, in whatever layout. Raises InputError.

    An output of this tool without one quantized layer, like a smoothed float model, does not. A
    GGUF file whose NVFP4 tensors have scales of their own, too, is decoded only.
    """
    gguf = gguf_of(path)
    if gguf is not None:
        specs = [tensor.spec for tensor in read_gguf_header(gguf).tensors]
        kinds = {spec.dtype for spec in specs}.difference(FLOAT_DTYPES)
        return bool(kinds) and not any(spec.name.endswith(SCALES) for spec in specs)
    checkpoint = open_checkpoint(path)
    own = quantized_entry(checkpoint.path, checkpoint.metadata)
    return own not in (None, _SMOOTHED) or already_quantized(checkpoint) is not None


def declared_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json, with what quantize_config.json or hf_quant_config.json (of Model Optimizer) says
    where config.json does not.

    Raises:
        InputError: the two contradict one another.
    """
    config, name = checkpoint.config, "quantize_config.json"
    listing = files.listing(checkpoint.folder)
    if _MODELOPT in listing and not config.get("quantization_config"):
        stated = files.read_document(checkpoint.folder / _MODELOPT)
        own = stated.get("quantization") if isinstance(stated, dict) else None
        if not isinstance(own, dict):
            raise InputError(f"{checkpoint.folder / _MODELOPT}: no object of its quantization")
        return {**config, "quantization_config": {**own, "quant_method": "modelopt"}}
    if name not in listing:
        return config
    beside = files.read_document(checkpoint.folder / name)
    if not isinstance(beside, dict):
        raise InputError(f"{checkpoint.folder / name}: not a JSON object")
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or not stated:
        return {**config, "quantization_config": {"quant_method": "gptq", **beside}}
    differing = sorted(k for k in stated.keys() & beside.keys() if stated[k] != beside[k])
    if differing:
        raise InputError(
            f"{checkpoint.folder}: config.json and {name} differ in {', '.join(differing)}"
        )
    return config


def is_gguf_file(path: Path) -> bool:
    return path.suffix == GGUF_SUFFIX and not path.is_dir()


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that `path` names, or holds as its only weights."""
    if not path.is_dir():
        return path if path.suffix == GGUF_SUFFIX else None
    names = files.listing(path)
    found = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names) or not found:
        return None
    if shard := first_shard(found):
        return path / shard
    if len(found) > 1:
        raise InputError(
            f"{path}: several candidates: {', '.join(found)}", hint="name the file itself"
        )
    return path / found[0]


def already_quantized(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """How a checkpoint is quantized, as `quantized_as`. Of a bare file the tensors alone say it."""
    config = declared_config(checkpoint) if checkpoint.root is not None else {}
    found = quantized_as(checkpoint.specs, config)
    own = None if found is None else quantized_entry(checkpoint.path, checkpoint.metadata)
    return found if found is None or own is None else (f"ptq's format {own[0]}", found[1])


def not_read(path: Path, what: str, shown: str) -> NotRead:
    """The error of a model that is quantized already, in a layout that is not read here."""
    if not shown:
        return NotRead(
            f"{path}: config.json says that it is quantized ({what}), but no tensor is",
            hint="take quantization_config out of config.json if all weights are float",
        )
    return NotRead(
        f"{path}: quantized already: {what} ({shown}), which is not read as a source",
        hint="start from the float model",
    )


def check_float(checkpoint: Checkpoint) -> None:
    """Refuse what is no whole float model: quantized already, an adapter, a shard; and dtypes that
    could not be copied."""
    check_whole(checkpoint.weights)
    found = already_quantized(checkpoint) if checkpoint.origin is None else None
    if found is not None:
        raise not_read(checkpoint.path, *found)
    if names := adapter_tensors(checkpoint.specs):
        message = f"{checkpoint.path}: an adapter (LoRA) that is not merged into its model"
        raise InputError(f"{message}: {fold_names(names)}", hint=MERGE_FIRST)
    for stored in checkpoint.tensors.values():
        if stored.spec.dtype not in WRITABLE:
            raise InputError(
                f"{stored.file}: tensor {stored.spec.name!r}: dtype {stored.spec.dtype} can be"
                " neither quantized nor copied"
            )
