"""Diagonal Fisher information: `mean_n g²` of per-sample gradients, streamed from `.npy` files.

`<module>.npy` holds the gradient of the loss at the module's weight for each of n samples,
`[n, *the weight's shape]` or `[n, P]`, in any float dtype; a folder `<module>/` of such shards
counts as one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import FisherInfo
from ptq_cli.core.names import first_and_others
from ptq_cli.core.tensors import is_float
from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.npy import InputsFile

_PIECE = 1 << 22  # gradients squared at a time


InputsFiles = tuple[InputsFile, ...]


def fisher_information(info: FisherInfo, files: InputsFiles) -> NDArray[np.float32]:
    """`mean_n g²`, float32 in the shape of the tensor, summed in float64.

    Raises:
        InputError: NaN or inf, with file and sample.
    """
    size = prod(info.shape)
    total = np.zeros(size, np.float64)
    for file in files:
        rows = size // file.in_features  # of the file's rows, in one sample
        step = max(1, min(rows, _PIECE // file.in_features))
        for start in range(0, file.n_tokens, rows):
            for row in range(0, rows, step):
                stop = min(rows, row + step)
                piece = file.read(start + row, start + stop).astype(np.float64).ravel()
                if not np.isfinite(piece).all():
                    raise InputError(
                        f"{file.npy.path}: NaN or inf in sample {start // rows}",
                        hint="take the gradients again",
                    )
                first = row * file.in_features
                total[first : first + len(piece)] += piece * piece
    total /= info.n_samples
    return total.astype(np.float32).reshape(info.shape)


def match_gradients(
    checkpoint: Checkpoint, found: Mapping[str, InputsFiles]
) -> dict[str, FisherInfo]:
    """What gradients tell, by module.

    Raises:
        InputError: gradients that fit no weight; all such are listed.
    """
    result: dict[str, FisherInfo] = {}
    wrong: dict[str, str] = {}
    for module, files in found.items():
        stored = checkpoint.tensors.get(f"{module}.weight")
        if stored is None or not is_float(stored.spec):
            wrong[module] = f"{files[0].npy.path}: the model has no weight {module + '.weight'!r}"
            continue
        shape = stored.spec.shape
        misfits = [file for file in files if not _fits(file.npy.shape, shape)]
        n = sum(file.npy.shape[0] for file in files)
        if misfits:
            wrong[module] = (
                f"{misfits[0].npy.path}: gradients {list(misfits[0].npy.shape)} are neither [n,"
                f" {', '.join(map(str, shape))}] nor [n, {prod(shape)}]"
            )
        elif n == 0:
            wrong[module] = f"{files[0].npy.path}: gradients of no samples"
        result[module] = FisherInfo(module, shape, n)
    if wrong:
        raise InputError(first_and_others(wrong))
    return result


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return shape[1:] in (weight, (prod(weight),)) and prod(weight) > 0
