"""The golden vectors of small floats, made by the clients' own code: `python make_small_floats.py`.

compressed-tensors 0.20.0, transformers 5.23.0 with torch 2.13.0, mlx 0.32.4. Each file holds the
`weight` (float32), what the client makes of it under the client's names, and what the client reads
back from that (`dequant`, float32); index.json gets an entry for each.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

HERE = Path(__file__).parent
ROWS, COLUMNS, BLOCK = 24, 64, (8, 32)
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
COMPRESSED = {
    "float_rows": ("float-quantized", {**FP8, "strategy": "channel"}),
    "float_tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "float_block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [*BLOCK]}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {**FP4, **MX}),
    "mxfp8": ("mxfp8-quantized", {**FP8, **MX}),
}


def weights() -> torch.Tensor:
    """Of many sizes, with a group of zeros, and halves of a scale: ties."""
    rng = np.random.default_rng(15)
    values = rng.normal(size=(ROWS, COLUMNS)) * rng.lognormal(sigma=1.5, size=(ROWS, 1))
    values[3, :32] = 0
    values[4] = np.arange(COLUMNS) % 25 / 4 * np.where(np.arange(COLUMNS) % 2, -1, 1)
    return torch.from_numpy(values.astype(np.float32))


def extremes(weight: torch.Tensor, strategy: str, size: int | None) -> tuple[Any, Any]:
    """Least and greatest of what shares a scale, in the shape of the scales."""
    if strategy == "tensor":
        return weight.min(), weight.max()
    if strategy == "block":
        tiles = weight.unflatten(0, (-1, BLOCK[0])).unflatten(2, (-1, BLOCK[1]))
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    groups = weight.unflatten(1, (-1, size or COLUMNS))
    return groups.amin(-1), groups.amax(-1)


def compressed_tensors(name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    args = QuantizationArgs(symmetric=True, dynamic=False, **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    weight, state = weights(), {}
    low, high = extremes(weight, settings["strategy"], settings.get("group_size"))
    if settings["strategy"] == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    whole = state.get("weight_global_scale")
    scale, _ = calculate_qparams(low, high, args, global_scale=whole)
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress({"weight": weight, "weight_scale": scale, **state}, scheme)
    again = compressor.decompress(dict(stored), scheme)["weight"]
    peer = {("stored." + key): value for key, value in stored.items()}
    return {"weight": weight, "dequant": again.float(), **peer}


def mlx(mode: str) -> dict[str, torch.Tensor]:
    weight = weights()
    codes, scales = mx.quantize(mx.array(weight.numpy()), mode=mode)
    again = mx.dequantize(codes, scales, mode=mode, dtype=mx.float32)
    return {
        "weight": weight,
        "dequant": torch.from_numpy(np.array(again)),
        "stored.weight": torch.from_numpy(np.array(codes)),
        "stored.scales": torch.from_numpy(np.array(scales)),
    }


def transformers(block: tuple[int, int] | None, scale_fmt: str) -> dict[str, torch.Tensor]:
    settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    client = SimpleNamespace(quantization_config=settings)
    stored = Fp8Quantize(client).convert({"m.weight": weights()})
    again = Fp8Dequantize(client)._dequantize_one(
        stored["m.weight"], stored["m.weight_scale_inv"], torch.float32
    )
    peer = {key.replace("m.", "stored."): value for key, value in stored.items()}
    return {"weight": weights(), "dequant": again, **peer}


def main() -> None:
    index = json.loads((HERE / "index.json").read_text())
    made = {
        f"floats_ct_{name}": (f"compressed-tensors/{fmt}", compressed_tensors(fmt, settings))
        for name, (fmt, settings) in COMPRESSED.items()
    }
    made |= {f"floats_mlx_{mode}": ("mlx", mlx(mode)) for mode in ("mxfp4", "mxfp8", "nvfp4")}
    made |= {
        "floats_fp8_block": ("fp8", transformers(BLOCK, "float")),
        "floats_fp8_block_ue8m0": ("fp8", transformers(BLOCK, "ue8m0")),
        "floats_fp8_tensor": ("fp8", transformers(None, "float")),
    }
    for name, (fmt, tensors) in made.items():
        path = HERE / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        data = path.read_bytes()
        client = "transformers" if fmt == "fp8" else fmt.split("/")[0]
        index["vectors"][name] = {
            "file": path.name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "format": fmt,
            "producer": f"{client} {version(client)}, torch {version('torch').split('+')[0]}",
            "tensors": {
                key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": [*value.shape]}
                for key, value in tensors.items()
            },
        }
    (HERE / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
