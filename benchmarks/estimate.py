"""How far the time that `--dry-run` estimates is from the time that a run takes.

    python benchmarks/estimate.py sample_data            # a model folder with activations/ beside
    python benchmarks/estimate.py model --tokens tokens.npy

Each command is first asked for its estimate, then run; the ratio is real time / estimate. Both see
the machine as it is at that moment; on a shared one a factor of two is luck.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PTQ = [sys.executable, "-m", "ptq_cli"]


def commands(model: Path, tokens: Path | None) -> list[list[str]]:
    where = str(model)
    found = [
        ["rtn", where, "--no-mse"],
        ["rtn", where],
        ["gptq", where],
        ["gptq", where, "--refine", "0", "--sweeps", "0", "--no-mse"],
        ["awq", where, "--no-compare"],
        ["smoothquant", where],
        ["calibrate", where],
    ]
    if tokens is not None:
        own = ["--tokens", str(tokens)]
        found += [["gptq", where, *own], ["calibrate", where, *own]]
    return found


def compared(words: list[str], folder: Path) -> tuple[float, float]:
    """Estimated and real seconds."""
    command = [*PTQ, *words, "-o", str(folder / "out.safetensors")]
    told = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(told.stdout)["time"]["seconds"], time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path)
    given = parser.parse_args()
    print("estimated     real    ratio  command")
    for words in commands(given.model, given.tokens):
        with tempfile.TemporaryDirectory() as folder:
            told, real = compared(words, Path(folder))
        print(f"{told:7.2f} s {real:7.2f} s {real / told:7.2f}  ptq {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
