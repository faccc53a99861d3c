"""How fast a block's NumPy forward is beside transformers' in float32, on the same cores.

    python benchmarks/forward.py [KIND...] [--hidden 1024] [--tokens 4096] [--repeats 9]
        [--threads N]

For each kind of block, and sequences of 512 and 2,048 tokens (together `--tokens`), the same random
model of one such block and a vocabulary of 256 runs in turn here and in transformers (with its own
choice of attention); medians of both. For a Llama's block also the share of the rate of large
float32 matrix products that its own products reach.
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
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.storage.sources import open_float

LENGTHS = (512, 2048)
VOCABULARY = 256
TOLERANCE = 1e-3  # relative to the largest

# What config.json says besides the sizes, by kind: transformers' name of the family and settings.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
LATENT = {
    "q_lora_rank": 384, "kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 16, "linear_num_key_heads": 8, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "head_dim": 64,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "window of 256": ("Mistral", {"sliding_window": 256}),
    "capped scores": ("Gemma2", {"head_dim": 64, "layer_types": ["full_attention"]}),
    "LayerNorm, gelu": ("Starcoder2", {}),
    "parallel": ("Cohere", {"pad_token_id": 0}),
    "norms behind": ("Olmo2", {}),
    "ALiBi": ("Bloom", {"num_key_value_heads": None, "intermediate_size": None}),
    "latent attention": (
        "DeepseekV3", {**LATENT, "first_k_dense_replace": 1, "num_key_value_heads": None}
    ),
    "experts": ("Qwen3Moe", {**EXPERTS, "head_dim": 64, "moe_intermediate_size": 704}),
    "shared expert": (
        "Qwen2Moe",
        {**EXPERTS, "moe_intermediate_size": 704, "shared_expert_intermediate_size": 704},
    ),
    "groups of experts": (
        "DeepseekV3",
        {**LATENT, "first_k_dense_replace": 0, "num_key_value_heads": None, "n_routed_experts": 8,
         "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 704},
    ),
    "sinks": (
        "GptOss",
        {"head_dim": 64, "layer_types": ["full_attention"], "num_local_experts": 8,
         "num_experts_per_tok": 2, "intermediate_size": 704},
    ),
    "chunks of 256": (
        "Llama4Text",
        {"head_dim": 64, "attention_chunk_size": 256, "num_local_experts": 8,
         "num_experts_per_tok": 1, "intermediate_size": 704},
    ),
    "delta rule": (
        "Qwen3Next",
        {**DELTA, **EXPERTS, "layer_types": ["linear_attention"], "moe_intermediate_size": 704,
         "shared_expert_intermediate_size": 704},
    ),
    "gated attention": (
        "Qwen3Next",
        {**DELTA, **EXPERTS, "layer_types": ["full_attention"], "moe_intermediate_size": 704,
         "shared_expert_intermediate_size": 704},
    ),
    "Mamba-2": (
        "Bamba",
        {"attn_layer_indices": [], "mamba_n_heads": 32, "mamba_d_head": "auto",
         "mamba_d_state": 64, "mamba_expand": 2},
    ),
}  # fmt: skip


class Row(NamedTuple):
    """Seconds here and there, and of one product of SQUARE in each thread."""

    here: float
    there: float
    products: float


def sizes(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "max_position_embeddings": max(LENGTHS),
    }


def flops(hidden: int, n_tokens: int, length: int) -> float:
    """Floating-point operations of a Llama's products, the causal half of attention only."""
    linears = 2 * hidden * (hidden + hidden // 4) + 3 * hidden * (hidden * 11 // 4)
    return 2.0 * n_tokens * (linears + hidden * (length + 1))


SIDE = 1536
SQUARE = np.ones((SIDE, SIDE), dtype=np.float32)


def sgemm(_: int) -> Array:
    return SQUARE @ SQUARE


def products_at_once(pool: Executor, threads: int) -> None:
    """One product in each thread."""
    list(pool.map(sgemm, range(threads)))


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def theirs(kind: str, hidden: int, folder: Path) -> Callable[[Array], Array]:
    """transformers' forward, tokens [n, length] → logits, of a model that it saves in `folder`."""
    import torch
    import transformers

    torch.manual_seed(0)
    family, settings = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**sizes(hidden), **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)

    def run(tokens: Array) -> Array:
        with torch.no_grad():
            return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()

    return run


def ours(folder: Path) -> Callable[[Array], Array]:
    """The forward here of the model in `folder`, tokens [length] → logits.

    Raises InputError where the family has none.
    """
    source = open_float(folder)
    arch = read_architecture(source.config, source.tensors)
    # in the order that float32 of another dtype has, which a run makes of most checkpoints
    weights = {name: source.read(name).astype(np.float32) for name in source.tensors}
    return partial(forward, arch, weights)


def forward(arch: Architecture, weights: dict[str, Array], tokens: Array) -> Array:
    packing = pack((1, len(tokens)))
    hidden = embed(arch, weights, tokens[None], packing)
    for index in range(len(arch.blocks)):
        hidden = forward_block(arch, index, weights, hidden, packing)
    return logits(arch, weights, finish(arch, weights, hidden))


def compare(
    here: Callable[[Array], Array],
    there: Callable[[Array], Array],
    tokens: Array,
    repeats: int,
    pool: ThreadPoolExecutor,
) -> Row:
    """Medians of both on the same tokens [n, length]; checks that both agree."""

    def each() -> list[Array]:
        return list(pool.map(here, tokens))

    expected = there(tokens)
    difference = np.abs(np.stack(each()) - expected).max() / np.abs(expected).max()
    assert difference < TOLERANCE, difference
    products = partial(products_at_once, pool, pool._max_workers)
    calls = (each, partial(there, tokens), products)
    times = [[timed(call) for call in calls] for _ in range(repeats)]
    return Row(*(median(column) for column in zip(*times, strict=True)))


def print_kind(kind: str, options: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    """The lines of one kind, or that it has no forward here."""
    with TemporaryDirectory() as folder:
        there = theirs(kind, options.hidden, Path(folder))
        try:
            here = ours(Path(folder))
        except InputError as error:
            print(f"| {kind} | {error} | | | | |", flush=True)
            return
    for length in LENGTHS:
        n_sequences = max(1, options.tokens // length)
        tokens = np.random.default_rng(0).integers(3, VOCABULARY, (n_sequences, length))
        row = compare(here, there, tokens, options.repeats, pool)
        share = ""
        if kind == "llama":
            rate = 2.0 * SIDE**3 * options.threads / row.products
            share = f"{flops(options.hidden, tokens.size, length) / row.here / rate:.0%}"
        speed = f"{row.here:.3f} | {row.there:.3f} | {row.there / row.here:.2f} × | {share}"
        print(f"| {kind} | {length} | {speed} |", flush=True)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print("| block | tokens in a sequence | ptq, s | transformers, s | ptq's speed | of sgemm |")
    print("|---|---|---|---|---|---|")
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(options.threads) as pool:
        torch.set_num_threads(options.threads)  # the limit above may have reached torch's BLAS
        for kind in options.kinds or KINDS:
            print_kind(kind, options, pool)
    print(
        f"\nHidden size {options.hidden}, {options.tokens} tokens, {options.threads} threads, "
        f"medians of {options.repeats}."
    )


if __name__ == "__main__":
    main()
