"""Output folders: assembled from finished units, and read back.

    model.safetensors (or shards with model.safetensors.index.json)
    quantization.json   what was done: method, settings, version, fingerprints of the inputs
    report.json         the error report
    config.json, tokenizer …   copied, where the input was a model folder (storage/companions.py)

Tensors that were not quantized are copied byte for byte. The metadata of each weights file states
the layers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.names import by_number, fold_names
from ptq_cli.core.plugins import Contents, Format, PackedTensor
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.tensors import FLOAT_DTYPES
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, NotRead, stated_in
from ptq_cli.formats.sources import mlx_weights, quantized_as
from ptq_cli.models.linears import adapter_tensors, module_tree
from ptq_cli.models.ties import untied
from ptq_cli.registry import FORMATS, READ_ONLY, format_named, read_only_layout
from ptq_cli.storage import files
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from ptq_cli.storage.companions import GGUF_NAME, GGUF_SUFFIX, companions, copy_companions
from ptq_cli.storage.decoded import decoded_weight
from ptq_cli.storage.gguf_file import SCALES, first_shard, read_gguf_header
from ptq_cli.storage.gguf_model import GgufOutput, check_gguf, open_gguf, write_gguf_model
from ptq_cli.storage.made import REPORT
from ptq_cli.storage.onnx_file import library as onnx_library
from ptq_cli.storage.onnx_file import write_graph
from ptq_cli.storage.shards import Metadata, Part, Shards, mapped
from ptq_cli.storage.tensors import WRITABLE, Bytes, quantized_entry, quantized_metadata
from ptq_cli.storage.weights import INDEX_SUFFIX, MERGE_FIRST, SUFFIX, check_whole

MAX_SHARD = 4 * 10**9
_SMOOTHED: tuple[str, dict[str, Any]] = (
    "ptq",
    {},
)  # of this tool's own weights files without one quantized layer
_MODELOPT = "hf_quant_config.json"
_LONGEST = "m" * 16  # a method's name in the metadata, at its longest


@dataclass(frozen=True)
class Assembly:
    """What goes into an output folder: modules in order, each with its tensors; the scales of the
    cache are parts, too.

    alone: what a weights file says that becomes the whole output, the folder is then no more than
        its place for a while; None: the folder is the output
    """

    parts: Sequence[tuple[str, Sequence[Bytes | StoredTensor]]]
    layers: Mapping[str, Layer]
    dense: Sequence[str]
    fmt: Format
    documents: dict[str, Any]
    config: Mapping[str, Any] | None = None  # config.json to extend, if it is not the source's
    kv_cache: KVCache | None = None
    types: GgufTypes = ALL_TOLD
    alone: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Container:
    """A way to store weights.

    check: raises InputError for whatever could keep it from being written; what is to be said
        of tensors that are left dense
    filled: whether tensors go to their places one by one, as they are; else it is written whole,
        and those that are not quantized are cast
    complete: adds what belongs beside the filled files
    max_shard: bytes of tensors in one file, unless asked for; None: all
    """

    check: Callable[[Checkpoint, Sequence[Layer], Sequence[str], GgufTypes], tuple[str, ...]] = (
        lambda *_: ()
    )
    filled: bool = True
    complete: Callable[[Path, Sequence[str], Mapping[str, Layer], Format], None] = lambda *_: None
    max_shard: int | None = MAX_SHARD


def _check_onnx(*_: object) -> tuple[str, ...]:
    onnx_library()
    return ()


CONTAINERS = {
    "safetensors": Container(),
    "onnx": Container(check=_check_onnx, complete=write_graph),
    "gguf": Container(check=check_gguf, filled=False, max_shard=None),
}


def container_of(fmt: Format) -> Container:
    return CONTAINERS[fmt.container]


def begin_weights(
    folder: Path, parts: Sequence[Part], layers: Mapping[str, Layer], fmt: Format, max_shard: int
) -> Shards | None:
    """Lay out the weights files in a folder, to be filled before `write_folder`; None where the
    container is written whole."""
    if not container_of(fmt).filled:
        return None
    with files.named(folder):
        folder.mkdir(exist_ok=True)
    shards = Shards(folder, parts, longest_metadata(layers, fmt), max_shard)
    for name in set(files.listing(folder)).difference(shards.names):
        files.remove(folder / name)  # of an older output: a run was killed while it put it aside
    return shards


def write_folder(
    out: Path,
    assembly: Assembly,
    source: Checkpoint,
    max_shard: int | None = None,
    shards: Shards | None = None,
    listen: Listener = nobody,
) -> None:
    """Write the folder at its temporary place and prove it equal to what was staged.

    shards: what `begin_weights` laid out, and what is in there already
    """
    if shards is None:
        files.remove(out)
        with files.named(out):
            out.mkdir()
        parts = [(name, [tensor.spec for tensor in own]) for name, own in assembly.parts]
        shards = begin_weights(out, parts, assembly.layers, assembly.fmt, max_shard or MAX_SHARD)
    if shards is None:
        whole = [(name, [mapped(tensor) for tensor in own]) for name, own in assembly.parts]
        size = sum(tensor.spec.nbytes for _, tensors in whole for tensor in tensors)
        listen(Progress("write", 0, 1, GGUF_NAME, 0, size))
        place = GgufOutput(out / GGUF_NAME, max_shard, assembly.alone or {}, assembly.types)
        write_gguf_model(place, whole, assembly.layers, assembly.fmt, source)
        listen(Progress("write", 1, 1, GGUF_NAME, size, size))
    else:
        _write_weights(out, assembly, shards, listen)
    if assembly.alone is not None:
        files.write_file(out / REPORT, files.to_json(assembly.documents[REPORT]))
        files.sync_folder(out)
        return
    for name, document in (assembly.documents | _declaration(assembly, source)).items():
        if name == "config.json":
            files.write_file(out / name, files.like_document(document, source.config))
        else:
            files.write_file(out / name, files.to_json(document))
    copy_companions(companions(source, assembly.fmt), out)
    files.sync_folder(out)


def _write_weights(out: Path, assembly: Assembly, shards: Shards, listen: Listener) -> None:
    """Shards of safetensors, with an index where there are several."""
    missing, names = shards.missing, shards.names
    size = sum(tensor.spec.nbytes for _, tensors in assembly.parts for tensor in tensors)
    done = 0
    for _, tensors in assembly.parts:
        listen(Progress("write", 0, len(names), names[0], done, size))
        shards.put(tensor for tensor in tensors if tensor.spec.name in missing)
        done += sum(tensor.spec.nbytes for tensor in tensors)
    weight_map = shards.finish(lambda names: _metadata(names, assembly.layers, assembly.fmt))
    listen(Progress("write", len(names), len(names), names[-1], size, size))
    if len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.write_file(out / f"model{INDEX_SUFFIX}", files.to_json(index))
    container_of(assembly.fmt).complete(out, names, assembly.layers, assembly.fmt)


def longest_metadata(layers: Mapping[str, Layer], fmt: Format) -> Metadata:
    """That of a file that holds some modules, as long as it can become."""
    unnamed = {name: replace(layer, method=_LONGEST) for name, layer in layers.items()}
    return lambda names: _metadata(names, unnamed, fmt)


def _metadata(names: Sequence[str], layers: Mapping[str, Layer], fmt: Format) -> Mapping[str, str]:
    """Metadata of the weights file that holds these modules."""
    if fmt.file_metadata is not None:
        return fmt.file_metadata
    return quantized_metadata(fmt, [layers[name] for name in names if name in layers])


def _declaration(assembly: Assembly, source: Checkpoint) -> dict[str, Any]:
    """config.json with what the runtime must know, and the file that repeats it."""
    fmt = assembly.fmt
    source_config = source.config if assembly.config is None else assembly.config
    own = untied(source_config, assembly.layers, assembly.dense)
    declared = fmt.config(list(assembly.layers.values()), assembly.dense, module_tree(own))
    if declared is None:
        same = own is source_config and (source.origin is None or source.gguf is not None)
        return {} if same else {"config.json": own}
    if assembly.kv_cache is not None and fmt.kv_cache is not None:
        declared = {**declared, **fmt.kv_cache.declare(assembly.kv_cache)}
    config = {**own, **fmt.model_config(own), **dict.fromkeys(fmt.config_keys, declared)}
    documents: dict[str, Any] = {"config.json": config}
    if fmt.config_file is not None:
        documents[fmt.config_file] = declared
    return documents


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
