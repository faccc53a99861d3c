"""Which file of a model folder names its weights, and whether that is the whole model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ptq_cli.core.names import fold_names
from ptq_cli.errors import InputError
from ptq_cli.storage.files import listing

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
CALIBRATION_SUFFIX = ".calibration.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MERGE_FIRST = "merge it first, with peft: merge_and_unload(), then save_pretrained()"
_ADAPTER = "adapter_model"
_SHARD = re.compile(r"(.+?)[-_](\d{1,9})[-_]of[-_](\d{1,9})\.safetensors")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")


def weights_of(folder: Path) -> Path:
    """The file or index that names a model folder's weights.

    Raises:
        InputError: there is none, or several could be it; shards without their index.
    """
    names = listing(folder)
    index = [name for name in names if name.endswith(INDEX_SUFFIX)]
    single = [n for n in names if n.endswith(SUFFIX) and not n.endswith(CALIBRATION_SUFFIX)]
    models = [name for name in single if not name.startswith(_ADAPTER)] or single
    for preferred, found in (("model" + INDEX_SUFFIX, index), ("model" + SUFFIX, single)):
        if preferred in found:
            return folder / preferred
    if len(index) == 1:
        return folder / index[0]
    shards = [name for name in models if _shards_beside(name, names)]
    if shards and not index:
        raise _no_index(folder, shards)
    if len(models) == 1 and not index:
        return folder / models[0]
    if index or models:
        raise InputError(
            f"{folder}: several candidates: {', '.join(index or models)}",
            hint="name the one that holds the whole model, or its index",
        )
    raise _no_weights(folder, names)


def _shards_beside(name: str, names: Sequence[str]) -> list[str]:
    """The shards of a model among these names, one of which is `name`; none where it is no shard,
    or the only one there is."""
    match = _SHARD.fullmatch(name)
    if match is None or int(match[3]) < 2:
        return []
    others = [(other, _SHARD.fullmatch(other)) for other in names]
    return [other for other, own in others if own and (own[1], own[3]) == (match[1], match[3])]


def _of_how_many(name: str) -> tuple[str, int]:
    """The beginning of a shard's name, and how many shards it says there are."""
    match = _SHARD.fullmatch(name)
    assert match is not None
    return match[1], int(match[3])


def _no_index(folder: Path, shards: Sequence[str]) -> InputError:
    stem, count = _of_how_many(shards[0])
    own = _shards_beside(shards[0], shards)
    index = f"{stem}{INDEX_SUFFIX}"
    lost = "" if len(own) >= count else f", and {count - len(own)} of {count} shards"
    return InputError(
        f"{folder}: the index {index} is missing{lost}; there is {fold_names(own)}",
        hint=f"get it from where the shards came from (hf download REPO {index}), or save the"
        " model with transformers again",
    )


def _no_weights(folder: Path, names: Sequence[str]) -> InputError:
    if ADAPTER_CONFIG in names:
        return InputError(f"{folder}: an adapter (LoRA), not a model", hint=MERGE_FIRST)
    torch = [name for name in names if name.endswith(_TORCH)]
    hint = "save it with transformers once: save_pretrained() writes safetensors"
    message = f"{folder}: no .safetensors file in this folder"
    return InputError(message, hint=hint if torch else None)


def lone_shard(file: Path) -> str | None:
    """What to say of a file that is one shard, where the others do not lie beside it."""
    own = _shards_beside(file.name, [file.name])
    if not own or len(_shards_beside(file.name, listing(file.parent))) > 1:
        return None
    count = _of_how_many(file.name)[1]
    return f"{file}: one of {count} shards; what it holds is a part of a model"


def check_whole(file: Path) -> None:
    """Refuse one shard of a model whose others lie beside it. Raises InputError."""
    names = listing(file.parent)
    shards = _shards_beside(file.name, names)
    if len(shards) < 2:
        return
    stem, count = _of_how_many(file.name)
    index = f"{stem}{INDEX_SUFFIX}"
    if index not in names:
        raise _no_index(file.parent, shards)
    raise InputError(
        f"{file}: one of {count} shards, a part of a model",
        hint=f"name the model: its folder, or {index}",
    )
