"""What a run costs on a model of `make_model.py`, next to what the machine can do at all.

    python benchmarks/make_model.py DIR --parameters 2.0
    python benchmarks/scale.py DIR [--rtn-only] [--gptq-options "--sweeps 0"]

rtn: seconds over those that one process needs to read the shards and convert them to float32 with
ml_dtypes. gptq: the gain of two workers over one, next to the gain of two processes that do plain
sgemm over one, measured before and after. Peak anonymous memory is the sum over all processes of a
run, sampled; rtn's in a run of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

PIECE = 1 << 18
SGEMM = """
import os, sys, time
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np
a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
a @ a
print("ready", flush=True)
sys.stdin.readline()
begin = time.perf_counter()
for _ in range(int(sys.argv[1])):
    a @ a
print(time.perf_counter() - begin, flush=True)
"""


def read_and_convert(folder: Path) -> float:
    """Seconds to read every shard and convert it, a piece that fits the cache at a time."""
    raw, floats = np.empty(2 * PIECE, np.uint8), np.empty(PIECE, np.float32)
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(raw.data) // 2:
                np.copyto(floats[:n], raw[: 2 * n].view(ml_dtypes.bfloat16))
    return time.perf_counter() - begin


def load_tensors(folder: Path) -> float:
    """Seconds to load and convert every tensor with safetensors, one at a time: what a loop of a
    few lines would do."""
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - it has no other
                file.get_tensor(name).astype(np.float32)
    return time.perf_counter() - begin


def sgemm(processes: int, count: int = 40) -> float:
    """Products per second of so many processes together, one BLAS thread each."""
    command = [sys.executable, "-c", SGEMM, str(count)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in running:
        process.stdout.readline()
    begin = time.perf_counter()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        process.stdout.readline()
    seconds = time.perf_counter() - begin
    for process in running:
        process.communicate()
    return processes * count / seconds


def anonymous(process: int) -> int:
    """Anonymous memory of a process and all below it, in bytes."""
    own = Path(f"/proc/{process}")
    try:
        lines = (own / "status").read_text().splitlines()
        children = [
            int(n) for task in own.glob("task/*/children") for n in task.read_text().split()
        ]
    except OSError:
        return 0  # it has ended
    memory = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return memory + sum(map(anonymous, children))


def timed(*arguments: str, every: float = 0.5) -> tuple[float, int]:
    """Seconds and peak anonymous memory of `ptq` with these arguments.

    every: seconds from one look at the memory to the next; looking costs time itself
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "ptq_cli", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(every)

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.communicate()[1]
    watcher.join()
    if process.returncode:
        raise SystemExit(errors.decode())
    return time.perf_counter() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rtn-only", action="store_true")
    parser.add_argument("--gptq-options", default="")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="scale-", dir=given.folder.resolve().parent))
    try:
        measure(given, work, without_activations(given.folder, work))
    finally:
        shutil.rmtree(work)


def without_activations(folder: Path, work: Path) -> Path:
    """The same weights in a folder of their own, without activations beside them."""
    bare = work / "bare"
    bare.mkdir()
    for path in folder.glob("*.*"):
        (bare / path.name).symlink_to(path.resolve())
    return bare


def measure(given: argparse.Namespace, work: Path, bare: Path) -> None:
    read_and_convert(given.folder)  # into the page cache
    plain = ("rtn", str(bare), "--no-mse", "-o", str(work / "rtn"))
    peak = timed(*plain, every=0.02)[1]
    ratios = []
    for _ in range(given.repeat):
        shutil.rmtree(work / "rtn")
        before = read_and_convert(given.folder)
        rtn = timed(*plain)[0]
        reading = (before + read_and_convert(given.folder)) / 2
        ratios.append(rtn / reading)
        show("rtn", seconds=rtn, read_and_convert=reading, ratio=ratios[-1])
    shutil.rmtree(work / "rtn")
    tensors = load_tensors(given.folder)
    show("rtn", median_ratio=float(np.median(ratios)), peak_gib=peak / 2**30,
         safetensors_load=tensors)  # fmt: skip
    if given.rtn_only:
        return
    plain = [sgemm(1), sgemm(2)]
    seconds, peaks = [], []
    for workers in ("1", "2"):
        more = ["--workers", workers, *given.gptq_options.split()]
        spent, peak = timed("gptq", str(given.folder), "-o", str(work / f"gptq{workers}"), *more)
        seconds.append(spent)
        peaks.append(peak)
    after = [sgemm(1), sgemm(2)]
    gain = (plain[1] + after[1]) / (plain[0] + after[0])
    ours = seconds[0] / seconds[1]
    show("gptq", one=seconds[0], two=seconds[1], gain=ours, sgemm_gain=gain, part=ours / gain,
         peak_gib=peaks[1] / 2**30)  # fmt: skip


def show(what: str, **figures: float) -> None:
    print(what, json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
