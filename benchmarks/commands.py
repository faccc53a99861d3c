"""Times whole commands: `ptq gptq` of one linear from float16 activations beside torch.

    python benchmarks/commands.py                       # 4096², 8192 tokens, one thread
    python benchmarks/commands.py --quick               # 256²: does it run
    python benchmarks/commands.py --python VENV/bin/python     # one that has torch and gptqmodel

Each contender reads the weight and the activations from their files, sums the Hessian, quantizes to
4 bits in groups of 128 and writes a file: `ptq`, start and imports included, packed, measured, read
back and compared; the paper's loop in torch and GPTQModel's class (both of contenders.py) with the
decoded weight in float16 at the end. One process with one thread each, in turn; medians of CPU
seconds (user and system) and of wall seconds. Of the others, what is compared is their work alone:
their imports, which take seconds, stand in a column of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contenders import BITS, GROUP, NEEDS, gptqmodel_task, torch_columns, torch_factor
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
BATCH_TOKENS = 2048  # of the Hessians of the others
SHARED = ["--bits", str(BITS), "--group-size", str(GROUP), "--asym", "--workers", "1"]
PAPER = ["--refine", "0", "--sweeps", "0", "--no-mse", "--act-order", "none"]
OURS = {"paper": PAPER, "fast": ["--effort", "fast"], "defaults": []}
LABELS = {
    "paper": "`ptq gptq`, the paper's algorithm (*)",
    "fast": "`ptq gptq --effort fast`",
    "defaults": "`ptq gptq`, defaults",
    "torch": "the paper's loop in torch",
    "gptqmodel": "GPTQModel's class",
}
TARGETS = [("torch", "paper", 2.3), ("gptqmodel", "paper", 2.8), ("torch", "defaults", 1.0)]

Seconds = dict[str, float]  # cpu, wall: of the whole process; own_cpu, own_wall: of its work alone


# ---- in the process of a contender ----


def torch_command(weight: Any, inputs: Any) -> Any:
    """The paper's loop: weight [out, in] and inputs [n_tokens, in] as they are read."""
    import torch

    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    for batch in inputs.split(BATCH_TOKENS):
        values = batch.float()
        hessian.addmm_(values.T, values)
    hessian /= len(inputs)
    return torch_columns(weight.float(), torch_factor(hessian))


def gptqmodel_command(weight: Any, inputs: Any) -> Any:
    """GPTQModel's class, which gathers its Hessian itself."""
    import torch

    make, quantize = gptqmodel_task()
    task = make(weight.float().numpy())
    for batch in inputs.split(BATCH_TOKENS):
        task.add_batch(batch, None)
    return torch.from_numpy(quantize(task))


COMMANDS: dict[str, Callable[[Any, Any], Any]] = {
    "torch": torch_command,
    "gptqmodel": gptqmodel_command,
}


