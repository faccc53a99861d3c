"""Seconds per phase of `ptq gptq --tokens` on a model of 8-billion shape: one block is measured on
this machine, the rest is counted.

    python benchmarks/scaling.py                    # Llama 3.1 8B: 32 blocks, 128 × 2048 tokens
    python benchmarks/scaling.py --quick            # a small shape: does it run

A random model of one block in bfloat16 is rounded from a few sequences, in one process with one
thread; CPU seconds of each phase are counted for all blocks, and what goes by tokens (the forward
and the statistics) for all tokens. The forward through down_proj, whose outputs nobody reads behind
the last block, is counted by its share of the block's weights. The block couples its rows, as only
the last six of a model do: all are counted as if they did.

On several cores a phase's seconds are divided by the pieces that the code cuts it into, as many as
there are cores at most. That is counted, not measured: memory's bandwidth is taken to suffice.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import phases
from commands import served
from safetensors.numpy import save_file

from ptq_cli.models.forward import head_fisher
from ptq_cli.numerics import drift, gptq, ldl, output_errors, statistics

Seconds = Mapping[tuple[str, str], float]  # by place and phase
CORES = (1, 2, 16, 64)
BLOCKS, SEQUENCES, LENGTH, BATCH = 32, 128, 2048, 2048
LLAMA = {"hidden": 4096, "inner": 14336, "kv": 1024, "heads": 32, "vocabulary": 128256}
SMALL = {"hidden": 256, "inner": 512, "kv": 64, "heads": 8, "vocabulary": 512}

HESSIAN, DRIFT, FISHER = "Hessian's product", "drift's products", "Fisher of the head"
FACTORED, CORRECTED, SOLVED, PROVEN = "factor's products", "correction", "its solve", "its strength"
SPLIT = {  # phases told apart here, as they are cut differently
    "numerics.statistics:SiteAccumulator._multiply": HESSIAN,
    "calibration.streams:Streams._drift": DRIFT,
    "numerics.ldl:_subtract_later": FACTORED,
    "numerics.drift:correction": CORRECTED,
    "numerics.ldl:solve_right": SOLVED,
    "numerics.drift:proven_strength": PROVEN,
    "calibration.streams:head_fisher": FISHER,
}
ROWS = {  # phases of the table, in order: what is summed, and what limits it
    "read": ([phases.READ], "one after another"),
    "forward of both models": ([phases.FORWARD], "batches of one sequence side by side"),
    "Hessians and drift": ([phases.STATISTICS, HESSIAN, DRIFT], "strips of 512 and 384 columns"),
    "factor": ([phases.FACTOR, FACTORED, FISHER], "its diagonal blocks"),
    "correction for drift": (
        [CORRECTED, SOLVED, PROVEN],
        "one product of the weight by one thread",
    ),
    "columns": ([phases.ROUND], "panels of 2048 rows"),
    "refine and sweeps": ([phases.REFINE], "the same panels"),
    "measuring": ([phases.MEASURE], "strips of 256 rows, four at a time"),
    "packing and writing": ([phases.WRITE, phases.REST], "one after another"),
}


# ---- one block, measured ----


def write_model(folder: Path, shape: Mapping[str, int]) -> None:
    """A Llama of one block: config.json and random weights in bfloat16."""
    hidden, inner, kv, vocabulary = (shape[k] for k in ("hidden", "inner", "kv", "vocabulary"))
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary,
        "num_hidden_layers": 1, "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"] * kv // hidden, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    block = {f"model.layers.0.{name}.weight": size for name, size in linears.items()}
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    random = np.random.default_rng(0)
    scale = np.float32(hidden**-0.5)

    def weight(size: tuple[int, ...]) -> Any:
        return (random.standard_normal(size, np.float32) * scale).astype(ml_dtypes.bfloat16)

    tensors = {name: weight(size) for name, size in {**block, **ends}.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    tensors |= {f"model.{x}.weight": np.ones(hidden, ml_dtypes.bfloat16) for x in norms}
    save_file(tensors, folder / "model.safetensors")


def serve(model: Path, tokens: Path, out: Path) -> None:
    """Round the block; seconds by place and phase go to standard output."""
    import ptq_cli
    from ptq_cli.run import loop  # noqa: F401 - so that everything is there to be watched

    clock = phases.Clock()
    phases.BEGIN.update(SPLIT)
    clock.watch()
    clock.label("calibration.streams:Streams.statistics", lambda streams, site: str(site))
    clock.label("run.quantize_unit:choose", lambda given, layer, *_: str(layer.module))
    ptq_cli.gptq(model, tokens=tokens, output=out, workers=1)
    clock.charge()
    print(json.dumps([[*key, spent] for key, spent in clock.seconds.items()]))


def measure(shape: Mapping[str, int], sequences: int, length: int) -> Seconds:
    """Of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_model(base / "model", shape)
        random = np.random.default_rng(1)
        ids = random.integers(0, shape["vocabulary"], (sequences, length), np.int32)
        np.save(base / "tokens.npy", ids)
        told = [str(base / name) for name in ("model", "tokens.npy", "out")]
        found = served(__file__, told, base / "caches")
    return {(place, phase): spent for place, phase, spent in found}


