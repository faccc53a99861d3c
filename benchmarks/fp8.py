"""`ptq rtn` to FP8 on a model of `make_model.py`, next to reading, converting and writing as many
bytes with safetensors and ml_dtypes in one process.

    python benchmarks/make_model.py DIR --parameters 2.0 --tokens 16
    python benchmarks/fp8.py DIR

The conversion alone has no scales, measures nothing and proves nothing. Both are run in turn; the
peak of anonymous memory is that of all processes of a run of its own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scale import show, timed, without_activations

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK")


def convert(folder: Path, target: Path) -> float:
    """Seconds to convert every matrix to E4M3, shard by shard, and to write what comes of it."""
    begin = time.perf_counter()
    target.mkdir()
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                values = file.get_tensor(name)
                if values.ndim == 2:
                    small = values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
                    values = small.view(np.uint8)
                tensors[name] = values
        save_file(tensors, target / path.name)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--options", default="", help="further options of ptq rtn")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fp8-", dir=given.folder.resolve().parent))
    bare = without_activations(given.folder, work)
    try:
        for scheme in SCHEMES:
            measure(scheme, bare, work, given.repeat, given.options.split())
    finally:
        shutil.rmtree(work)


def measure(scheme: str, bare: Path, work: Path, repeat: int, options: list[str]) -> None:
    plain, copied = work / "plain", work / "out"
    command = ("rtn", str(bare), "--scheme", scheme, "-o", str(copied), *options)
    ratios = []
    for _ in range(repeat):
        alone = convert(bare, plain)
        shutil.rmtree(plain)
        ours = timed(*command)[0]
        shutil.rmtree(copied)
        ratios.append(ours / alone)
        show(scheme, seconds=ours, convert=alone, ratio=ratios[-1])
    peak = timed(*command, every=0.02)[1]
    shutil.rmtree(copied)
    show(scheme, median_ratio=float(np.median(ratios)), peak_gib=peak / 2**30)


if __name__ == "__main__":
    main()