def serve(name: str, model: Path, out: Path) -> None:
    """Do a contender's work, timed without its imports; the seconds go to standard output."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    import torch
    from safetensors import torch as tensors

    torch.set_num_threads(1)
    if name == "gptqmodel":
        gptqmodel_task()  # its imports
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        weight = tensors.load_file(model / "model.safetensors")["linear.weight"]
        inputs = torch.from_numpy(np.load(model / "activations" / "linear.npy"))
        decoded = COMMANDS[name](weight, inputs)
        tensors.save_file({"linear.weight": decoded.half()}, out / "model.safetensors")
    own = {"own_cpu": time.process_time() - cpu, "own_wall": time.perf_counter() - wall}
    print(json.dumps(own), file=channel, flush=True)


# ---- around them ----


def write_model(folder: Path, size: int, tokens: int) -> None:
    """A linear in float16, and inputs of it: correlated through 64 factors, channels of different
    size."""
    random = np.random.default_rng(0)
    (folder / "activations").mkdir(parents=True)
    weight = random.standard_normal((size, size), np.float32) * np.float32(0.02)
    save_file({"linear.weight": weight.astype(np.float16)}, folder / "model.safetensors")
    inputs = random.standard_normal((tokens, size), np.float32)
    factors = random.standard_normal((64, size), np.float32) / np.float32(8)
    inputs += random.standard_normal((tokens, 64), np.float32) @ factors
    inputs *= np.exp(random.standard_normal(size, np.float32) / 2)
    np.save(folder / "activations" / "linear.npy", inputs.astype(np.float16))


def environment(caches: Path) -> dict[str, str]:
    """One thread, and bytecode kept as in an installed package."""
    threads = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "OPENBLAS", "MKL")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(caches)}
    return {**os.environ, **threads, **cached, "PYTHONPATH": path}


def served(script: str, told: list[str], caches: Path) -> Any:
    """The last line, JSON, that a script prints for `--serve`, in a process of its own."""
    command, env = [sys.executable, script, "--serve", *told], environment(caches)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def timed(command: list[str], env: dict[str, str]) -> Seconds:
    """Seconds of a process; where it prints its own, these too."""
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    own = {"own_cpu": cpu, "own_wall": wall}
    if "--serve" in command:
        own = json.loads(done.stdout.splitlines()[-1])
    return {"cpu": cpu, "wall": wall, **own}


def commands(given: argparse.Namespace, model: Path, out: Path) -> dict[str, list[str]]:
    """What is run, by the contender's name; those that are not installed are left out."""
    ours = [sys.executable, "-m", "ptq_cli", "gptq", str(model), "--force", "-o", str(out / "ptq")]
    found = {name: [*ours, *SHARED, *options, "--quiet"] for name, options in OURS.items()}
    for name, packages in NEEDS.items():
        look = f"import importlib.util as i; exit(not all(map(i.find_spec, {packages!r})))"
        if subprocess.run([given.python, "-c", look]).returncode == 0:
            found[name] = [given.python, __file__, "--serve", name, str(model), str(out)]
    return found


def measure(given: argparse.Namespace, base: Path) -> dict[str, Seconds]:
    """Medians of every contender, each run once before."""
    write_model(base / "model", given.size, given.tokens)
    (base / "out").mkdir()
    env, runs = environment(base / "caches"), commands(given, base / "model", base / "out")
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for turn in range(given.repeats + 1):
        for name, command in runs.items():
            seconds[name].append(timed(command, env))
            words = ", ".join(f"{key} {value:.2f}" for key, value in seconds[name][-1].items())
            print(f"{turn}/{given.repeats} {name}: {words}", file=sys.stderr)
    return {
        name: {key: statistics.median(one[key] for one in each[1:]) for key in each[0]}
        for name, each in seconds.items()
    }


def table(found: dict[str, Seconds]) -> list[str]:
    """Markdown: seconds, and the work of each over the whole of (*)."""
    lines = ["| | CPU s | wall s | start and imports, CPU s | CPU vs (*) | wall vs (*) |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    paper = found["paper"]
    for name, own in found.items():
        cells = [f"{own['own_cpu']:.2f}", f"{own['own_wall']:.2f}"]
        cells.append("included" if name in OURS else f"{own['cpu'] - own['own_cpu']:.2f}")
        cells += [f"{own[f'own_{kind}'] / paper[kind]:.2f}" for kind in ("cpu", "wall")]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return lines


def verdicts(found: dict[str, Seconds]) -> list[str]:
    """A line for each target."""
    lines = []
    for peer, name, least in TARGETS:
        if peer in found:
            ratio = found[peer]["own_cpu"] / found[name]["cpu"]
            word = "met" if ratio >= least else "NOT met"
            what = f"{LABELS[peer]} over {LABELS[name]}"
            lines.append(f"- {what}: {ratio:.2f}, at least {least}: {word}")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="runs torch and GPTQModel")
    parser.add_argument("--quick", action="store_true", help="256², 1024 tokens")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.size, given.tokens = 256, 1024
    return given


def main() -> None:
    given = arguments()
    if given.serve:
        serve(given.serve[0], Path(given.serve[1]), Path(given.serve[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    print(f"{given.size} × {given.size}, {given.tokens} tokens, medians of {given.repeats}\n")
    print("\n".join([*table(found), "", *verdicts(found)]))


if __name__ == "__main__":
    main()
