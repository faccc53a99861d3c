"""Write a random bfloat16 Llama-shaped checkpoint in shards, with synthetic activations per site.

    python benchmarks/make_model.py DIR --parameters 2.0 --shards 4 --tokens 1024

Shapes follow Llama's: hidden · 2.7 in the MLP, as many layers as the size asks for. Activations are
float16 with a few loud channels, as real ones have.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

WIDTHS = [(0.05, 512, 1408), (0.5, 1024, 2816), (1.2, 2048, 5632), (99, 2560, 6912)]
VOCABULARY = 32000


def shapes_of(
    billions: float, layers: int | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Tensor shapes in order, and the width of each site. layers: so many of that size's instead"""
    hidden, inner = next((h, i) for limit, h, i in WIDTHS if billions <= limit)
    block = 4 * hidden * hidden + 3 * hidden * inner
    n_layers = layers or max(1, round((billions * 1e9 - 2 * VOCABULARY * hidden) / block))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    sites = {}
    for i in range(n_layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        tensors |= {f"{at}.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        tensors |= {f"{mlp}.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        tensors[f"{mlp}.down_proj.weight"] = (hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = (hidden,)
        sites |= {f"{at}.q_proj": hidden, f"{at}.o_proj": hidden}
        sites |= {f"{mlp}.gate_proj": hidden, f"{mlp}.down_proj": inner}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    return tensors, sites


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal, in bfloat16; made from one strip that is rolled, so that it does not take all day."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    strip = rng.standard_normal((64, shape[1]), np.float32) * 0.02
    weight = np.empty(shape, ml_dtypes.bfloat16)
    for top in range(0, shape[0], 64):
        part = np.roll(strip, int(rng.integers(shape[1])), axis=1) * np.float32(rng.uniform(0.5, 2))
        weight[top : top + 64] = part[: shape[0] - top]
    return weight


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> int:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            file.write(random_weight(shape, rng).tobytes())
    return offset


def write_model(
    folder: Path, tensors: dict[str, tuple[int, ...]], n_shards: int, rng: np.random.Generator
) -> None:
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(n_shards)]
    done = 0
    for name, shape in tensors.items():
        shards[min(n_shards - 1, done * n_shards // total)][name] = shape
        done += 2 * int(np.prod(shape))
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{n_shards:05d}.safetensors"
        write_shard(folder / name, shard, rng)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def write_activations(
    folder: Path, sites: dict[str, int], tokens: int, rng: np.random.Generator
) -> None:
    folder.mkdir(exist_ok=True)
    for site, width in sites.items():
        loud = np.exp(rng.standard_normal(width) * 0.7)
        mix = rng.standard_normal((64, width)) / 8
        values = rng.standard_normal((tokens, 64)) @ mix + rng.standard_normal((tokens, width))
        np.save(folder / f"{site}.npy", (values * loud).astype(np.float16))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=2.0, help="billions")
    parser.add_argument("--layers", type=int, help="so many layers of that size's instead")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="per site; 0: no activations")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    tensors, sites = shapes_of(given.parameters, given.layers)
    write_model(given.folder, tensors, given.shards, rng)
    if given.tokens:
        write_activations(given.folder / "activations", sites, given.tokens, rng)
    count = sum(int(np.prod(shape)) for shape in tensors.values())
    print(f"{given.folder}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
