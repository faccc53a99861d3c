"""How much of a run is measuring, by method and source.

    python benchmarks/measuring.py                   # 4096², 8192 tokens; sample_data from tokens
    python benchmarks/measuring.py --model DIR --tokens FILE.npy     # another model for the tokens
    python benchmarks/measuring.py --quick

CPU seconds of the loop's work on its units, in a process and with a thread each: statistics of the
inputs, the forward where tokens give them, the search of factors where inputs are smoothed (and
what it tries), rounding, measuring, the proof of the packing, writing. Measuring is what gives the
report its errors, those of plain rounding too; not the rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import ROOT, served, write_model
from phases import FACTORS, FORWARD, MEASURE, STATISTICS, Clock

Commands = dict[str, tuple[str, dict[str, Any]]]

PAPER = {"refine": 0, "sweeps": 0, "mse": False, "act_order": "none"}
ACTIVATIONS: Commands = {
    "`gptq`, the paper's algorithm": ("gptq", PAPER),
    "`gptq --effort fast`": ("gptq", {"effort": "fast"}),
    "`gptq`": ("gptq", {}),
    "`rtn`": ("rtn", {}),
    "`rtn --no-mse`": ("rtn", {"mse": False}),
}
TOKENS: Commands = {
    "`gptq --tokens`, the paper's algorithm": ("gptq", PAPER),
    "`gptq --tokens --effort fast`": ("gptq", {"effort": "fast"}),
    "`gptq --tokens`": ("gptq", {}),
    "`rtn --tokens`": ("rtn", {}),
    "`awq --tokens`": ("awq", {}),
    "`awq --no-compare --tokens`": ("awq", {"compare": False}),
    "`smoothquant --tokens`": ("smoothquant", {}),
    "`smoothquant --then gptq --tokens`": ("smoothquant", {"then": "gptq"}),
}
COLUMNS = (FORWARD, STATISTICS, FACTORS, MEASURE)


def serve(command: str, model: Path, out: Path, settings: dict[str, Any]) -> None:
    """Run a command; its seconds by phase go to standard output."""
    import ptq_cli
    from ptq_cli.run import loop  # noqa: F401 - so that everything is there to be watched

    clock = Clock()
    clock.watch()
    getattr(ptq_cli, command)(model, output=out, workers=1, **settings)
    print(json.dumps(clock.by_phase()))


def phases(command: str, model: Path, settings: dict[str, Any], base: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=base) as out:
        told = [command, str(model), f"{out}/out", json.dumps(settings)]
        found: dict[str, float] = served(__file__, told, base / "caches")
    return found


def table(title: str, found: dict[str, dict[str, float]]) -> list[str]:
    """Markdown: percents of the unit's work, and of it without statistics and forward."""
    lines = [f"| {title} | CPU s | {' | '.join(COLUMNS)} | of rounding, measuring, writing |"]
    lines.append("|---|" + "---:|" * (len(COLUMNS) + 2))
    for label, seconds in found.items():
        total = sum(seconds.values())
        shares = [f"{100 * seconds.get(phase, 0) / total:.0f} %" for phase in COLUMNS]
        before = sum(seconds.get(phase, 0) for phase in (FORWARD, STATISTICS, FACTORS))
        alone = f"{100 * seconds.get(MEASURE, 0) / (total - before):.0f} %"
        lines.append(f"| {label} | {total:.1f} | {' | '.join(shares)} | {alone} |")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "sample_data")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="256², 1024 tokens")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.tokens = given.tokens or given.model / "calibration_tokens.npy"
    return given


def main() -> None:
    given = arguments()
    if given.serve:
        command, model, out, settings = given.serve
        serve(command, Path(model), Path(out), json.loads(settings))
        return
    size, tokens = (256, 1024) if given.quick else (4096, 8192)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_model(base / "linear", size, tokens)
        linear = f"{size} × {size}, from {tokens} tokens' activations"
        model = f"{given.model.resolve().name}, from tokens"
        runs: list[tuple[str, Commands, Path, dict[str, Any]]] = [
            (linear, ACTIVATIONS, base / "linear", {}),
            (model, TOKENS, given.model, {"tokens": str(given.tokens)}),
        ]
        for title, commands, folder_of, source in runs:
            found = {}
            for label, (command, settings) in commands.items():
                grid = {} if command == "smoothquant" else {"group_size": given.group_size}
                found[label] = phases(command, folder_of, {**settings, **grid, **source}, base)
                print(label, found[label], file=sys.stderr)
            print("\n".join(table(title, found)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
