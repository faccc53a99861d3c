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

# Prints for each unit, site or stage its name, the bytes stated and the growth of the resident
# peak. What is resident is anonymous but for libraries that were there before: inputs are read, not
# mapped.
CHILD = """
import ctypes, gc, json, sys
from pathlib import Path
from ptq_cli.calibration.streams import Streams
from ptq_cli.run import calibrate, in_sequence, loop
from ptq_cli.cli.main import run

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def begin():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the unit before has left
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return kilobytes("VmRSS")

def end(before, name, memory):
    print(json.dumps([name, memory, 1024 * (kilobytes("VmHWM") - before)]))

def watched(name, memory, work):
    def watch(job):
        before = begin()
        result = work(job)
        end(before, name(job), memory(job))
        return result
    return watch

stated = {}
run_tasks = calibrate.run_tasks

def noting(tasks, *rest, **options):
    stated.update((task.argument.unit, task.memory) for task in tasks)
    return run_tasks(tasks, *rest, **options)

calibrate.run_tasks = noting
calibrate.make = watched(lambda job: job.unit, lambda job: stated.get(job.unit), calibrate.make)
statistics_of, round_unit = Streams.statistics, in_sequence._round
began = {}

def statistics(streams, site):
    began[site] = begin()
    return statistics_of(streams, site)

def rounded(work, unit, of_site):
    result = round_unit(work, unit, of_site)
    end(began[unit.site], unit.name, unit.memory)
    return result

advance_streams = Streams.advance

def advance(streams, decoded):
    name, before = "stage {} {}".format(*streams.order), begin()
    advance_streams(streams, decoded)
    end(before, name, streams.source.memory(1, None if streams.main.in_memory else 0))

Streams.statistics, in_sequence._round, Streams.advance = statistics, rounded, advance
loop.work_on = watched(lambda job: job.unit.name, lambda job: job.unit.memory, loop.work_on)
sys.exit(run(sys.argv[1:]))
"""
LAYER = "model.layers.0.mlp.down_proj"


def measured(*words):
    """(name, stated, real) of each unit that a command works on, as a worker would, and of each
    stage that it takes the model through."""
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
    assert stated <= 2 * real, f"takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"


def job(folder, shape, dtype=ml_dtypes.bfloat16, n_tokens=None):
    """A model of one linear, with inputs of it beside it: 700 more than it has columns."""
    in_features = shape[1]
    n_tokens = n_tokens or in_features + 700
    weight = random_weight(*shape, dtype=dtype)
    model = write_model(folder / "model.safetensors", {f"{LAYER}.weight": weight})
    tokens = np.random.default_rng(1).standard_normal((n_tokens, in_features), np.float32)
    np.save(folder / f"{LAYER}.npy", tokens.astype(np.float16))
    return model, folder / f"{LAYER}.npy"


