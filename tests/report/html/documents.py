"""Reports made up for pages: of any size, with any names."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from ptq_cli.report.report import row_from_json, totals

KINDS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip
QUALITY = {
    "tokens": 262144,
    "sequences": 128,
    "perplexity": {"original": 6.1432, "quantized": 6.3311, "rtn": 6.8021},
    "increase": {
        "quantized": {"perplexity": 0.1879, "standard_error": 0.011},
        "rtn": {"perplexity": 0.6589, "standard_error": None},
    },
    "quantized_minus_rtn": {"perplexity": -0.471, "standard_error": 0.015},
    "kl": {"quantized": {"mean": 0.0213, "p99_9": 0.81}, "rtn": {"mean": 0.07, "p99_9": 2.1}},
    "same_top": {"quantized": 0.938, "rtn": 0.89},
    "kl_per_block": [0.0004 + 0.0001 * (i % 5) for i in range(43)],
}
ALLOCATION = {
    "predicted_kl": 0.0198,
    "bits_per_weight": 4.125,
    "bytes": 4_700_000_000,
    "curve": [[2.125 + i / 10, 0.9 * math.exp(-0.19 * i)] for i in range(40)],
    "uniform": {f"W{b}A16": [b + 0.125, 1.1 * math.exp(-1.9 * (b - 2))] for b in range(2, 7)},
}
NOTES = "damp_percent raised to 0.1"


def row(
    module: str, shape: tuple[int, int], error: float, rtn: float, **more: Any
) -> dict[str, Any]:
    size = shape[0] * shape[1]
    return {
        "layer": f"{module}.weight", "module": module, "shape": list(shape), "bits": 4,
        "group_size": 128, "sym": True, "method": "gptq", "calibrated": True,
        "loss": 100 * error, "rel_err": 0.9 * error, "heldout_rel_err": error,
        "rtn_rel_err": 0.9 * rtn, "rtn_heldout_rel_err": rtn,
        "gain_vs_rtn": rtn / error if error else None,
        "sqnr_db": -10 * math.log10(error) if error else None, "max_abs_err": 0.0123,
        "tokens": 131072, "dead_columns": 0, "damp_percent": 0.05, "fallback": None,
        "bytes": size // 2 + size // 64, "bits_per_weight": 4.125, "notes": [], **more,
    }  # fmt: skip


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Layers of a Llama, block after block."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        block, kind = divmod(number, len(KINDS))
        name = list(KINDS)[kind]
        rtn = 0.006 * math.exp(rng.gauss(0, 0.35)) * (1 + 3 * math.exp(-block / 3))
        notes = [NOTES] if number % 50 == 7 else []
        found.append(
            row(f"model.layers.{block}.{name}", KINDS[name], rtn / rng.uniform(1.6, 2.4), rtn,
                notes=notes)
        )  # fmt: skip
    return found


def document(layers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A whole report of these layers, its totals as the tool makes them."""
    made = [row_from_json({"seconds": 0.0, **layer}) for layer in layers]
    sums = totals(made, [], 16_000_000_000, 4_700_000_000, 0.0)
    sums.pop("seconds")
    settings = {"method": "gptq", "format": "ptq", "bits": 4, "group_size": 128, "sym": True}
    whole = {"ptq": "0.1.0", "command": "gptq", "settings": settings, "totals": sums}
    return {**whole, "layers": layers, "left_alone": [], "warnings": [], **more}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path
