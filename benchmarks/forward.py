"""How fast a block's NumPy forward is beside transformers' in float32, on the same cores.

    python benchmarks/forward.py [--hidden 1024] [--tokens 4096] [--repeats 9] [--threads N]

For sequences of 512 and 2,048 tokens (together `--tokens`), the same random Llama-like block runs
in turn here and in transformers (scaled-dot-product attention, its default); medians of both, and
the share of the rate of large float32 matrix products that the products of the block reach.
Here each thread takes its part of the sequences and BLAS has one thread, as in a run of ptq; torch
gets as many threads.
Needs torch and transformers beside this package; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import forward_block

LENGTHS = (512, 2048)


class Row(NamedTuple):
    """Tokens in a sequence, seconds here and there, share of the sgemm rate, that rate."""

    length: int
    here: float
    there: float
    share: float
    rate: float


def config(hidden: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "max_position_embeddings": max(LENGTHS),
    }


def flops(arch: Architecture, n_tokens: int, length: int) -> float:
    """Floating-point operations of a block's products, the causal half of attention only."""
    heads = (arch.n_heads + arch.n_kv_heads) * arch.head_dim
    linears = 2 * arch.hidden_size * heads + 3 * arch.hidden_size * arch.intermediate_size
    attention = arch.n_heads * arch.head_dim * (length + 1)
    return 2.0 * n_tokens * (linears + attention)


SQUARE = np.ones((1536, 1536), dtype=np.float32)


def sgemm(_: int) -> np.ndarray:
    return SQUARE @ SQUARE


def products_at_once(pool: Executor, threads: int) -> None:
    """One product in each thread."""
    list(pool.map(sgemm, range(threads)))


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def theirs(hidden: int, inputs: np.ndarray) -> tuple[Callable[[], Any], dict[str, np.ndarray]]:
    """transformers' forward of one block on `inputs` [n, length, hidden], and its weights."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    settings = {key: value for key, value in config(hidden).items() if key != "model_type"}
    model = LlamaModel(LlamaConfig(**settings)).eval()
    states = torch.from_numpy(inputs)
    angles = model.rotary_emb(states, torch.arange(inputs.shape[1])[None])

    def run() -> Any:
        with torch.no_grad():
            return model.layers[0](states, position_embeddings=angles, attention_mask=None)

    weights = {f"model.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    return run, weights


def compare(hidden: int, length: int, n_tokens: int, repeats: int, pool: Executor) -> Row:
    """One row of the table; checks that both forwards agree."""
    arch = read_architecture(config(hidden))
    n_sequences = max(1, n_tokens // length)
    random = np.random.default_rng(0)
    inputs = random.standard_normal((n_sequences, length, hidden), dtype=np.float32)
    run, weights = theirs(hidden, inputs)
    one = pack((1, length))

    def ours() -> list[np.ndarray]:
        block = partial(forward_block, arch, 0, weights, packing=one)
        return list(pool.map(block, inputs))

    difference = np.abs(np.stack(ours()) - run().numpy()).max()
    assert difference < 1e-3, difference
    threads = pool._max_workers  # type: ignore[attr-defined]
    products = partial(products_at_once, pool, threads)
    times = [(timed(ours), timed(run), timed(products)) for _ in range(repeats)]
    here, there, square = (median(column) for column in zip(*times, strict=True))
    rate = 2 * 1536.0**3 * threads / square
    share = flops(arch, n_sequences * length, length) / here / rate
    return Row(length, here, there, share, rate)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| tokens in a sequence | ptq, s | transformers, s | ptq's speed | share of sgemm |")
    print("|---|---|---|---|---|")
    rows = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(options.threads) as pool:
        torch.set_num_threads(options.threads)  # the limit above may have reached torch's BLAS
        for length in LENGTHS:
            row = compare(options.hidden, length, options.tokens, options.repeats, pool)
            rows.append(row)
            speed = f"{row.there / row.here:.2f} × | {row.share:.0%}"
            print(f"| {length} | {row.here:.3f} | {row.there:.3f} | {speed} |")
    print(
        f"\nHidden size {options.hidden}, {options.tokens} tokens, {options.threads} threads, "
        f"medians of {options.repeats}; sgemm {median(r.rate for r in rows) / 1e9:.0f} GFLOP/s."
    )


if __name__ == "__main__":
    main()
