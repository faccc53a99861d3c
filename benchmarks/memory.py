"""Peak memory and time of `ptq calibrate --tokens` on a random model of a billion parameters.

    python benchmarks/memory.py [--blocks 16] [--sequences 16] [--length 512] [--folder DIR]

The model (Llama 3.2 1B's shape, BF16) is written to a folder, block by block, and removed at the
end. What is shown is the peak of anonymous memory (RssAnon), read every 20 ms: pages of files that
the system could drop at any time do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHAPE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip


def block_shapes(index: int) -> dict[str, tuple[int, ...]]:
    base = f"model.layers.{index}."
    width, inner, shared = 2048, 8192, 512
    attention = {
        "q": (width, width),
        "k": (shared, width),
        "v": (shared, width),
        "o": (width, width),
    }
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return {
        **{f"{base}self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
        **{f"{base}mlp.{name}_proj.weight": shape for name, shape in mlp.items()},
        f"{base}input_layernorm.weight": (width,),
        f"{base}post_attention_layernorm.weight": (width,),
    }


def write_model(folder: Path, blocks: int) -> int:
    """A random model, one tensor in memory at a time. Returns its number of parameters."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 2048)}
    for index in range(blocks):
        shapes |= block_shapes(index)
    shapes["model.norm.weight"] = (2048,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = np.ones(shape, np.float32)
            if len(shape) == 2:
                values = random.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": blocks}))
    return offset // 2


def peak_of(command: list[str]) -> tuple[float, float, int]:
    """(peak RssAnon in GiB, seconds, exit code) of a command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) if found else 0)
        time.sleep(0.02)
    return peak / 2**20, time.perf_counter() - start, process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where to put the model and its statistics")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        count = write_model(folder, given.blocks)
        random = np.random.default_rng(1)
        ids = random.integers(0, SHAPE["vocab_size"], (given.sequences, given.length))
        np.save(folder / "tokens.npy", ids.astype(np.int32))
        command = [sys.executable, "-m", "ptq_cli", "calibrate", str(folder)]
        peak, seconds, code = peak_of([*command, "--tokens", str(folder / "tokens.npy")])
    print(
        f"{count / 1e9:.2f} billion parameters, {ids.size} tokens: peak {peak:.2f} GiB of anonymous"
        f" memory, {seconds:.0f} s, exit code {code}"
    )


if __name__ == "__main__":
    main()
