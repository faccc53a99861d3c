"""How far rounding moves a model's predictions: methods, bits and grids in one table, other tools
beside them where they are installed.

    python benchmarks/accuracy.py                        # sample_data, 4, 3 and 2 bits, both grids
    python benchmarks/accuracy.py --model DIR --calibration FILE.npy --evaluation FILE.npy
    python benchmarks/accuracy.py --bits 3 --grid sym --contenders field default --against field
    python benchmarks/accuracy.py --python autoround=VENV/bin/python --contenders default autoround
    python benchmarks/accuracy.py --grid asym --contenders fast default best
    python benchmarks/accuracy.py --bits 8 --contenders w8a8-rtn w8a8-parallel w8a8 w8a8-gptq

All contenders see the same calibration tokens; the KL divergence from the float model and
perplexity are measured by this project's forward, in one run, on the same evaluation tokens. Other
tools' results are read back as weights, so all that differs is the rounding. Percents compare the
mean KL with that of the contender `--against`, or of the first where that one is missing. Their
standard error is that of the evaluation sequences' differences (paired) and does not hold the
chance of the rounding itself: in a single cell, what should be equal differs by one to three
percent. CPU seconds are user and system, of rounding alone. The names with w8a8 stand for int8
weights per channel and int8 inputs per token, which the forward rounds too, at a grid of their own;
they want --bits 8 and no others beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Job, ask, cpu_seconds, installed
from safetensors import safe_open
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.stream import Held, Read, Stream
from ptq_cli.evaluation.perplexity import difference, quantized_tensors
from ptq_cli.models.forward.likelihood import Prediction, measure_tokens, next_tokens
from ptq_cli.models.forward.stages import finish
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings, read_tokens

SAMPLE = Path(__file__).parents[1] / "sample_data"
GRIDS = {"asym": "asymmetric", "sym": "symmetric"}
W8A8 = "w8a8"  # the grid of contenders named after it

PAPER = {"refine": 0, "sweeps": 0, "mse": False, "drift": 0.0}
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
    "fast": Contender("gptq --effort fast", "gptq", {"effort": "fast"}),
    "best": Contender("gptq --effort best", "gptq", {"effort": "best"}),
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
    **{name: Contender(peer.what, None) for name, peer in PEERS.items()},
}
TABLE = [name for name in CONTENDERS if not name.startswith(W8A8)]


@dataclass(frozen=True)
class Setup:
    """What all contenders share. pythons: interpreters of other tools that have their own"""

    checkpoint: Checkpoint
    calibration: Path
    evaluation: Path
    group_size: int
    pythons: dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One column of the table."""

    grid: str
    bits: int

    @property
    def title(self) -> str:
        return f"{self.bits} bits {GRIDS.get(self.grid, self.grid)}"


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


Rounded = tuple[Read, dict[str, float]]  # the tensors; CPU and wall seconds


def by_ptq(setup: Setup, name: str, cell: Cell, out: Path) -> Rounded:
    contender = CONTENDERS[name]
    settings = dict(contender.settings)
    if cell.grid != W8A8:
        sym = cell.grid == "sym"
        settings |= {"bits": cell.bits, "group_size": setup.group_size, "sym": sym}
    if contender.command != "pack":
        settings["tokens"] = setup.calibration
    cpu, wall = cpu_seconds(), time.perf_counter()
    getattr(ptq_cli, contender.command)(setup.checkpoint.path, output=out, **settings)
    seconds = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
    return quantized_tensors(setup.checkpoint, open_quantized(out)), seconds


def by_peer(setup: Setup, name: str, cell: Cell, out: Path) -> Rounded:
    paths = str(setup.checkpoint.path.resolve()), str(setup.calibration.resolve())
    job = Job(*paths, cell.bits, setup.group_size, cell.grid == "sym")
    seconds = ask(name, setup.pythons.get(name, sys.executable), job, out)
    weights = safe_open(out, "numpy")
    present = set(weights.keys())

    def read(name: str) -> Any:
        return weights.get_tensor(name) if name in present else setup.checkpoint.read(name)

    return read, seconds


