"""Time and memory of `ptq inspect` and `--dry-run` on the headers of a very large model.

    python benchmarks/headers.py [--model 70b|8x22b] [--repeat 3]

Writes shards that are headers and nothing else (sparse files: 140 GB of holes take some kilobytes
of disk), runs each command in a process of its own, and prints the least time, the interpreter's
start included, and the largest resident set. No weight is read, so the numbers are those of a
machine that has the headers in its file cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 5 << 30
VOCABULARY = 128256

# hidden size, MLP width, blocks, width of keys and values, experts (0: a plain MLP)
MODELS = {"70b": (8192, 28672, 80, 1024, 0), "8x22b": (6144, 16384, 56, 1024, 8)}


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes, in the order of the layers."""
    hidden, inner, blocks, shared, experts = MODELS[model]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(blocks):
        at = f"model.layers.{i}"
        for name, width in zip("qkvo", (hidden, shared, shared, hidden), strict=True):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = (width, hidden)
        if experts:
            tensors[f"{at}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)),
                                ("w3", (inner, hidden))):  # fmt: skip
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        if not experts:
            tensors |= {f"{at}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
            tensors[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = (hidden,)
    return {**tensors, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def size_of(shape: tuple[int, ...]) -> int:
    count = 2
    for length in shape:
        count *= length
    return count


def write_headers(folder: Path, model: str = "70b") -> int:
    """A model folder whose shards are headers before holes; the bytes they claim to hold."""
    hidden, inner, blocks, shared, experts = MODELS[model]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for name, shape in shapes_of(model).items():
        if size_of(shape) > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = shape
        room -= size_of(shape)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + size_of(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + offset)
        weight_map |= dict.fromkeys(shard, path.name)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "mixtral" if experts else "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": shared // 128,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        **({"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and the MiB of the largest child so far."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode and "are needed" not in done.stderr:  # a disk with less room than that
        raise SystemExit(done.stderr)
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="70b")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_headers(folder, given.model)
        print(f"{given.model}: {len(shapes_of(given.model))} tensors, {total / 1e9:.0f} GB claimed")
        ptq = [sys.executable, "-m", "ptq_cli"]
        for words in (
            ["inspect", "."],
            ["inspect", ".", "--json"],
            ["gptq", ".", "--dry-run"],
            ["rtn", ".", "--dry-run", "--json"],
        ):
            runs = [measured([*ptq, *words], folder) for _ in range(given.repeat)]
            seconds, memory = min(run[0] for run in runs), max(run[1] for run in runs)
            print(f"ptq {' '.join(words):28} {seconds:5.2f} s  {memory:4.0f} MiB at most so far")


if __name__ == "__main__":
    main()
