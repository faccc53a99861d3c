"""Hessian accumulation from float16 files: speed against this machine's sgemm, peak memory.

    python benchmarks/hessian.py [--tokens 262144] [--columns 4096] [--repeats 3]

One thread. The rate counts the full product, 2 · tokens · columns² flops; the symmetric product
does half of them, so twice the sgemm rate is the limit. sgemm is measured in the same run, before
and after each repeat. Peak anonymous memory is read from /proc/self/status after streaming a file
of `--tokens` tokens (2 GiB by default), without and with all the other statistics.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402

from ptq_cli.numerics.statistics import SiteAccumulator, piece_tokens  # noqa: E402
from ptq_cli.storage.npy import open_inputs  # noqa: E402


class HessianOnly(SiteAccumulator):
    """The Hessian alone, without the elementwise statistics."""

    def _add_elements(self, piece: np.ndarray) -> None:
        pass


def sgemm_rate(n: int = 2048) -> float:
    """Flops per second of one square float32 product."""
    a = np.ones((n, n), np.float32)
    begin = time.perf_counter()
    a @ a
    return 2 * n**3 / (time.perf_counter() - begin)


def write_activations(path: Path, tokens: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal((4096, columns), dtype=np.float32).astype(np.float16)
    values = np.lib.format.open_memmap(path, "w+", np.float16, (tokens, columns))
    for start in range(0, tokens, 4096):
        values[start : start + 4096] = block[: tokens - start]
    values.flush()


def accumulate(path: Path, kind: type[SiteAccumulator]) -> float:
    """Seconds to stream the whole file."""
    inputs = open_inputs(path, bf16=False)
    begin = time.perf_counter()
    sums = kind(inputs.in_features)
    step = piece_tokens(inputs.in_features)
    for start in range(0, inputs.n_tokens, step):
        sums.update(inputs.read(start, min(start + step, inputs.n_tokens)))
    return time.perf_counter() - begin


def peak_anonymous(path: Path, kind: type[SiteAccumulator]) -> int:
    """Peak resident anonymous bytes of a child process that streams the file."""
    child = os.fork()
    if child == 0:
        accumulate(path, kind)
        os._exit(0)
    peak = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            words = Path(f"/proc/{child}/status").read_text().split()
            peak = max(peak, 1024 * int(words[words.index("RssAnon:") + 1]))
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    hessian_bytes = 4 * options.columns**2
    print(
        f"float16 activations [{options.tokens}, {options.columns}],"
        f" {options.tokens * options.columns * 2 / 2**30:.2f} GiB; Hessian"
        f" {hessian_bytes / 2**20:.0f} MiB"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npy"
        write_activations(path, options.tokens, options.columns)
        flops = 2 * options.tokens * options.columns**2
        peaks = {kind: peak_anonymous(path, kind) for kind in (HessianOnly, SiteAccumulator)}
        ratios: dict[type, list[float]] = {HessianOnly: [], SiteAccumulator: []}
        sgemm_rate()
        for _ in range(options.repeats):
            for kind in ratios:
                before = sgemm_rate()
                rate = flops / accumulate(path, kind)
                ratios[kind].append(rate / statistics.mean((before, sgemm_rate())))
    print("| what | rate / sgemm rate | peak anonymous memory above the Hessian |")
    print("|---|---|---|")
    for kind, name in ((HessianOnly, "Hessian"), (SiteAccumulator, "Hessian and all statistics")):
        above = (peaks[kind] - hessian_bytes) / 2**20
        print(f"| {name} | {statistics.median(ratios[kind]):.2f} | {above:.0f} MiB |")


if __name__ == "__main__":
    main()
