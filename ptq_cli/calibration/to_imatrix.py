"""Statistics as an importance matrix, which llama.cpp's own quantizer takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.calibration.from_imatrix import Place, gguf_places
from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.imatrix import write_imatrix

Sums = dict[str, tuple[NDArray[np.float32], list[int]]]


def check_importance(checkpoint: Checkpoint, path: Path, replaced: bool) -> None:
    """Refuse what could not be written. replaced: whether a file may be there

    Raises:
        InputError: names in GGUF are not known; a file that exists.
    """
    gguf_places(checkpoint)
    if path.exists() and not replaced:
        raise InputError(f"{path}: exists already", hint="--force replaces it")


def write_importance(statistics: Path, checkpoint: Checkpoint, path: Path, replaced: bool) -> None:
    """Write the importance matrix of a statistics file. Raises InputError where another file is
    there that may not be replaced."""
    sums = _sums(statistics, gguf_places(checkpoint))
    write_imatrix(path, sums, [statistics.name], replaced)


def _sums(path: Path, places: Mapping[str, Place]) -> Sums:
    """Sums of squares and tokens by tensors in GGUF; of an expert that has the statistics of all
    beside it, for its own tokens."""
    source, found = open_calibration(path), Sums()
    for site, info in source.sites.items():
        means = source.load(site).hessian.diagonal()
        tokens = info.n_tokens if info.own_tokens is None else info.own_tokens
        for linear in info.linears:
            if f"{linear}.weight" not in places:
                continue
            place = places[f"{linear}.weight"]
            nothing = np.zeros((place.of, info.in_features), np.float32), [0] * place.of
            values, counts = found.setdefault(place.stored, nothing)
            values[place.number] = means * np.float32(tokens)
            counts[place.number] = tokens
    return found
