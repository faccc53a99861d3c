"""What methods and bits do to perplexity, one table; AutoRound beside them where it is installed.

    python benchmarks/accuracy.py                        # sample_data, 4, 3 and 2 bits, asymmetric
    python benchmarks/accuracy.py --model DIR --calibration FILE.npy --evaluation FILE.npy --sym
    python benchmarks/accuracy.py --bits 3 --contenders field default --json

All contenders see the same calibration tokens; perplexity is measured by this project's forward, in
one run, on the same evaluation tokens. AutoRound's result is read back from its torch model's
weights, so all that differs is the rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.models.forward import finish
from ptq_cli.models.likelihood import Prediction, measure_tokens, next_tokens
from ptq_cli.quality import difference, quantized_tensors
from ptq_cli.sequential import model_architecture
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.folder import open_quantized
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from ptq_cli.stream import Held, Read, Stream, batches, threads

SAMPLE = Path(__file__).parents[1] / "sample_data"
PAPER = {"refine": 0, "sweeps": 0, "mse": False, "drift": 0.0}
AUTOROUND_ITERATIONS = 200

# name -> (what it is, settings of ptq gptq; None: another tool)
CONTENDERS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "rtn": ("round to nearest", None),
    "field": ("the field's: sequential, paper's GPTQ", PAPER),
    "parallel": ("default, --parallel-layers", {"parallel_layers": True}),
    "uncorrected": ("default, --drift 0", {"drift": 0.0}),
    "default": ("default", {}),
    "autoround": (f"AutoRound, {AUTOROUND_ITERATIONS} iterations", None),
}


@dataclass(frozen=True)
class Setup:
    """What all contenders share."""

    checkpoint: Checkpoint
    calibration: Path
    evaluation: Path
    group_size: int
    sym: bool

    def grid(self, bits: int) -> dict[str, Any]:
        return {"bits": bits, "group_size": self.group_size, "sym": self.sym}


@dataclass(frozen=True)
class Measured:
    nll: Any
    sequence: Any


def predict(setup: Setup, read: Read) -> Measured:
    """Negative log-likelihood of every evaluation token, and which sequence it is in."""
    arch = model_architecture(setup.checkpoint)
    parts = batches(read_tokens(TokenSettings(setup.evaluation), setup.checkpoint))
    nll, sequence, first = [], [], 0
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        stream = Stream("model", arch, read, parts, Path(folder), threads(arch, parts))
        stream.embed()
        for block in range(len(arch.blocks)):
            stream.cross(block, stream.boundary(block))
        end, weights = stream.boundary(len(arch.blocks)), Held(read, float32=False)
        for batch in parts:
            rows, targets = next_tokens(batch.tokens, batch.packing)
            finished = finish(arch, weights, end.read(batch.rows))[rows]
            nll.append(measure_tokens(Prediction(arch, weights, finished), targets).nll)
            sequence.append(first + np.searchsorted(batch.packing.starts, rows, side="right"))
            first += len(batch.tokens)
    return Measured(np.concatenate(nll), np.concatenate(sequence))


def by_ptq(setup: Setup, settings: dict[str, Any] | None, bits: int, out: Path) -> Read:
    path = setup.checkpoint.path
    if settings is None:
        ptq_cli.pack(path, output=out, **setup.grid(bits))
    else:
        ptq_cli.gptq(path, tokens=setup.calibration, output=out, **setup.grid(bits), **settings)
    return quantized_tensors(setup.checkpoint, open_quantized(out))


def by_autoround(setup: Setup, bits: int) -> Read:
    """AutoRound's rounded weights, from the model it leaves in memory."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(setup.checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = read_tokens(TokenSettings(setup.calibration), setup.checkpoint).ids
    data = [{"input_ids": torch.from_numpy(ids[i : i + 8])} for i in range(0, len(ids), 8)]
    rounder = AutoRound(
        model, tokenizer, scheme=f"W{bits}A16" if bits in (2, 3, 4, 8) else "W4A16", bits=bits,
        group_size=setup.group_size, sym=setup.sym, iters=AUTOROUND_ITERATIONS, dataset=data,
        seqlen=ids.shape[1], nsamples=len(ids), batch_size=8, device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    rounded, _ = rounder.quantize()
    state = {k: v.detach().float().cpu().numpy() for k, v in rounded.state_dict().items()}
    return lambda name: state[name] if name in state else setup.checkpoint.read(name)


def contend(setup: Setup, name: str, bits: int, out: Path) -> Read:
    if name == "autoround":
        return by_autoround(setup, bits)
    return by_ptq(setup, CONTENDERS[name][1], bits, out)


def installed(name: str) -> bool:
    if name != "autoround":
        return True
    from importlib.util import find_spec

    return all(find_spec(package) for package in ("auto_round", "torch", "transformers"))


def run(setup: Setup, bits: list[int], names: list[str], say: Callable[[str], None]) -> Any:
    """Rows of the table: bits, contender, rise of perplexity, its standard error, seconds."""
    base = predict(setup, setup.checkpoint.read)
    rows = []
    for width in bits:
        field: Measured | None = None
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                read = contend(setup, name, width, Path(folder) / "out")
                seconds = time.perf_counter() - start
                found = predict(setup, read)
            field = found if name == "field" else field
            rise = difference(found.nll, base.nll, base.sequence)
            row = {"bits": width, "contender": name, "seconds": seconds, **rise}
            if field is not None:
                row["minus_field"] = difference(found.nll, field.nll, base.sequence)
            rows.append(row)
            say(f"{width} bits, {CONTENDERS[name][0]}: {rise['perplexity']:+.4f}, {seconds:.0f} s")
    return {"original": float(np.exp(base.nll.mean())), "tokens": len(base.nll), "rows": rows}


def show(result: Any, bits: list[int], names: list[str]) -> None:
    """The table in Markdown."""
    print(f"original: perplexity {result['original']:.3f} on {result['tokens']} tokens")
    print("\n| rise of perplexity | " + " | ".join(f"{width} bits" for width in bits) + " |")
    print("|---|" + "---|" * len(bits))
    cells = {(row["bits"], row["contender"]): row for row in result["rows"]}
    for name in names:
        shown = []
        for width in bits:
            row, field = cells[width, name], cells.get((width, "field"))
            ratio = f" ({row['perplexity'] / field['perplexity']:.2f})" if field else ""
            shown.append(f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}{ratio}")
        print(f"| {CONTENDERS[name][0]} | " + " | ".join(shown) + " |")
    print("\nin brackets: as a part of the field's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    setup = Setup(
        open_checkpoint(given.model),
        given.calibration or given.model / "calibration_tokens.npy",
        given.evaluation or given.model / "eval_tokens.npy",
        given.group_size,
        given.sym,
    )
    names = [name for name in given.contenders if installed(name)]
    for name in set(given.contenders) - set(names):
        print(f"not installed: {CONTENDERS[name][0]}")
    result = run(
        setup, given.bits, names, lambda line: None if given.json else print(line, flush=True)
    )
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        show(result, given.bits, names)


if __name__ == "__main__":
    main()