# ---- the rest, counted ----


def sizes(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of a linear by the last word of its name."""
    hidden, inner, kv = shape["hidden"], shape["inner"], shape["kv"]
    wide, own = (inner, hidden), (hidden, hidden)
    return {
        "q_proj": own, "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": own,
        "gate_proj": wide, "up_proj": wide, "down_proj": (hidden, inner),
    }  # fmt: skip


def triangle(width: int) -> float:
    """Ways that a lower triangle goes: the longest strip of its blocks takes the longest."""
    strips = ceil(width / statistics.BLOCK_COLUMNS)
    return (strips + 1) / 2


def ways(phase: str, size: tuple[int, int]) -> float:
    """Into how many equal pieces a phase of a linear is cut."""
    rows, width = size
    cut: dict[str, float] = {
        phases.FORWARD: SEQUENCES * LENGTH / BATCH,
        HESSIAN: triangle(width),
        DRIFT: ceil(min(size) / drift.COLUMNS),
        FISHER: head_fisher.TOKENS_AT_ONCE / head_fisher.TOKENS_IN_PIECE,
        FACTORED: max(1, width / ldl.ROWS_AT_ONCE / 2),
        SOLVED: ceil(min(size) / ldl.ROWS_AT_ONCE),
        PROVEN: ceil(rows / drift.ROWS_AT_ONCE),
        phases.ROUND: ceil(rows / gptq.PANEL_ROWS),
        phases.REFINE: ceil(rows / gptq.PANEL_ROWS),
        phases.MEASURE: output_errors.ROWS_AT_ONCE / output_errors.STRIP_ROWS,
    }
    return cut.get(phase, 1)


def counted(found: Seconds, shape: Mapping[str, int], share: float) -> dict[str, list[float]]:
    """Seconds of all blocks by row of the table, for each number of cores. share: of the tokens"""
    by_name, whole = sizes(shape), sum(a * b for a, b in sizes(shape).values())
    through = whole / (whole - shape["hidden"] * shape["inner"])  # down_proj's part of the forward
    times = {phases.FORWARD: through / share, FISHER: 1 / BLOCKS}
    times |= dict.fromkeys((phases.STATISTICS, HESSIAN, DRIFT), 1 / share)
    result: dict[str, list[float]] = {}
    for name, (summed, _) in ROWS.items():
        totals: list[float] = []
        for cores in CORES:
            spent: dict[str, float] = defaultdict(float)
            for (place, phase), own in found.items():
                size = by_name.get(place.rpartition(".")[2], (1, 1))
                if phase in summed:
                    pieces = min(cores, ways(phase, size))
                    spent[phase] += BLOCKS * times.get(phase, 1) * own / pieces
            if DRIFT in spent and cores > 1:  # summed beside the Hessian
                hessian = spent[HESSIAN] + spent[phases.STATISTICS]
                totals.append(max(spent[DRIFT], hessian, totals[0] / cores))
            else:
                totals.append(sum(spent.values()))
        result[name] = totals
    return result


def table(rows: Mapping[str, list[float]]) -> list[str]:
    heads = " | ".join(f"{n} core{'s' * (n > 1)}" for n in CORES)
    lines = [f"| phase, seconds | {heads} | what limits it |"]
    lines.append("|---|" + "---:|" * len(CORES) + "---|")
    for name, seconds in rows.items():
        lines.append(f"| {name} | {' | '.join(map(duration, seconds))} | {ROWS[name][1]} |")
    sums = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines.append(f"| **together** | {' | '.join(map(duration, sums))} | |")
    return lines


def duration(seconds: float) -> str:
    return f"{seconds:,.0f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=4, help="of 2048 tokens, measured")
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.serve:
        model, tokens, out = map(Path, given.serve)
        serve(model, tokens, out)
        return
    shape, length = (SMALL, 128) if given.quick else (LLAMA, LENGTH)
    found = measure(shape, given.sequences, length)
    for (place, phase), spent in found.items():
        print(f"{place} {phase}: {spent:.2f} s", file=sys.stderr)
    share = given.sequences * length / (SEQUENCES * LENGTH)
    print(f"{BLOCKS} blocks, {SEQUENCES} × {LENGTH} tokens; measured: one block, "
          f"{given.sequences} × {length} tokens\n")  # fmt: skip
    print("\n".join(table(counted(found, shape, share))))


if __name__ == "__main__":
    main()
