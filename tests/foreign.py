"""Quantized models as others publish them, and what each of their weights is: every number decoded
alone, from what the layout says of it. Shares no code with the package.

A model is `small_tensors` with q_proj [12, 64] and experts in the place of some of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.builders import random_weight, small_tensors, write_model
from tests.oracles import E2M1, E4M3

Q, GATE_UP, DOWN = "layers.0.q_proj", "layers.0.mlp.experts.gate_up_proj", "experts.down_proj"
ROWS, COLUMNS, EXPERTS = 12, 64, 3
F8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Foreign(NamedTuple):
    """tensors: what is stored; declared: quantization_config; weights: what they stand for, float32
    by name; model: more of config.json"""

    tensors: dict[str, np.ndarray]
    declared: dict[str, Any] | None
    weights: dict[str, np.ndarray]
    model: Mapping[str, Any] = MappingProxyType({})


def signed(table, code, bits):
    """A small float of `bits` bits."""
    size = float(table[code % 2 ** (bits - 1)])
    return np.float32(-size if code >= 2 ** (bits - 1) else size)


def random_bytes(*shape, seed=0, low=0, high=256):
    return np.random.default_rng((seed, *shape)).integers(low, high, shape, np.uint8)


def fp8_bytes(*shape, seed=0):
    """Of every kind but NaN."""
    found = random_bytes(*shape, seed=seed)
    return np.where(found % 128 == 127, np.uint8(5), found)


def fp8_weight(codes, scale_of):
    """scale_of(row, column)"""
    return np.array(
        [
            [signed(E4M3, int(code), 8) * np.float32(scale_of(n, k)) for k, code in enumerate(row)]
            for n, row in enumerate(codes)
        ],
        np.float32,
    )


def fp4_weight(packed, scale_of):
    """Two to a byte, the lower first."""
    return np.array(
        [
            [
                signed(E2M1, int(row[k // 2]) >> 4 * (k % 2) & 15, 4) * np.float32(scale_of(n, k))
                for k in range(2 * len(row))
            ]
            for n, row in enumerate(packed)
        ],
        np.float32,
    )


def power(byte):
    return 2.0 ** (int(byte) - 127)


def hf_block() -> Foreign:
    codes, block = fp8_bytes(ROWS, COLUMNS), (8, 32)
    scales = random_weight(2, 2, dtype=np.float32) + np.float32(0.1)
    weight = fp8_weight(codes, lambda n, k: scales[n // 8, k // 32])
    return Foreign(
        {f"{Q}.weight": codes.view(F8), f"{Q}.weight_scale_inv": scales},
        {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"},
        {f"{Q}.weight": weight},
    )


def hf_tensor() -> Foreign:
    codes, scale = fp8_bytes(ROWS, COLUMNS), np.float32(0.0123)
    return Foreign(
        {
            f"{Q}.weight": codes.view(F8),
            f"{Q}.weight_scale_inv": np.array(scale),
            f"{Q}.activation_scale": np.array(np.float32(2)),
        },
        {"quant_method": "fp8", "activation_scheme": "static"},
        {f"{Q}.weight": fp8_weight(codes, lambda n, k: scale)},
    )


def deepseek_v4() -> Foreign:
    """FP8 in blocks beside FP4 in groups of 32, both with exponents called `scale`."""
    codes, fours = fp8_bytes(ROWS, COLUMNS), random_bytes(ROWS, COLUMNS // 2)
    scales, small = random_bytes(2, 2, low=110, high=130), random_bytes(ROWS, 2, low=110, high=130)
    expert = "layers.0.ffn.experts.0.w1"
    return Foreign(
        {
            f"{Q}.weight": codes.view(F8), f"{Q}.scale": scales.view(E8M0),
            f"{expert}.weight": fours.view(np.int8), f"{expert}.scale": small.view(E8M0),
        },
        {"quant_method": "fp8", "weight_block_size": [8, 32], "scale_fmt": "ue8m0"},
        {
            f"{Q}.weight": fp8_weight(codes, lambda n, k: power(scales[n // 8, k // 32])),
            f"{expert}.weight": fp4_weight(fours, lambda n, k: power(small[n, k // 32])),
        },
    )  # fmt: skip


def fbgemm() -> Foreign:
    codes, scales = fp8_bytes(ROWS, COLUMNS), np.abs(random_weight(ROWS, 1, dtype=np.float32))
    return Foreign(
        {f"{Q}.weight": codes.view(F8), f"{Q}.weight_scale": scales},
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
        {f"{Q}.weight": fp8_weight(codes, lambda n, k: scales[n, 0])},
    )


def modelopt_fp8() -> Foreign:
    codes, scale = fp8_bytes(ROWS, COLUMNS), np.float32(0.031)
    return Foreign(
        {
            f"{Q}.weight": codes.view(F8),
            f"{Q}.weight_scale": np.array(scale),
            f"{Q}.input_scale": np.array(np.float32(0.5)),
            "layers.0.self_attn.k_proj.k_scale": np.array(np.float32(1)),
        },
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        {f"{Q}.weight": fp8_weight(codes, lambda n, k: scale)},
    )


def modelopt_nvfp4() -> Foreign:
    fours, second = random_bytes(ROWS, COLUMNS // 2), np.float32(0.0017)
    scales = random_bytes(ROWS, COLUMNS // 16, high=127)
    weight = fp4_weight(fours, lambda n, k: np.float32(E4M3[scales[n, k // 16]]) * second)
    return Foreign(
        {
            f"{Q}.weight": fours,
            f"{Q}.weight_scale": scales.view(F8),
            f"{Q}.weight_scale_2": np.array(second),
            f"{Q}.input_scale": np.array(np.float32(0.5)),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        {f"{Q}.weight": weight},
    )


def gpt_oss() -> Foreign:
    """Experts in one tensor, [experts, in, out], gate and up taking turns."""
    hidden, inner = 32, 64
    tensors, weights = {}, {}
    for name, out, inputs in (
        (GATE_UP, 2 * inner, hidden),
        (f"layers.0.mlp.{DOWN}", hidden, inner),
    ):
        blocks = random_bytes(EXPERTS, out, inputs // 32, 16, seed=out)
        scales = random_bytes(EXPERTS, out, inputs // 32, seed=out, low=110, high=130)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[f"{name}_bias"] = random_weight(EXPERTS, out)
        rows = blocks.reshape(EXPERTS, out, inputs // 2)
        weights[name] = np.stack(
            [
                fp4_weight(rows[e], lambda n, k, e=e, s=scales: power(s[e, n, k // 32])).T
                for e in range(EXPERTS)
            ]
        )
    model = {"model_type": "gpt_oss", "hidden_size": hidden, "intermediate_size": inner}
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return Foreign(tensors, declared, weights, model)


def nf4(nested: bool = False) -> Foreign:
    codes, count = random_bytes(ROWS * COLUMNS // 2, 1), ROWS * COLUMNS // 64
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS],
    }  # fmt: skip
    name = f"{Q}.weight"
    tensors = {name: codes, f"{name}.quant_map": np.array(NF4, np.float32)}
    if nested:
        inner, table = random_bytes(count), random_weight(256, dtype=np.float32)
        outer = np.array([0.5, 0.25], np.float32)
        state |= {"nested_blocksize": 8, "nested_offset": 0.03, "nested_dtype": "float32"}
        tensors |= {f"{name}.absmax": inner, f"{name}.nested_absmax": outer}
        tensors[f"{name}.nested_quant_map"] = table
        absmax = [table[code] * outer[i // 8] + np.float32(0.03) for i, code in enumerate(inner)]
    else:
        absmax = list(random_weight(count, dtype=np.float32))
        tensors[f"{name}.absmax"] = np.array(absmax, np.float32)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = text
    flat = [
        np.float32(NF4[int(codes[i // 2, 0]) >> (0 if i % 2 else 4) & 15]) * absmax[i // 64]
        for i in range(ROWS * COLUMNS)
    ]
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    weight = np.array(flat, np.float32).reshape(ROWS, COLUMNS)
    return Foreign(tensors, declared, {name: weight})


def nf4_nested() -> Foreign:
    return nf4(nested=True)


def llm_int8() -> Foreign:
    codes = random_bytes(ROWS, COLUMNS).view(np.int8)
    scales = np.abs(random_weight(ROWS, dtype=np.float32))
    weight = [
        [np.float32(code) * scales[n] * np.float32(1 / 127) for code in row]
        for n, row in enumerate(codes)
    ]
    return Foreign(
        {
            f"{Q}.weight": codes,
            f"{Q}.SCB": scales,
            f"{Q}.weight_format": np.zeros((), np.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {f"{Q}.weight": np.array(weight, np.float32)},
    )


FOREIGN = {
    function.__name__: function
    for function in (
        hf_block, hf_tensor, deepseek_v4, fbgemm, modelopt_fp8, modelopt_nvfp4, gpt_oss, nf4,
        nf4_nested, llm_int8,
    )
}  # fmt: skip


def write_foreign(folder: Path, model: Foreign, dtype: str | None = "bfloat16") -> Path:
    """A model folder with a tokenizer of a few bytes."""
    folder.mkdir()
    plain = {k: v for k, v in small_tensors().items() if k not in model.weights}
    write_model(folder / "model.safetensors", plain | model.tensors, {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama", **model.model}
    config |= {} if dtype is None else {"torch_dtype": dtype}
    if model.declared is not None:
        config["quantization_config"] = model.declared
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