def contend(setup: Setup, name: str, cell: Cell, base: Measured) -> tuple[Measured, dict[str, Any]]:
    """One contender, rounded and measured; gives its row of the result, too."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = by_peer if CONTENDERS[name].command is None else by_ptq
        read, seconds = rounds(setup, name, cell, Path(folder) / "out")
        found = replace(predict(setup, read, base), predictions=[])
    row = {
        "grid": cell.grid, "bits": cell.bits, "contender": name, "kl": float(found.kl.mean()),
        **difference(found.nll, base.nll, base.sequence), **seconds,
    }  # fmt: skip
    return found, row


def percent(ours: Measured, theirs: Measured) -> dict[str, float | None]:
    """How far our mean KL lies over theirs, in percent of theirs, and its standard error: of the
    sequences' differences, theirs taken as it is."""
    mean, gap = theirs.kl.mean(), ours.kl - theirs.kl
    _, cluster = np.unique(ours.sequence, return_inverse=True)
    sums = np.bincount(cluster, gap - gap.mean())
    count = len(sums)
    spread = np.sqrt((sums**2).sum() * count / max(count - 1, 1)) / len(gap)
    error = float(100 * spread / mean) if count > 1 else None
    return {"percent": float(100 * gap.mean() / mean), "percent_error": error}


def run(
    setup: Setup,
    cells: list[Cell],
    names: list[str],
    against: str,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The result as --json has it, handed to `keep` after every row."""
    base = predict(setup, setup.checkpoint.read)
    rows: list[dict[str, Any]] = []
    result = {
        "model": str(setup.checkpoint.path),
        "original": float(np.exp(base.nll.mean())),
        "tokens": len(base.nll),
        "against": against,
        "group_size": setup.group_size,
        "rows": rows,
    }
    for cell in cells:
        found = {}
        for name in sorted(names, key=lambda name: name != against):  # what it is compared with
            found[name], row = contend(setup, name, cell, base)
            rows.append(row | percent(found[name], found[against]))
            keep(result)
    return result


def signed(value: float, error: float | None, digits: int) -> str:
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def shown(row: dict[str, Any]) -> str:
    """KL × 1000 (percent), rise of perplexity, CPU and wall seconds."""
    kl = f"{1000 * row['kl']:.2f}"
    if row["percent"] != 0:
        kl += f" ({signed(row['percent'], row['percent_error'], 1)} %)"
    rise = signed(row["perplexity"], row["standard_error"], 3)
    return f"{kl}, {rise}, {row['cpu']:.0f} / {row['wall']:.0f} s"


def show(result: dict[str, Any], cells: list[Cell], names: list[str]) -> None:
    """The table in Markdown."""
    what = CONTENDERS[result["against"]].what
    print(
        f"float model: perplexity {result['original']:.3f} on {result['tokens']} tokens; ", end=""
    )
    print(f"groups of {result['group_size']}")
    print(f"\nKL × 1000 (percent over `{what}`), rise of perplexity, CPU / wall seconds\n")
    print("| | " + " | ".join(cell.title for cell in cells) + " |")
    print("|---|" + "---|" * len(cells))
    rows = {(row["grid"], row["bits"], row["contender"]): row for row in result["rows"]}
    for name in names:
        line = [shown(rows[cell.grid, cell.bits, name]) for cell in cells]
        print(f"| {CONTENDERS[name].what} | " + " | ".join(line) + " |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--calibration", type=Path, help="default: the model's own")
    parser.add_argument("--evaluation", type=Path, help="default: the model's own")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--grid", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--contenders", nargs="+", default=TABLE, choices=CONTENDERS)
    parser.add_argument("--against", default="default", choices=CONTENDERS)
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PEER=PATH", help="a peer's own interpreter"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, after every row")
    given = parser.parse_args()
    kinds = {name.startswith(W8A8) for name in given.contenders}
    if True in kinds:
        if given.bits != [8] or False in kinds:
            parser.error("contenders with w8a8 want --bits 8 and no others beside them")
        given.grid = [W8A8]
    return given


def main() -> None:
    given = arguments()
    setup = Setup(
        open_checkpoint(given.model),
        given.calibration or given.model / "calibration_tokens.npy",
        given.evaluation or given.model / "eval_tokens.npy",
        given.group_size,
        dict(pair.split("=", 1) for pair in given.python),
    )

    names = []
    for name in given.contenders:
        if name in PEERS and not installed(name, setup.pythons.get(name, sys.executable)):
            print(f"not installed: {CONTENDERS[name].what}", file=sys.stderr)
        else:
            names.append(name)
    cells = [Cell(grid, bits) for grid in given.grid for bits in given.bits]
    against = given.against if given.against in names else names[0]

    def keep(result: dict[str, Any]) -> None:
        row = result["rows"][-1]
        where = f"{Cell(row['grid'], row['bits']).title}: {CONTENDERS[row['contender']].what}"
        print(f"{where}: {shown(row)}", file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")

    show(run(setup, cells, names, against, keep), cells, names)


if __name__ == "__main__":
    main()
