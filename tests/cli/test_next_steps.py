"""What summaries say: what was counted, and the commands to go on with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builders import SAMPLE, ptq, random_inputs, small_activations, small_job
from tests.cli.test_terminal import ENVIRONMENT, PTQ

STEP = re.compile(r"^(?:to|for|before) [^:]*: (ptq .*)$", re.M)


def steps(text):
    return STEP.findall(text)


def run_line(line, **env):
    """A line as a person would paste it."""
    script = f'ptq() {{ {" ".join(PTQ)} "$@"; }}; {line}'
    env = {**ENVIRONMENT, **env}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, check=False)


@pytest.fixture(scope="module")
def sample(one_block):
    return one_block


# ---- what to do next ----


@pytest.mark.slow
def test_every_step_runs_as_it_stands(sample):
    shutil.copytree(sample, "my model's")
    queue = [
        'ptq calibrate "my model\'s" --tokens "my model\'s/calibration_tokens.npy" --nsamples 3',
        'ptq gptq "my model\'s" --format compressed-tensors',
        'ptq gptq "my model\'s" --tokens "my model\'s/calibration_tokens.npy" --nsamples 3 -o t',
        'ptq smoothquant "my model\'s" --bits 16 -o -- ./-smooth',
    ]
    queue[-1] = 'ptq smoothquant "my model\'s" --bits 16 -o ./-smooth'
    seen = set()
    while queue:
        line = queue.pop(0)
        if line in seen:
            continue
        seen.add(line)
        done = run_line(line)
        assert done.returncode == 0, (line, done.stderr[-500:])
        queue += steps(done.stdout.decode())
    assert {line.split()[1] for line in seen} >= {"calibrate", "gptq", "eval", "check", "pack"}
    assert any("--min-gain" in line for line in seen)
    assert any("--max-kl" in line for line in seen)
    assert "ptq rtn ./-smooth --scheme W8A8" in seen


@pytest.mark.parametrize(
    "name", ["-dash", "sp ace", "quo'te", "$HOME `id` \\", "schön模型", "line\nbreak", "e\x1b[2J"]
)
def test_paths_are_quoted_for_the_shell(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    small_job(folder)
    model, acts = Path(name, "model.safetensors"), Path(name, "acts")
    made = ptq("gptq", f"./{model}", "--activations", f"./{acts}", "-o", "out")
    assert "\x1b" not in made.out
    (line,) = [line for line in steps(made.out) if line.startswith("ptq eval")]
    script = f"ptq() {{ printf '%s\\0' \"$@\"; }}; {line}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    command, *paths = words.decode().split("\0")[:-1]
    assert [word for word in paths if word.startswith("-")] == ["--activations"]
    assert (command, *map(Path, paths)) == ("eval", model, Path("out"), Path("--activations"), acts)


def test_a_quoted_path_that_the_encoding_lacks(tmp_path):
    folder = tmp_path / "schön模型"
    folder.mkdir()
    small_job(folder)
    command = [*PTQ, "gptq", folder / "model.safetensors", "--activations", folder / "acts"]
    env = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    made = subprocess.run([*command, "-o", "out"], env=env, capture_output=True, check=True)
    (line,) = [x for x in steps(made.stdout.decode("ascii")) if x.startswith("ptq eval")]
    done = run_line(line, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, (line, done.stderr)


def test_a_path_that_looks_like_an_option(tmp_path):
    small_job(tmp_path)
    Path("model.safetensors").rename("-m.safetensors")
    made = run_line("ptq gptq --activations acts -o out -- -m.safetensors")
    (line,) = steps(made.stdout.decode())
    assert line == "ptq eval ./-m.safetensors out --activations acts"
    assert run_line(line).returncode == 0


def test_no_step_where_a_gate_is_missed_or_json_is_wanted(job):
    words = ("gptq", job, "--activations", "acts", "-o", "out", "--force")
    missed = ptq(*words, "--min-gain", "99")
    assert missed.code == 3
    assert steps(missed.out) == []
    assert missed.errors[0].endswith("; out was written all the same")
    assert set(json.loads(ptq(*words, "--json").out)) >= {"totals", "output"}


def test_eval_with_gates_suggests_none(job):
    assert ptq("gptq", job, "--activations", "acts", "-o", "out").code == 0
    words = ("eval", job, "out", "--activations", "acts")
    assert len(steps(ptq(*words).out)) == 1
    assert steps(ptq(*words, "--max-rel-err", "1").out) == []


# ---- what was counted ----


def test_what_is_counted_is_named(job):
    assert "fallbacks to" not in ptq("pack", job, "-o", "packed").out
    assert "fallbacks to" not in ptq("rtn", job, "--activations", "acts", "-o", "rounded").out
    made = ptq("gptq", job, "--activations", "acts", "-o", "out")
    assert "fallbacks to round-to-nearest: 0;" in made.out
    measured = ptq("eval", job, "packed", "--activations", "acts")
    assert "codes equal to round-to-nearest's: 4 layers (marked *)" in measured.out
    assert "fallbacks to" not in measured.out


def test_repacking_speaks_of_no_error(job):
    assert ptq("gptq", job, "--activations", "acts", "-o", "out").code == 0
    outcome = ptq("pack", "out", "-o", "repacked")
    assert outcome.code == 0
    for word in ("gain", "rel err", "rtn", "smaller"):
        assert word not in outcome.out, word
    assert "codes and scales are those that were there" in outcome.out


@pytest.mark.parametrize("gate", ["--min-gain", "--max-rel-err", "--max-fallbacks"])
def test_a_gate_on_repacking_would_hold_nothing(gate, job):
    assert ptq("gptq", job, "--activations", "acts", "-o", "out").code == 0
    outcome = ptq("pack", "out", "-o", "repacked", gate, "1")
    assert outcome.code == 2
    assert "ptq eval" in outcome.err
    assert not Path("repacked").exists()


@pytest.mark.parametrize("command", ["gptq", "awq", "smoothquant"])
def test_drift_without_tokens_is_refused(command, sample):
    outcome = ptq(command, sample, "--drift", "0.5", "-o", "out")
    assert outcome.code == 1
    assert "--drift" in outcome.err
    tokens = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 2)
    if command == "gptq":
        outcome = ptq(command, sample, *tokens, "--parallel-layers", "--drift", "0.5", "-o", "out")
        assert outcome.code == 1
        assert ptq(command, sample, *tokens, "--drift", "0.5", "-o", "out").code == 0


@pytest.mark.parametrize("command", ["eval", "check"])
def test_smoothed_floats_are_not_quantized(command, sample):
    made = ptq("smoothquant", sample, "--bits", 16, "-o", "smooth")
    assert made.code == 0
    words = {"eval": (sample, "smooth"), "check": ("smooth", "--runtime", "vllm")}[command]
    outcome = ptq(command, *words)
    assert outcome.code == 1
    assert "smoothed float weights" in outcome.errors[0]
    assert "ptq rtn" in outcome.errors[0]
    (step,) = steps(made.out)
    assert run_line(step).returncode == 0


def test_smoothed_floats_say_what_made_them(sample):
    assert ptq("smoothquant", sample, "--bits", 16, "--alpha", "0.4", "-o", "smooth").code == 0
    for name in ("quantization.json", "report.json"):
        document = json.loads(Path("smooth", name).read_text())
        settings = document["settings"]
        assert settings["method"] == document.get("method", "smoothquant") == "smoothquant"
        assert (settings["bits"], settings["alpha"]) == (16, 0.4)
        assert not {"group_size", "refine", "sweeps", "mse"} & set(settings)


@pytest.mark.parametrize(("n_tokens", "left"), [(46, 41), (44, 39)])
def test_held_out_tokens_are_not_calibrated_on(n_tokens, left, job, tmp_path):
    """Every eighth token is held out; down_proj has 40 columns."""
    small_activations(tmp_path / "few", **{"layers.0.down_proj": random_inputs(n_tokens, 40)})
    quantized = ptq("gptq", job, "--activations", "few", "-o", "out", "--json")
    calibrated = ptq("calibrate", job, "--activations", "few", "-o", "c.safetensors")
    (row,) = [r for r in quantized.document["layers"] if r["module"] == "layers.0.down_proj"]
    assert row["tokens"] == left
    for outcome in (quantized, calibrated):
        assert outcome.code == 0
        assert len(outcome.warnings) == (left < 40)
        if left < 40:
            words = f"layers.0.down_proj: calibrated on {left} tokens, fewer than its 40 columns"
            assert words in outcome.warnings[0]
