"""SHA-256 of the files that `ptq` writes, over methods, formats and bits: are the bytes the same?

    python benchmarks/output_digests.py --ptq PATH/TO/ptq [--jobs 2] > digests.txt

Runs an installed `ptq` by its command line alone, so it works for any version of the code: make one
listing with each of two versions, on one machine (BLAS rounds differently on others) and with this
same file, and `diff` them. `ptq` needs its extras `text`, `gguf` and `onnx`.

A line is `<sha256>  <run>/<file>`. Where `ptq` refuses, it is `refused exit=<code> <run>` (with
`#<number>` in a run of several commands); a traceback makes it `crashed`. Each run has a folder of
its own beside copies of the data, so that no path of the machine gets into an output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "../sample_data"
TOKENS = f"--tokens {MODEL}/calibration_tokens.npy --nsamples 8"
FORMATS = ("ptq", "gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "gguf", "onnx")
METHODS = ("pack", "rtn", "gptq", "awq", "smoothquant")
BITS = range(2, 9)


def rounding() -> Iterator[str]:
    """Commands without their MODEL: `pack`, `rtn` and `gptq`."""
    for form in FORMATS:
        for bits in BITS:
            for zero in ("sym", "asym"):
                yield f"pack --bits {bits} --group-size 32 --{zero} --format {form}"
        yield f"pack --bits 4 --group-size -1 --format {form}"
    grids = {"none": "128 --asym", "static": "128 --sym", "desc": "32 --asym"}
    for bits in BITS:
        yield f"rtn --bits {bits} --group-size 128 --sym"
        yield f"rtn --bits {bits} --group-size 32 --asym --no-mse"
        for order, grid in grids.items():
            yield f"gptq --bits {bits} --group-size {grid} --act-order {order}"
    for group in (-1, 0):
        yield f"rtn --bits 4 --group-size {group} --asym"
        yield f"rtn --bits 8 --group-size {group} --narrow-range --no-mse"
        yield f"gptq --bits 4 --group-size {group} --asym"
    for form in FORMATS[1:]:
        order = "desc" if form.startswith("gptq") else "static"
        yield f"gptq --bits 4 --group-size 32 --act-order {order} --format {form}"
    for bits in (2, 3, 4):
        yield f"gptq --bits {bits} --refine 0 --sweeps 0 --no-mse --act-order none"
        yield f"gptq --bits {bits} --asym {TOKENS}"
        yield f"gptq --bits {bits} {TOKENS} --parallel-layers"
    yield f"gptq --bits 3 --refine 4 --sweeps 0 --damp-percent 0.01 {TOKENS} --drift 0"
    yield f"gptq --bits 4 {TOKENS} --format compressed-tensors"


def smoothing() -> Iterator[str]:
    """The same of `awq` and `smoothquant`."""
    for source in ("", f" {TOKENS}"):
        for bits in (3, 4):
            for then in ("awq", "gptq"):
                yield f"awq --bits {bits} --asym --then {then}{source}"
        for alpha in ("0.5", "auto"):
            for scheme in ("dynamic-token", "dynamic-tensor", "static"):
                yield f"smoothquant --alpha {alpha} --activation-scheme {scheme}{source}"
            yield f"smoothquant --alpha {alpha} --then gptq{source}"
            yield f"smoothquant --alpha {alpha} --bits 16{source}"
    yield "awq --bits 2 --group-size 32 --no-clip --no-compare --n-grid 10"
    yield f"awq --bits 4 --asym {TOKENS} --parallel-layers --format awq"
    yield f"smoothquant {TOKENS} --parallel-layers"
    yield "smoothquant --bits 4 --group-size 128 --activation-bits 4"
    yield "smoothquant --activation-scheme none"
    yield "smoothquant --activation-scheme static --format compressed-tensors"


def others() -> Iterator[str]:
    """The same of schemes, recipes, how the work is divided, and what is not rounded."""
    for method in METHODS[:-1]:
        yield f"{method} --scheme W4A16"
    yield "smoothquant --scheme W8A8 --format compressed-tensors"
    for recipe in sorted(ROOT.glob("configs/*.toml")):
        method = tomllib.loads(recipe.read_text())["method"]
        yield f"{method} --config ../configs/{recipe.name}"
        yield f"{method} --config ../configs/{recipe.name} {TOKENS}"
    # The same bytes as above, where these two are without --workers.
    yield "gptq --bits 4 --group-size 128 --sym --act-order static --workers 2"
    yield "rtn --bits 4 --group-size 128 --sym --workers 2"
    yield "gptq --bits 4 --max-shard-size 300KB --format gptq"
    yield "smoothquant --max-shard-size 300KB"
    yield "rtn --bits 4 --ignore v_proj --include embed_tokens --scale-dtype float32"
    yield "gptq --bits 5 --group-size 128 --format mlx --on-misfit keep"


def runs() -> dict[str, list[str]]:
    """Commands that follow each other in one folder, by its name."""
    runs: dict[str, list[str]] = {}
    for line in (*rounding(), *smoothing(), *others()):
        command, _, options = line.partition(" ")
        name = line.replace(TOKENS, "tokens").replace("--config ../configs/", "").replace("--", "")
        runs[name.replace(" ", "_")] = [f"{command} {MODEL} {options}"]
    runs["one-file"] = [f"{method} {MODEL}/model.safetensors" for method in METHODS]
    runs["calibrate"] = [
        f"calibrate {MODEL} -o activations.st",
        f"calibrate {MODEL} --gradients ../gradients -o fisher.st",
        f"calibrate {MODEL} {TOKENS} -o tokens.st",
        f"calibrate {MODEL} --text {MODEL}/README.md --seq-len 64 -o text.st",
        f"calibrate {MODEL} --merge activations.st --merge tokens.st -o merged.st",
        *(f"{method} {MODEL} --calibration merged.st" for method in METHODS[1:]),
        f"rtn {MODEL} --bits 3 --weight fisher --calibration fisher.st",
        f"gptq {MODEL} --bits 3 --weight fisher --calibration fisher.st",
    ]
    for grid in ("sym --scale-dtype float16", "asym --scale-dtype bfloat16"):
        source = f"gptq {MODEL} --group-size 32 --{grid} -o source"
        packs = [f"pack source --format {form} -o {form}" for form in FORMATS[1:]]
        back = [f"pack {form} --format ptq -o {form}-ptq" for form in FORMATS[1:]]
        runs[f"repack-{grid.split()[0]}"] = [source, *packs, *back]
    runs["eval"] = [
        f"gptq {MODEL} --bits 3 -o w3",
        f"smoothquant {MODEL} --activation-scheme static -o w8a8",
        f"eval {MODEL} w3 --report w3.json",
        f"eval {MODEL} w3 {TOKENS} --kl-per-block --report w3-tokens.json",
        f"eval {MODEL} w8a8 {TOKENS} --report w8a8-tokens.json",
        f"eval {MODEL} w8a8 --activation-scheme dynamic-token --report w8a8.json",
    ]
    return runs


def write_gradients(folder: Path) -> None:
    """Made-up gradients of two samples for each linear of the sample model, as `.npy`."""
    folder.mkdir()
    with (ROOT / "sample_data/model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    drawn = random.Random(0)
    for name in sorted(name for name in header if name.endswith("_proj.weight")):
        rows, columns = header[name]["shape"]
        values = array("f", (drawn.random() ** 4 for _ in range(2 * rows * columns)))
        shape = (2, rows, columns)
        about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(about)) + about.encode()
        (folder / f"{name.removesuffix('.weight')}.npy").write_bytes(start + values.tobytes())


def listing(ptq: Path, beside: Path, name: str, commands: list[str]) -> list[str]:
    """The lines of one run; its folder is removed."""
    folder, lines = beside / name, []
    folder.mkdir()
    for number, command in enumerate(commands, 1):
        words = command.split()
        repacks = words[0] == "pack" and not words[1].startswith(MODEL)  # one process does it
        if words[0] != "eval" and not repacks and "--workers" not in words:
            words += ["--workers", "1"]
        words = [str(ptq), *words, "--quiet"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            what = "crashed" if "Traceback" in done.stderr else "refused"
            step = f"#{number}" if len(commands) > 1 else ""
            lines.append(f"{what} exit={done.returncode} {name}{step}")
    for path in filter(Path.is_file, sorted(folder.rglob("*"))):
        content = path.read_bytes()
        if path.suffix == ".json":  # reports of `ptq eval` say how long it took
            content = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {path.relative_to(beside)}")
    shutil.rmtree(folder)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ptq", type=Path, required=True, help="the executable")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    begin, planned = time.monotonic(), runs()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        beside = Path(temporary)
        shutil.copytree(ROOT / "sample_data", beside / "sample_data")
        shutil.copytree(ROOT / "configs", beside / "configs")
        write_gradients(beside / "gradients")
        work = partial(listing, options.ptq.absolute(), beside)
        for lines in pool.map(work, planned.keys(), planned.values()):
            print(*lines, sep="\n", flush=True)
    print(f"{len(planned)} runs, {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
