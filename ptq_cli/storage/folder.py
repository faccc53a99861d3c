"""Output folders, assembled from finished units. (storage/quantized.py reads them.)

    model.safetensors (or shards with model.safetensors.index.json)
    quantization.json   what was done: method, settings, version, fingerprints of the inputs
    report.json         the error report
    config.json, tokenizer …   copied, where the input was a model folder (storage/companions.py)

Tensors that were not quantized are copied byte for byte. The metadata of each weights file states
the layers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.models.linears import module_tree
from ptq_cli.models.ties import untied
from ptq_cli.storage import files
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.companions import GGUF_NAME, companions, copy_companions
from ptq_cli.storage.gguf_model import GgufOutput, check_gguf, write_gguf_model
from ptq_cli.storage.made import REPORT
from ptq_cli.storage.onnx_file import library as onnx_library
from ptq_cli.storage.onnx_file import write_graph
from ptq_cli.storage.shards import Metadata, Part, Shards, mapped
from ptq_cli.storage.tensors import Bytes, quantized_metadata
from ptq_cli.storage.weights import INDEX_SUFFIX

MAX_SHARD = 4 * 10**9
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