def model_of(folder, hidden, inner):
    """A Llama of one block in BF16, and tokens for it."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
    }
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, inner)
    return written_model(folder, config, shapes, 32, 128)


def written_model(folder, config, shapes, n_sequences, length):
    """The folder of a model of one block, and options for random tokens. shapes: of its linears"""
    hidden = config["hidden_size"]
    tensors = {
        f"model.layers.0.{name}.weight": random_weight(*shape, dtype=ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = random_weight(256, hidden, dtype=ml_dtypes.bfloat16)
    write_model(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = np.random.default_rng(2).integers(0, 256, (n_sequences, length))
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    return folder, ("--tokens", folder / "tokens.npy")


TOKEN_CASES = [
    ("gptq",),
    ("gptq", "--drift", "0"),
    ("gptq", "--group-size", "-1"),
    ("awq", "--no-compare", "--n-grid", "4"),  # each step takes the same
    ("awq", "--no-compare", "--n-grid", "4", "--then", "gptq"),
    ("smoothquant", "--then", "gptq"),
    ("smoothquant",),
]


@pytest.mark.slow(5)
@pytest.mark.parametrize(("hidden", "inner"), [(256, 704), (512, 1408)])
@pytest.mark.parametrize("words", TOKEN_CASES, ids=" ".join)
def test_units_in_sequence_take_what_they_state(tmp_path, words, hidden, inner):
    """From the sums of inputs and drift to the staged bytes; the largest decides how many bytes a
    run takes, so of that one not much more is stated."""
    model, tokens = model_of(tmp_path, hidden, inner)
    found = measured(*words, model, *tokens, "-o", tmp_path / "out")
    units = [each for each in found if not each[0].startswith("stage")]
    assert len(units) == 4 < len(found)
    for name, stated, real in found:
        assert real <= 1.02 * stated, f"{name} takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"
    check(*max(units, key=lambda unit: unit[1])[1:])


def mixture_of(folder, experts, hidden, inner):
    """A Mixtral of one block in BF16, and 256 tokens for it."""
    config = {
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes["block_sparse_moe.gate"] = (experts, hidden)
    for expert in range(experts):
        base = f"block_sparse_moe.experts.{expert}."
        shapes |= {f"{base}w1": (inner, hidden), f"{base}w3": (inner, hidden)}
        shapes[f"{base}w2"] = (hidden, inner)
    return written_model(folder, config, shapes, 4, 64)


@pytest.mark.slow(10)
def test_experts_are_decoded_one_at_a_time(tmp_path):
    """All of a stage, as float32, would take 67 MB. (The states are in files.)"""
    model, tokens = mixture_of(tmp_path, experts=16, hidden=512, inner=1024)
    words = ("rtn", "--no-mse", "--max-memory", "1KiB")
    found = measured(*words, model, *tokens, "-o", tmp_path / "out")
    stages = [stated for name, stated, _ in found if name.startswith("stage")]
    assert (len(stages), len(found)) == (4, 4 + 2 + 2 * 16)
    assert max(stages) < 40e6
    for name, stated, real in found:
        assert real <= 1.02 * stated, f"{name} takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"


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


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A model of one linear of a shape, with statistics beside it, made once."""
    models = {}

    def of(shape):
        if shape not in models:
            model, inputs = job(tmp_path_factory.mktemp("calibrated"), shape)
            ((_, stated, real),) = measured("calibrate", model, "--activations", inputs)
            check(stated, real)
            models[shape] = model
        return models[shape]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "words"), [(c[0], c[1:]) for c in sorted(CASES)], ids=str)
def test_a_unit_takes_what_it_states(tmp_path, calibrated, shape, words):
    model = calibrated(shape)
    ((_, stated, real),) = measured(*words, model, "-o", tmp_path / "out")
    check(stated, real)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2048, 1024), (1024, 4096)], ids=str)
def test_where_no_hessian_is_summed(tmp_path, shape):
    model, inputs = job(tmp_path, shape)
    ((_, stated, real),) = measured("rtn", model, "--activations", inputs, "-o", tmp_path / "out")
    check(stated, real)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_wide_dtypes_and_activations_read_on_the_way(tmp_path, method):
    model, inputs = job(tmp_path, (2048, 1024), np.float32)
    more = ["--activations", inputs] if method == "gptq" else []
    ((_, stated, real),) = measured(method, model, *more, "-o", tmp_path / "out")
    if method == "rtn":  # rows go from the file to the codes, so that it takes far less
        assert real <= stated
    else:
        check(stated, real)


@pytest.mark.slow(12)
def test_the_largest_unit_of_a_model_of_two_billion_leaves_room_for_a_second(tmp_path):
    """Two workers, hidden 2560, inner 6912: everything together stays under 2 GiB."""
    model, inputs = job(tmp_path, (2560, 6912), n_tokens=3000)
    assert measured("calibrate", model, "--activations", inputs)
    fewer = ("--refine", 1, "--sweeps", 1)  # each pass takes the same
    ((_, stated, real),) = measured("gptq", model, *fewer, "-o", tmp_path / "out")
    check(stated, real)
    assert real < 0.75 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ptq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_units_of_a_quantized_source(tmp_path, form, method):
    """Codes and packed words beside the weight that they are decoded to."""
    model, inputs = job(tmp_path, (2048, 1024))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    assert measured("rtn", model, "--format", form, "-o", tmp_path / "m")
    more = ["--activations", inputs] if method == "gptq" else []
    words = ("--group-size", 64, *more, "-o", tmp_path / "out")
    ((_, stated, real),) = measured(method, tmp_path / "m", *words)
    assert real <= 1.02 * stated, f"takes {real / 1e6:.0f} MB, states {stated / 1e6:.0f}"
