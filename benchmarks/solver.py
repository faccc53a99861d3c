"""Times this engine's GPTQ against the paper's loop in NumPy and torch and against GPTQModel.

    python benchmarks/solver.py                # 1024², 4096², 4096 × 11008, one thread
    python benchmarks/solver.py --quick        # 256² only: does it run

One process per contender (contenders.py), the same number of threads for each, repeats
interleaved, medians. A size is out_features x in_features: 4096x11008 has a Hessian of 11008².
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from contenders import BITS, GROUP, NEEDS, loss  # noqa: E402

from ptq_cli.core.grid import Grid  # noqa: E402
from ptq_cli.numerics.rounding import round_to_nearest  # noqa: E402

SIZES = ["1024x1024", "4096x4096", "4096x11008"]
TARGET_SIZE = "4096x4096"
SLOW_ABOVE = 8192  # in_features beyond which contenders that are not ours run once
OURS = ("paper", "refine", "fast", "defaults")
LABELS = {
    "paper": "ptq, paper's algorithm (*)",
    "refine": "ptq, (*) + 2 refine passes",
    "fast": "ptq, --effort fast",
    "defaults": "ptq, defaults",
    "numpy": "paper's loop, NumPy",
    "torch": "paper's loop, torch",
    "gptqmodel": "GPTQModel's class",
}


@dataclass
class Cell:
    """What was measured of one contender at one size."""

    factorization: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)
    loss: float | None = None

    def medians(self) -> tuple[float, float, float]:
        """Factorization, columns, together (the median of the sums)."""
        sums = [f + c for f, c in zip(self.factorization, self.columns, strict=True)]
        median = statistics.median
        return median(self.factorization), median(self.columns), median(sums)


class Child:
    """A contender in its own process."""

    def __init__(self, name: str, threads: int, logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        number = {f"{kind}_NUM_THREADS": str(threads) for kind in ("OMP", "OPENBLAS", "MKL")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "contenders.py"), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **number, "PYTHONPATH": path},
                text=True,
            )

    def ask(self, folder: Path, with_loss: bool) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(
            json.dumps({"folder": str(folder), "with_loss": with_loss}),
            file=self.process.stdin,
            flush=True,
        )
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.name} died:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def missing(name: str) -> str | None:
    """The package that keeps a contender from running, if any."""
    for package in NEEDS.get(name, ()):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return package
    return None


def write_problem(size: str, folder: Path) -> float:
    """weight.npy and hessian.npy of a size; returns the loss of plain rounding.

    Inputs are correlated: neighbours by 0.8 per step, all channels through 64 common factors, and
    channels differ in size (log-normal). The Hessian is their covariance itself.
    """
    rows, columns = map(int, size.split("x"))
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    factors = random.standard_normal((columns, 64), np.float32) / np.float32(8)
    channel = np.exp(random.standard_normal(columns, np.float32) / 2)
    place = np.arange(columns, dtype=np.float32)
    hessian = np.float32(0.8) ** np.abs(place[:, None] - place)
    hessian += factors @ factors.T
    hessian *= channel[:, None] * channel
    folder.mkdir()
    np.save(folder / "weight.npy", weight)
    np.save(folder / "hessian.npy", hessian)
    rounded = round_to_nearest(weight, Grid(BITS, GROUP, sym=False))
    return loss(weight, rounded.dequantized(), hessian)


def measure(children: dict[str, Child], size: str, repeats: int, base: Path) -> dict[str, Any]:
    """Asks every contender in turn, `repeats` times over."""
    rtn = write_problem(size, base / size)
    cells = {name: Cell() for name in children}
    for turn in range(repeats):
        for name, child in children.items():
            slow = name not in (*OURS, "product") and int(size.split("x")[1]) > SLOW_ABOVE
            if slow and turn > 0:
                continue
            reply = child.ask(base / size, with_loss=turn == 0 and name != "product")
            cells[name].factorization.append(reply["factorization"])
            cells[name].columns.append(reply["columns"])
            if reply["loss"] is not None:
                cells[name].loss = reply["loss"] / rtn
            total = reply["factorization"] + reply["columns"]
            print(f"{size} {turn + 1}/{repeats} {name}: {total:.3f} s", file=sys.stderr)
    for file in (base / size).iterdir():
        file.unlink()
    return summary(size, cells)


def summary(size: str, cells: dict[str, Cell]) -> dict[str, Any]:
    """Medians of a size, as the table and --json have them."""
    rows, columns = map(int, size.split("x"))
    rate = 2 * 2048**3 / cells.pop("product").medians()[2]
    products = (columns**3 / 3 + columns**2 * rows) / rate
    result: dict[str, Any] = {"size": size, "sgemm_gflops": rate / 1e9, "products": products}
    for name, cell in cells.items():
        factorization, column, together = cell.medians()
        result[name] = {
            "factorization": factorization,
            "columns": column,
            "together": together,
            "loss_vs_rtn": cell.loss,
            "repeats": len(cell.columns),
            "raw": [cell.factorization, cell.columns],
        }
    return result


def table(result: dict[str, Any]) -> list[str]:
    """Markdown, at most 100 columns wide."""
    head = f"{result['size']} (out x in features), sgemm {result['sgemm_gflops']:.0f} GFLOP/s"
    lines = [f"### {head}", ""]  # "s": seconds; "vs gemm": times the matrix products alone
    titles = ("factor s", "columns s", "sum s", "vs (*)", "vs gemm", "loss/RTN")
    lines.append(f"| {'':<29} | " + " | ".join(titles) + " |")
    lines.append("|" + "-" * 31 + "|" + "|".join("-" * (len(t) + 1) + ":" for t in titles) + "|")
    ours, products = result["paper"]["together"], result["products"]
    for name, label in LABELS.items():
        row = result.get(name)
        if row is None:
            lines.append(f"| {label:<29} | not installed |")
            continue
        cells = [seconds(row[key]) for key in ("factorization", "columns", "together")]
        cells += [f"{row['together'] / ours:.2f}", f"{row['together'] / products:.2f}"]
        cells.append(f"{row['loss_vs_rtn']:.4f}")
        once = " (once)" if row["repeats"] < result["paper"]["repeats"] else ""
        lines.append(line(label + once, cells, titles))
    cells = ["", "", seconds(products), f"{products / ours:.2f}", "1.00", ""]
    return [*lines, line("matrix products alone", cells, titles), ""]


def line(label: str, cells: Sequence[str], titles: Sequence[str]) -> str:
    padded = (cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True))
    return f"| {label:<29} | " + " | ".join(padded) + " |"


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def verdicts(result: dict[str, Any]) -> list[str]:
    """One line per target; `result` is that of 4096x4096."""
    ours = result["paper"]["together"]
    added = 100 * (result["refine"]["together"] / ours - 1)
    lines = []
    for name, least in (("torch", 3.0), ("gptqmodel", 4.0)):
        label = f"(*) at least {least:.0f} times faster than {LABELS[name]}"
        if name not in result:
            lines.append(f"- {label}: not measured (not installed)")
            continue
        ratio = result[name]["together"] / ours
        lines.append(f"- {label}: {ratio:.2f} — {word(ratio >= least)}")
    ratio = ours / result["products"]
    lines.append(f"- (*) within 2.5 times its matrix products: {ratio:.2f} — {word(ratio <= 2.5)}")
    lines.append(f"- two refine passes add at most 60 %: {added:.0f} % — {word(added <= 60)}")
    return lines


def word(met: bool) -> str:
    return "met" if met else "NOT met"


def setting(threads: int, repeats: int) -> str:
    """One line on what ran where."""
    packages = [name for name in ("numpy", "torch", "gptqmodel") if missing(name) is None]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    what = f"{threads} thread{'s' * (threads > 1)}, median of {repeats}"
    return f"{what}; Python {platform.python_version()}, {', '.join(versions)}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="OUTxIN")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="256x256 only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    if options.quick:
        options.sizes = ["256x256"]
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        names = ["product", *(name for name in LABELS if missing(name) is None)]
        children = {name: Child(name, options.threads, base) for name in names}
        write_problem("256x256", base / "warm")
        for child in children.values():
            child.ask(base / "warm", with_loss=False)
        results = [measure(children, size, options.repeats, base) for size in options.sizes]
        for child in children.values():
            child.close()
    if options.json:
        print(json.dumps({"threads": options.threads, "results": results}, indent=1))
        return
    print(setting(options.threads, options.repeats), end="\n\n")
    for result in results:
        print("\n".join(table(result)))
    stated = [result for result in results if result["size"] == TARGET_SIZE]
    print("\n".join(verdicts(stated[0]) if stated else [f"Targets are stated for {TARGET_SIZE}."]))


if __name__ == "__main__":
    main()
