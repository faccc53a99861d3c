"""Rounded weights as ggml's blocks (types.py says how they lie). unpack.py reads them back, and
shares no code with this."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Codes
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.formats.gguf.types import Bits, BlockType


def pack(kind: BlockType, weight: QuantizedWeight) -> NDArray[np.uint8]:
    """The rows of a weight as blocks, uint8 [out_features, blocks · nbytes].

    weight: its scales, and offsets and super-block's where the type has any, are those of the
        type's groups; zeros are the type's
    """
    rows, columns = weight.codes.shape
    blocks = np.empty((rows, columns // kind.block), kind.parts)
    codes = weight.codes.reshape(*blocks.shape, kind.block)
    if kind.name == "Q8_0":  # signed bytes
        codes = codes ^ np.uint8(128)
    for place in kind.codes:
        _put(blocks, place, codes)
    if weight.super_scales is None:
        stored = np.ascontiguousarray(weight.scales)
        own = blocks["d"]
        own[...] = stored.view(own.dtype).reshape(own.shape)
        if kind.grid.own_offsets:
            blocks["m"] = weight.offsets
    else:
        blocks["d"] = weight.super_scales
        if weight.super_offsets is not None:
            blocks["dmin"] = weight.super_offsets
        _put_multiples(blocks, kind, weight)
    return blocks.view(np.uint8).reshape(rows, blocks.shape[1] * kind.nbytes)


def _put(blocks: NDArray[np.void], place: Bits, numbers: Codes) -> None:
    """Put some bits of each number, uint8 [rows, blocks, numbers], where they belong."""
    per_byte, runs = 8 // place.bits, numbers.shape[-1] // place.run
    of_runs = numbers.reshape(*blocks.shape, runs, per_byte, place.run // per_byte)
    taken = of_runs >> np.uint8(place.shift) & np.uint8(2**place.bits - 1)
    packed = taken[..., 0, :]
    for nth in range(1, per_byte):
        packed = packed | taken[..., nth, :] << np.uint8(nth * place.bits)
    blocks[place.part] = packed.reshape(blocks[place.part].shape)


def _put_multiples(blocks: NDArray[np.void], kind: BlockType, weight: QuantizedWeight) -> None:
    """Multiples of the scale, and of the minimum where there are any: [rows, blocks, groups]."""
    groups = kind.block // kind.grid.group_size
    scales = weight.scales.view(np.uint8).reshape(*blocks.shape, groups)
    if kind.grid.scale_dtype == "int6":  # stored from 0 on
        scales = scales + np.uint8(32)
    if weight.offsets is None:
        numbers = scales
    else:
        mins = weight.offsets.reshape(scales.shape)
        if not kind.multiples:
            blocks["scales"] = _six_bits(scales, mins)
            return
        numbers = np.concatenate([scales, mins], axis=-1)
    for place in kind.multiples:
        _put(blocks, place, numbers)


def _six_bits(scales: Codes, mins: Codes) -> Codes:
    """Eight scales and minima of 6 bits each as 12 bytes: the first four scales, the first four
    minima; above them the two high bits of the other four; then their low halves."""
    twelve = np.empty((*scales.shape[:-1], 12), np.uint8)
    twelve[..., 0:4] = scales[..., :4] | scales[..., 4:] >> np.uint8(4) << np.uint8(6)
    twelve[..., 4:8] = mins[..., :4] | mins[..., 4:] >> np.uint8(4) << np.uint8(6)
    twelve[..., 8:] = scales[..., 4:] & np.uint8(15) | mins[..., 4:] << np.uint8(4)
    return twelve
