"""What integers and smoothing cost: products on int8 codes beside the same in float32, and
SmoothQuant on a block beside reading its weights and activations once.

    python benchmarks/smoothquant.py            # a block of 1024 × 2752, about a minute
    python benchmarks/smoothquant.py --quick    # does it run
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.core.grid import Grid
from ptq_cli.numerics.activations import ActivationSettings, quantize_activations
from ptq_cli.numerics.integer_matmul import integer_product, linear_dequantized, linear_w8a8
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.run.schedule import Resources


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)


def products(n: int, features: int, repeats: int) -> dict[str, float]:
    """Seconds of `[n, features] @ [features, features]`."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((n, features), np.float32)
    weight = rng.standard_normal((features, features), np.float32)
    rounded = round_to_nearest(weight, Grid(8, -1, narrow_range=True))
    codes = quantize_activations(inputs, ActivationSettings()).codes
    centred = (rounded.codes.astype(np.int16) - 128).astype(np.int8)
    return {
        "float32 product": seconds(lambda: inputs @ weight.T, repeats),
        "int8 product, int32 sums": seconds(lambda: integer_product(codes, centred), repeats),
        "W8A8 linear": seconds(lambda: linear_w8a8(inputs, rounded), repeats),
        "dequantized linear": seconds(lambda: linear_dequantized(inputs, rounded), repeats),
    }


def write_block(folder: Path, hidden: int, mlp: int, tokens: int) -> None:
    """One Llama block of random BF16 weights, with float16 activations of its four sites."""
    rng = np.random.default_rng(1)
    base = "model.layers.0."
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden)}
    shapes["mlp.down_proj"] = (hidden, mlp)
    tensors = {
        f"{base}{name}.weight": (rng.standard_normal(s, np.float32) / 50).astype(ml_dtypes.bfloat16)
        for name, s in shapes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{base}{norm}.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 16}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "activations").mkdir()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        inputs = rng.standard_normal((tokens, shapes[name][1]), np.float32)
        inputs[:, ::100] *= 30
        np.save(folder / "activations" / f"{base}{name}.npy", inputs.astype(np.float16))


def read_once(folder: Path) -> float:
    """Read every weight and activation as float32 and take each channel's greatest value."""
    total = 0.0
    content = np.fromfile(folder / "model.safetensors", np.uint8)
    total += float(
        np.abs(content[-(len(content) // 2 * 2) :].view(np.uint16).astype(np.float32)).max()
    )
    for path in sorted((folder / "activations").iterdir()):
        total += float(np.abs(np.load(path).astype(np.float32)).max(axis=0).sum())
    return total


def whole(hidden: int, mlp: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of reading once, of calibration, and of SmoothQuant with a fixed and a searched
    alpha (judging on held-out inputs, writing and comparing included)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_block(folder, hidden, mlp, tokens)
        out, stats = folder / "out", folder / "stats.safetensors"
        options = {"output": out, "force": True, "calibration": stats, "workers": 1}
        return {
            "read weights and activations once": seconds(lambda: read_once(folder), repeats),
            "ptq calibrate": seconds(
                lambda: ptq_cli.calibrate(folder, output=stats, force=True, resources=Resources(1)),
                repeats,
            ),
            "smoothquant, float weights, alpha 0.5": seconds(
                lambda: ptq_cli.smoothquant(folder, bits=16, activation_scheme="none", **options),
                repeats,
            ),
            "smoothquant, W8A8, alpha 0.5": seconds(
                lambda: ptq_cli.smoothquant(folder, **options), repeats
            ),
            "smoothquant, W8A8, alpha auto": seconds(
                lambda: ptq_cli.smoothquant(folder, alpha="auto", **options), 1
            ),
        }


def show(title: str, times: dict[str, float]) -> None:
    first = next(iter(times.values()))
    print(title)
    for name, value in times.items():
        print(f"  {name:42} {value:8.3f} s {value / first:7.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    sizes = (64, 128, 256) if chosen.quick else (512, 2048, 5504)
    with threadpool_limits(1):
        n, hidden, mlp = sizes
        title = f"[{n}, {hidden}] @ [{hidden}, {hidden}], one thread"
        show(title, products(n, hidden, chosen.repeats))
        hidden, mlp = hidden // 2, mlp // 2
        title = f"one Llama block {hidden} × {mlp}, {2 * n} tokens"
        show(title, whole(hidden, mlp, 2 * n, 1 if chosen.quick else chosen.repeats))


if __name__ == "__main__":
    main()
