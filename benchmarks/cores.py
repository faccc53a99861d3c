"""`ptq gptq --tokens` on one core and on several; and, beside it, of an older checkout on one.

    python benchmarks/cores.py DIR                     # of smollm2.py
    python benchmarks/cores.py DIR --before TREE       # TREE: `git worktree add TREE COMMIT`

Wall and CPU seconds (user and system) of the whole command, its process bound to the cores, in
turn; medians. The machine's own gain is that of as many processes that do plain float32 products
over one. `DIR` holds a model and `calibration_tokens.npy`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from commands import ROOT, Seconds, environment, timed
from scale import sgemm

# Whatever lies in the folder at hand, the package is that of PYTHONPATH.
RUN = "import sys; sys.path.pop(0); from ptq_cli.__main__ import main; main()"


def gptq(tree: Path, cores: int, model: Path, options: list[str], base: Path) -> Seconds:
    """Of the command by the package in `tree`, on the first cores."""
    out, tokens = base / "out", model / "calibration_tokens.npy"
    bound = ["taskset", "-c", f"0-{cores - 1}", sys.executable, "-c", RUN]
    said = ["gptq", str(model), "--tokens", str(tokens), "-o", str(out), "--force"]
    env = {**environment(base / "caches"), "PYTHONPATH": str(tree)}
    return timed([*bound, *said, "--workers", str(cores), *options], env)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--before", type=Path, help="an older checkout, on one core")
    parser.add_argument("--options", default="--bits 4 --group-size 64", help="of the command")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    runs = {"1 core": (ROOT, 1), f"{given.cores} cores": (ROOT, given.cores)}
    if given.before:
        runs["1 core, before"] = (given.before.resolve(), 1)
    found: dict[str, list[Seconds]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repeats):
            for name, (tree, cores) in runs.items():
                words = given.options.split()
                found[name].append(gptq(tree, cores, given.model, words, Path(folder)))
                print(name, found[name][-1], file=sys.stderr, flush=True)
            found["sgemm"].append({"gain": sgemm(given.cores) / sgemm(1)})

    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in found[name])

    print("| | wall s | CPU s |\n|---|---:|---:|")
    for name in runs:
        print(f"| {name} | {median(name, 'wall'):.1f} | {median(name, 'cpu'):.1f} |")
    gain = median("1 core", "wall") / median(f"{given.cores} cores", "wall")
    machine = median("sgemm", "gain")
    print(f"\n- {given.cores} cores are {gain:.2f} times as fast as one (products: {machine:.2f})")
    if given.before:
        share = median("1 core", "cpu") / median("1 core, before", "cpu")
        print(f"- CPU seconds over those before: {share:.2f}")


if __name__ == "__main__":
    main()
