"""How far the schemes of small floats move a model's predictions: plain rounding, rounding with a
search of the scales, and GPTQ.

    python benchmarks/schemes.py                     # sample_data
    python benchmarks/schemes.py --model DIR --calibration FILE.npy --evaluation FILE.npy

Mean KL divergence from the float model on the evaluation tokens, times 1000, by this project's
forward, with the inputs rounded as the scheme says; its change against the contender on the left,
in percent, with the standard error of the sequences' paired differences.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from accuracy import SAMPLE, Measured, Setup, percent, predict

import ptq_cli
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized

SMALL = [name for name, scheme in SCHEMES.items() if scheme.fixed]
CONTENDERS: dict[str, dict[str, Any]] = {
    "rtn --no-mse": {"mse": False},
    "rtn": {},
    "gptq": {},
}


def measured(setup: Setup, base: Measured, scheme: str, name: str) -> Measured:
    command = getattr(ptq_cli, name.split()[0])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command(
            setup.checkpoint.path, output=out, scheme=scheme, format="ptq",
            tokens=setup.calibration, **CONTENDERS[name],
        )  # fmt: skip
        return predict(setup, quantized_tensors(setup.checkpoint, open_quantized(out)), base)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--schemes", nargs="+", default=SMALL, choices=SMALL)
    given = parser.parse_args()
    setup = Setup(
        open_checkpoint(given.model),
        given.calibration or given.model / "calibration_tokens.npy",
        given.evaluation or given.model / "eval_tokens.npy",
        128,
        {},
    )
    base = predict(setup, setup.checkpoint.read)
    print("| scheme | " + " | ".join(CONTENDERS) + " |\n|---|" + "---|" * len(CONTENDERS))
    for scheme in given.schemes:
        cells, before = [], None
        for name in CONTENDERS:
            own = measured(setup, base, scheme, name)
            cell = f"{1000 * own.kl.mean():.2f}"
            if before is not None:
                change = percent(own, before)
                cell += f" ({change['percent']:+.0f} ± {change['percent_error'] or 0:.0f} %)"
            cells.append(cell)
            before = own
        print(f"| {scheme} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
