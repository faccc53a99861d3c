"""What methods and bits do to perplexity, one table; AutoRound beside them where it is installed.

    python benchmarks/accuracy.py                        # sample_data, 4, 3 and 2 bits, asymmetric
    python benchmarks/accuracy.py --model DIR --calibration FILE.npy --evaluation FILE.npy --sym
    python benchmarks/accuracy.py --bits 3 --contenders field default --json
    python benchmarks/accuracy.py --bits 8 --contenders w8a8-rtn w8a8-parallel w8a8 w8a8-gptq

The names with w8a8 stand for int8 weights per channel and int8 inputs per token, which the forward
rounds too; they want --bits 8. All contenders see the same calibration tokens; perplexity and KL
divergence from the original are measured by this project's forward, in one run, on the same
evaluation tokens. AutoRound's result is read back from its torch model's weights, so all that
differs is the rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.stream import Held, Read, Stream
from ptq_cli.evaluation.perplexity import difference, quantized_tensors
from ptq_cli.models.forward.likelihood import Prediction, measure_tokens, next_tokens
from ptq_cli.models.forward.stages import finish
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.folder import open_quantized
from ptq_cli.storage.tokens import TokenSettings, read_tokens

SAMPLE = Path(__file__).parents[1] / "sample_data"
PAPER = {"refine": 0, "sweeps": 0, "mse": False, "drift": 0.0}
AUTOROUND_ITERATIONS = 200

PARALLEL = {"parallel_layers": True}
AWQ = {"compare": False}
THEN = {"then": "gptq"}


@dataclass(frozen=True)
class Contender:
    """what: for the table; command: of ptq, None for another tool; settings: of the command"""

    what: str
    command: str | None
    settings: dict[str, Any] = field(default_factory=dict)


CONTENDERS = {
    "rtn": Contender("round to nearest", "pack"),
    "field": Contender("the field's: sequential, paper's GPTQ", "gptq", PAPER),
    "parallel": Contender("gptq --parallel-layers", "gptq", PARALLEL),
    "uncorrected": Contender("gptq --drift 0", "gptq", {"drift": 0.0}),
    "default": Contender("gptq", "gptq"),
    "awq-parallel": Contender("awq --parallel-layers", "awq", AWQ | PARALLEL),
    "awq": Contender("awq", "awq", AWQ),
    "awq-gptq-parallel": Contender(
        "awq --then gptq --parallel-layers", "awq", AWQ | THEN | PARALLEL
    ),
    "awq-gptq": Contender("awq --then gptq", "awq", AWQ | THEN),
    "w8a8-rtn": Contender("round to nearest, W8A8", "pack", {"scheme": "W8A8"}),
    "w8a8-parallel": Contender("smoothquant --parallel-layers", "smoothquant", PARALLEL),
    "w8a8": Contender("smoothquant", "smoothquant"),
    "w8a8-gptq": Contender("smoothquant --then gptq", "smoothquant", THEN),
    "autoround": Contender(f"AutoRound, {AUTOROUND_ITERATIONS} iterations", None),
}
TABLE = [name for name in CONTENDERS if not name.startswith("w8a8")]


@dataclass(frozen=True)
class Setup:
    """What all contenders share."""

    checkpoint: Checkpoint
    calibration: Path
    evaluation: Path
    group_size: int
    sym: bool

    def grid(self, name: str, bits: int) -> dict[str, Any]:
        """Of a contender; those of W8A8 have their own."""
        if name.startswith("w8a8"):
            return {}
        return {"bits": bits, "group_size": self.group_size, "sym": self.sym}


@dataclass(frozen=True)
class Measured:
    """Of every evaluation token: negative log-likelihood, which sequence it is in, KL divergence
    from the original; predictions: by batch"""

    nll: Any
    sequence: Any
    kl: Any
    predictions: list[Prediction]


def predict(setup: Setup, read: Read, original: Measured | None = None) -> Measured:
    """Run a model over the evaluation tokens."""
    tokens = read_tokens(TokenSettings(setup.evaluation), setup.checkpoint)
    source = token_source(setup.checkpoint, tokens, (0, 0))
    arch = source.arch
    nll, sequence, kl, predictions, first = [], [], [], [], 0
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        stream = Stream("model", read, source, Path(folder), source.n_threads())
        stream.embed()
        for block in range(len(arch.blocks)):
            stream.cross(block, stream.boundary(block))
        end, weights = stream.boundary(len(arch.blocks)), Held(read, float32=False)
        for batch in source.batches:
            rows, targets = next_tokens(batch.tokens, batch.packing)
            finished = finish(arch, weights, end.read(batch.rows))[rows]
            ours = Prediction(arch, weights, finished)
            exact = ours if original is None else original.predictions[len(predictions)]
            measures = measure_tokens(ours, targets, exact)
            nll.append(measures.nll)
            kl.append(measures.kl)
            predictions.append(ours)
            sequence.append(first + np.searchsorted(batch.packing.starts, rows, side="right"))
            first += len(batch.tokens)
    return Measured(*map(np.concatenate, (nll, sequence, kl)), predictions)


def by_ptq(setup: Setup, name: str, bits: int, out: Path) -> Read:
    contender = CONTENDERS[name]
    settings = {**setup.grid(name, bits), **contender.settings}
    if contender.command != "pack":
        settings["tokens"] = setup.calibration
    getattr(ptq_cli, contender.command)(setup.checkpoint.path, output=out, **settings)
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
    if CONTENDERS[name].command is None:
        return by_autoround(setup, bits)
    return by_ptq(setup, name, bits, out)


def installed(name: str) -> bool:
    if name != "autoround":
        return True
    from importlib.util import find_spec

    return all(find_spec(package) for package in ("auto_round", "torch", "transformers"))


def run(setup: Setup, bits: list[int], names: list[str], say: Callable[[str], None]) -> Any:
    """Rows of the table: bits, contender, rise of perplexity, its standard error, mean KL
    divergence, seconds."""
    base = predict(setup, setup.checkpoint.read)
    rows = []
    for width in bits:
        fields: Measured | None = None
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                read = contend(setup, name, width, Path(folder) / "out")
                seconds = time.perf_counter() - start
                found = predict(setup, read, base)
            fields = found if name == "field" else fields
            rise = difference(found.nll, base.nll, base.sequence)
            row = {"bits": width, "contender": name, "seconds": seconds, **rise}
            row["kl"] = float(found.kl.mean())
            if fields is not None:
                row["minus_field"] = difference(found.nll, fields.nll, base.sequence)
            rows.append(row)
            words = f"{rise['perplexity']:+.4f}, KL {row['kl']:.5f}, {seconds:.0f} s"
            say(f"{width} bits, {CONTENDERS[name].what}: {words}")
    return {"original": float(np.exp(base.nll.mean())), "tokens": len(base.nll), "rows": rows}


def show(result: Any, bits: list[int], names: list[str]) -> None:
    """The table in Markdown."""
    print(f"original: perplexity {result['original']:.3f} on {result['tokens']} tokens")
    print(
        "\n| rise of perplexity, mean KL | " + " | ".join(f"{width} bits" for width in bits) + " |"
    )
    print("|---|" + "---|" * len(bits))
    cells = {(row["bits"], row["contender"]): row for row in result["rows"]}
    for name in names:
        shown = []
        for width in bits:
            row, field = cells[width, name], cells.get((width, "field"))
            ratio = f" ({row['perplexity'] / field['perplexity']:.2f})" if field else ""
            rise = f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}{ratio}"
            shown.append(f"{rise}, {row['kl']:.4f}")
        print(f"| {CONTENDERS[name].what} | " + " | ".join(shown) + " |")
    print("\nin brackets: as a part of the field's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--contenders", nargs="+", default=TABLE, choices=CONTENDERS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.bits != [8] and any(name.startswith("w8a8") for name in given.contenders):
        parser.error("contenders with w8a8 want --bits 8")
    setup = Setup(
        open_checkpoint(given.model),
        given.calibration or given.model / "calibration_tokens.npy",
        given.evaluation or given.model / "eval_tokens.npy",
        given.group_size,
        given.sym,
    )
    names = [name for name in given.contenders if installed(name)]
    for name in set(given.contenders) - set(names):
        print(f"not installed: {CONTENDERS[name].what}")
    result = run(
        setup, given.bits, names, lambda line: None if given.json else print(line, flush=True)
    )
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        show(result, given.bits, names)


if __name__ == "__main__":
    main()
