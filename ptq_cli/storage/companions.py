"""What a model folder holds beside its weights, and what of it comes along into an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Format
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import (
    PARTIAL,
    copy_file,
    like_document,
    listing,
    named,
    read_document,
    sync_folder,
    write_file,
)
from ptq_cli.storage.made import JOB
from ptq_cli.storage.weights import ADAPTER_CONFIG, SUFFIX

GGUF_SUFFIX = ".gguf"
GGUF_NAME = f"model{GGUF_SUFFIX}"  # in an output folder
_WEIGHTS = (  # of whatever framework, and their indexes; none is what this run makes
    *(SUFFIX, GGUF_SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".pkl", ".h5", ".ot"),
    *(".msgpack", ".tflite", ".onnx", ".onnx_data", ".onnx.data", ".mlmodel", ".index.json"),
)
_DECLARED = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)  # of an earlier layout
_MADE = ("report.json", "quantization.json", JOB)  # by every run anew
_OWN_OUTPUT = {"quantization.json", JOB}  # a folder with one of these is an output of its own
_MODULES = "modules.json"  # of sentence-transformers: folders of modules, some with weights
_CACHE = ("__pycache__",)


@dataclass(frozen=True)
class Companions:
    """files: to be copied, by their names in the output, `1_Pooling/config.json`
    documents: what the checkpoint itself has of them, by name
    left: names of what is left out though one could miss it, and why
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left out, one line for each reason."""
        reasons = dict.fromkeys(self.left.values())
        named = {why: [name for name in self.left if self.left[name] == why] for why in reasons}
        return tuple(f"not copied: {fold_names(names)} ({why})" for why, names in named.items())


def companions(source: Checkpoint, fmt: Format) -> Companions:
    """What a model folder holds beside its weights, sub-folders included: config, tokenizer,
    licence, templates, code.

    Weights and hidden files stay, and so does an adapter, whose weights are no part of this model.
    A config.json that declares the quantization takes the place of the one here. Links to files are
    followed, in sub-folders only to what belongs to the model; links to folders are not.
    """
    if source.documents:
        return Companions(documents=source.documents)
    root = source.root or (source.folder if fmt.file_metadata and source.config else None)
    if root is None:
        return Companions()
    files: dict[str, Path] = {}
    left: dict[str, str] = {}
    modules = _modules_with_weights(root)
    for name, path, why in _files_under(root):
        top, inside, _ = name.partition("/")
        if not inside and name in (*_DECLARED, *_MADE):
            continue
        if name.rpartition("/")[2] == ADAPTER_CONFIG:
            left[name] = "an adapter is no part of the model; merge it first, if it should be"
        elif why:
            left[name] = why
        elif not name.lower().endswith(_WEIGHTS) or (inside and top in modules):
            files[name] = path
    return Companions(files, left=left)


def _modules_with_weights(root: Path) -> set[str]:
    """Folders that sentence-transformers loads as modules after the model, weights included."""
    if _MODULES not in listing(root):
        return set()
    try:
        modules = read_document(root / _MODULES)
        return {str(module["path"]).partition("/")[0] for module in modules} - {""}
    except (InputError, LookupError, TypeError):
        return set()  # it is copied as it is; whoever reads it will say so


def _files_under(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Each file, by its name from `root`, and why it cannot come along ("": it can); in order."""
    belonging = _places_of(root)
    folders = [""]
    while folders:
        inside = folders.pop(0)
        try:
            names = listing(root / inside)
        except FileError:
            if not inside:
                raise
            yield inside.rstrip("/"), root / inside, "it cannot be read"
            continue
        if inside and _OWN_OUTPUT & set(names):
            continue
        for name in (own for own in names if not own.startswith(".")):
            path, whole = root / inside / name, f"{inside}{name}"
            if path.is_file():
                out = bool(inside) and path.is_symlink() and not _lies_in(path, belonging)
                yield whole, path, "a link that leads out of the model folder" if out else ""
            elif path.is_dir() and path.is_symlink():
                yield whole, path, "a link to a folder"
            elif path.is_dir() and name not in _CACHE and not name.endswith(PARTIAL):
                folders.append(f"{whole}/")


def _places_of(root: Path) -> tuple[Path, ...]:
    """Where files of a model lie: its folder; for a snapshot in the cache of huggingface_hub, which
    is made of links, also the files that all snapshots share."""
    place = root.resolve()
    shared = place.parent.parent / "blobs"
    return (place, shared) if place.parent.name == "snapshots" else (place,)


def _lies_in(path: Path, places: tuple[Path, ...]) -> bool:
    target = path.resolve()
    return any(place in target.parents for place in places)


def copy_companions(found: Companions, out: Path) -> None:
    """Copy files, and write documents, into an output, except where it has its own by that name.
    Raises FileError."""
    taken = set(listing(out))
    for name in found.documents.keys() - taken:
        write_file(out / name, like_document(found.documents[name], {}))
    folders = set()
    for name, path in found.files.items():
        if name.partition("/")[0] in taken:
            continue
        copy = out / name
        with named(copy.parent):
            copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copy)
        folders |= {folder for folder in copy.parents if out in folder.parents}
    for folder in folders:
        sync_folder(folder)
