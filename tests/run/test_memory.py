"""What units say they need against what they take: the peak of a process that works on one."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.run.workers import _environment
from tests.builders import ROOT, random_weight, write_model

# Prints for each unit or site its name, the bytes stated and the growth of the resident peak. What
# is resident is anonymous but for libraries that were there before: inputs are read, not mapped.
CHILD = """
import gc, json, sys
from pathlib import Path
from ptq_cli.run import calibrate, loop, site_statistics
from ptq_cli.cli.main import run

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def watched(name, memory, work):
    def watch(job):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kilobytes("VmRSS")
        result = work(job)
        print(json.dumps([name(job), memory(job), 1024 * (kilobytes("VmHWM") - before)]))
        return result
    return watch

stated = {}
run_tasks = calibrate.run_tasks

def noting(tasks, *rest, **options):
    stated.update((task.argument.unit, task.memory) for task in tasks)
    return run_tasks(tasks, *rest, **options)

calibrate.run_tasks = noting
site_statistics.make = watched(
    lambda job: job.unit, lambda job: stated.get(job.unit), site_statistics.make
)
loop.work_on = watched(lambda job: job.unit.name, lambda job: job.unit.memory, loop.work_on)
sys.exit(run(sys.argv[1:]))
"""
LAYER = "model.layers.0.mlp.down_proj"


def measured(*words):
    """(name, stated, real) of each unit that a command works on, as a worker would."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words), "--workers", "1", "--quiet"],
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]


def check(stated, real):
    assert real <= 1.02 * stated, f"takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"
    assert stated <= 2.5 * real, f"takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"


def job(folder, shape, dtype=ml_dtypes.bfloat16):
    """A model of one linear, with statistics beside it."""
    in_features = shape[1]
    weight = random_weight(*shape, dtype=dtype)
    model = write_model(folder / "model.safetensors", {f"{LAYER}.weight": weight})
    tokens = np.random.default_rng(1).standard_normal((in_features + 700, in_features), np.float32)
    np.save(folder / f"{LAYER}.npy", tokens.astype(np.float16))
    return model, folder / f"{LAYER}.npy"


CASES = [
    ((1536, 1536), "rtn", "--no-mse"),
    ((1024, 4096), "rtn"),
    ((1536, 1536), "rtn", "--group-size", "0", "--bits", "8"),
    ((2048, 1024), "rtn", "--format", "gptq"),
    ((2048, 1024), "rtn", "--format", "awq", "--asym"),
    ((512, 512), "gptq"),
    ((1536, 1536), "gptq"),
    ((4096, 1024), "gptq"),
    ((1536, 1536), "gptq", "--act-order", "desc", "--bits", "8"),
    ((1536, 1536), "gptq", "--refine", "0", "--sweeps", "0", "--no-mse"),
    ((1536, 1536), "gptq", "--group-size", "-1"),
    ((1024, 1024), "gptq", "--group-size", "0", "--bits", "8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "words"), [(c[0], c[1:]) for c in CASES], ids=str)
def test_a_unit_takes_what_it_states(tmp_path, shape, words):
    model, inputs = job(tmp_path, shape)
    ((_, stated, real),) = measured("calibrate", model, "--activations", inputs)
    check(stated, real)
    ((_, stated, real),) = measured(*words, model, "-o", tmp_path / "out")
    check(stated, real)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_wide_dtypes_and_activations_read_on_the_way(tmp_path, method):
    model, inputs = job(tmp_path, (2048, 1024), np.float32)
    more = ["--activations", inputs] if method == "gptq" else []
    ((_, stated, real),) = measured(method, model, *more, "-o", tmp_path / "out")
    check(stated, real)


@pytest.mark.slow
def test_the_largest_unit_of_a_model_of_two_billion_leaves_room_for_a_second(tmp_path):
    """Two workers, hidden 2560, inner 6912: everything together stays under 2 GiB."""
    model, inputs = job(tmp_path, (2560, 6912))
    np.save(inputs, np.load(inputs)[:3000])
    assert measured("calibrate", model, "--activations", inputs)
    ((_, stated, real),) = measured("gptq", model, "-o", tmp_path / "out")
    check(stated, real)
    assert real < 0.75 * 2**30
