"""A kill at every state-changing call, and every such call failing: RELIABILITY in practice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.builders import ROOT, half_sample, ptq, random_weight, small_job, write_model
from tests.storage.gguf_files import write_unknown_gguf


def calibrated(command, *first):
    """A command on a small model and its activations."""

    def words(folder):
        model, activations = small_job(folder)
        return [*first, command, model, "--activations", activations]

    return words


def square_model(folder):
    """Of a width that every format can hold."""
    names = ("up_proj", "down_proj")
    tensors = {
        f"model.layers.0.mlp.{name}.weight": random_weight(64, 64, seed=i, dtype=np.float16)
        for i, name in enumerate(names)
    }
    norm = random_weight(64, dtype=np.float16)
    return write_model(folder / "model.safetensors", {**tensors, "model.norm.weight": norm})


def repacked(folder):
    packed = folder / "packed"
    assert ptq("rtn", square_model(folder), "--group-size", 32, "-o", packed).code == 0
    return ["pack", packed, "--format", "gptq"]


def dequantized(folder):
    packed = folder / "packed"
    assert ptq("rtn", square_model(folder), "--group-size", 32, "-o", packed).code == 0
    return ["dequantize", packed]


def gguf_file(folder):
    write_unknown_gguf(folder / "m.gguf")
    options = ["--format", "gguf", "-b", 4, "-g", 32]
    return ["place=out.gguf", "rtn", folder / "m.gguf", *options]


PLAINLY = ("--refine", "0", "--sweeps", "0", "--no-mse")  # so that a run takes less
COMMANDS = {
    "gptq": lambda f: [*calibrated("gptq")(f), *PLAINLY],
    "calibrate": calibrated("calibrate"),
    "calibrate in parts": calibrated("calibrate", "parts=48"),
    "onnx": lambda f: ["rtn", square_model(f), "--format", "onnx", "--group-size", 32],
    "gguf": lambda f: ["rtn", half_sample(f / "sample", blocks=1), "--format", "gguf"],
    "gguf file": gguf_file,
    "repack": repacked,
    "dequantize": dequantized,
}


def cases(tmp_path, kind, step, command, old):
    """Run tests/attacks/faults.py on a small model."""
    words = [str(word) for word in COMMANDS[command](tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    script = [sys.executable, "-m", "tests.attacks.faults", kind, str(step)]
    result = subprocess.run(
        [*script, str(tmp_path / "work"), "1" if old else "0", *words],
        env=env,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) > 40 // step
    return found


def check_kill(case):
    assert case["code"] == -9, case
    assert case["state"] in ("before", "whole"), case
    check_again(case)


def check_failure(case):
    assert case["code"] in (0, 1), case
    assert not case["traceback"], case
    assert case["state"] == ("whole" if case["code"] == 0 else case["state"]), case
    assert case["state"] in ("before", "whole"), case
    cleaning = case["call"].split()[1] in ("unlink", "rmdir")
    if case["left"] and not cleaning:
        assert (case["code"], case["state"]) == (1, "before"), case
        assert case["left"] in (["out.partial"], ["out.gguf.partial"]), case
        assert case["units"] > 0, case
        assert f"{case['units']} finished unit" in case["words"], case
    check_again(case)


def check_again(case):
    assert case["again"] == 0, case
    assert case["again_state"] == "whole", case
    assert case["again_left"] == [], case


@pytest.mark.parametrize(
    ("command", "kind", "old"),
    [("gptq", "kill", True), ("calibrate", "EIO", False)],
)
def test_every_seventh_call(tmp_path, command, kind, old):
    """The slow tests below stop at every call, of each command, with and without an old output."""
    for case in cases(tmp_path, kind, 7, command, old):
        (check_kill if kind == "kill" else check_failure)(case)


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    ("command", "old"),
    [("gptq", False), ("gptq", True), ("calibrate", False), ("calibrate in parts", True)],
)
def test_a_kill_leaves_the_old_or_the_new_and_the_rerun_ends_the_same(tmp_path, command, old):
    for case in cases(tmp_path, "kill", 1, command, old):
        check_kill(case)


@pytest.mark.slow(8)
@pytest.mark.parametrize(
    ("command", "kind", "old"),
    [("gptq", "ENOSPC", False), ("gptq", "ENOSPC", True), ("gptq", "EIO", True),
     ("gptq", "EACCES", False), ("calibrate", "EIO", False), ("calibrate", "EIO", True)],
)  # fmt: skip
def test_a_failing_call_is_an_error_or_does_no_harm(tmp_path, command, kind, old):
    for case in cases(tmp_path, kind, 1, command, old):
        check_failure(case)


@pytest.mark.slow(3)
@pytest.mark.parametrize(
    ("kind", "old"),
    [("kill", True), ("ENOSPC", False)],
    ids=["kill over an older output", "ENOSPC"],
)
@pytest.mark.parametrize(
    ("command", "step"),
    [("onnx", 3), ("gguf", 11), ("gguf file", 7), ("repack", 3), ("dequantize", 2)],
)
def test_other_containers(tmp_path, command, step, kind, old):
    needed = {"onnx": "onnx", "gguf file": "gguf"}
    pytest.importorskip(needed.get(command, "numpy"))
    for case in cases(tmp_path, kind, step, command, old):
        (check_kill if kind == "kill" else check_failure)(case)
