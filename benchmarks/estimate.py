"""How far the time that `--dry-run` estimates is from the time that a run takes.

    python benchmarks/estimate.py sample_data            # a model folder with activations/ beside
    python benchmarks/estimate.py model --tokens tokens.npy

Each command is first asked for its estimate, then run; the ratio is real time / estimate. Both see
the machine as it is at that moment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

COMMANDS = [
    ["rtn", "--no-mse"],
    ["rtn"],
    ["gptq"],
    ["gptq", "--refine", "0", "--sweeps", "0", "--no-mse"],
    ["awq", "--no-compare"],
    ["smoothquant"],
    ["calibrate"],
]


def compared(words: list[str]) -> tuple[float, float]:
    """Estimated and real seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ptq_cli", *words, "-o", f"{folder}/out.safetensors"]
        told = subprocess.run([*command, "--dry-run", "--json"], check=True, stdout=subprocess.PIPE)
        begin = time.perf_counter()
        subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        return json.loads(told.stdout)["time"]["seconds"], time.perf_counter() - begin


def main() -> None:
    model, *tokens = sys.argv[1:]  # the model, and what names tokens
    sequential = [[name, *tokens] for name in ("gptq", "calibrate") if tokens]
    print("estimated     real    ratio  command")
    for name, *options in [*COMMANDS, *sequential]:
        words = [name, model, *options]
        told, real = compared(words)
        print(f"{told:7.2f} s {real:7.2f} s {real / told:7.2f}  ptq {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
