"""`ptq check` and `--runtime`; folders that contradict themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq

DOWN = "model.layers.0.mlp.down_proj"

LOADS = {
    "gptq": {"transformers", "gptqmodel"},
    "awq": {"transformers", "gptqmodel", "mlx"},
    "compressed-tensors": {"transformers"},
    "mlx": {"mlx"},
    "gguf": {"transformers", "llama.cpp"},
    "onnx": set(),
    "ptq": set(),
}
NOT_TRIED = {("gptq", "vllm"), ("awq", "vllm"), ("compressed-tensors", "vllm")}
VERDICTS = {True: "loaded in our tests", False: "known not to load", None: "not tried"}
RUNTIMES = ("transformers", "vllm", "llama.cpp", "mlx", "gptqmodel")


@pytest.mark.parametrize("form", LOADS)
def test_who_loads_what(made, form):
    if form in ("gguf", "onnx"):
        pytest.importorskip(form)
    out = made("rtn", "--format", form)
    for runtime in RUNTIMES:
        outcome = ptq("check", out, "--runtime", runtime, "--json")
        document = outcome.document
        loads = None if (form, runtime) in NOT_TRIED else runtime in LOADS[form]
        assert document["loads"] is loads, (runtime, document)
        assert document["verdict"] == VERDICTS[loads]
        assert (document["why"] is None) == (loads is True)
        assert outcome.code == (3 if loads is False else 0)
        assert all(fact["text"] for fact in document["facts"])
        assert (loads is False) == any(fact["level"] == "fails" for fact in document["facts"])


CASES = [
    ("transformers", ["--format", "gptq", "-g", -1], 0, "note: model.layers.", "gptq_torch"),
    ("transformers", ["--format", "awq", "-g", -1], 0, "limit: model.layers.", "torch_awq"),
    ("transformers", ["--format", "compressed-tensors", "--asym"], 0, "limit", "dequantized"),
    ("transformers", ["--format", "gptq", "--include", "lm_head"], 3, "fails: lm_head", "never"),
    ("gptqmodel", ["--format", "gptq", "--include", "lm_head"], 0, "note", "7.6.0"),
    ("mlx", ["--format", "awq", "-g", -1], 3, "fails", "groups of 32, 64 and 128"),
    ("vllm", ["--format", "compressed-tensors", "--asym", "-b", 3], 3, "fails", "4 or 8 bits"),
    ("vllm", ["--format", "compressed-tensors", "-b", 3], 0, "limit", "recent version"),
    ("vllm", ["--format", "gptq"], 0, "note: scales", "VLLM_MARLIN_INPUT_DTYPE=int8"),
    ("llama.cpp", ["--format", "gptq"], 3, "fails", "ptq pack --format gguf"),
]


@pytest.mark.parametrize(("runtime", "options", "code", "level", "words"), CASES)
def test_facts(one_block, runtime, options, code, level, words):
    made = ptq("rtn", one_block, *options, "--runtime", runtime, "-o", "out")
    assert made.code == 0
    outcome = ptq("check", "out", "--runtime", runtime)
    assert outcome.code == code
    lines = [line for line in outcome.out.splitlines() if words in line]
    assert lines
    assert lines[0].startswith(level)
    if not level.startswith("note"):
        assert [line for line in made.err.splitlines() if words in line and runtime in line]


@pytest.mark.parametrize(
    ("bits", "runtime", "code", "words"),
    [
        (8, "vllm", 0, "note: from vLLM's source"),
        (4, "vllm", 0, "W4A8 needs a recent version"),
        (6, "vllm", 3, "--bits 8"),
        (4, "transformers", 0, "8 bits only"),
    ],
)
def test_facts_of_rounded_inputs(made, bits, runtime, code, words):
    out = made("smoothquant", "--bits", bits, "--format", "compressed-tensors")
    outcome = ptq("check", out, "--runtime", runtime)
    assert outcome.code == code
    assert words in outcome.out


def test_mixed_grids_are_for_gptqmodel(sample):
    Path("r.toml").write_text('group_size = 32\n[[layers]]\nmatch = "down_proj"\nbits = 8\n')
    assert ptq("rtn", sample, "--config", "r.toml", "--format", "gptq", "-o", "out").code == 0
    assert ptq("check", "out", "--runtime", "gptqmodel").code == 0
    outcome = ptq("check", "out", "--runtime", "transformers")
    assert outcome.code == 3
    assert "model.layers.{0-1}.mlp.down_proj: has another grid" in outcome.err


def test_a_dense_layer_that_nobody_declared(sample):
    options = ["--ignore", "layers.1.mlp.down_proj", "--format", "compressed-tensors"]
    ptq("rtn", sample, *options, "-o", "out")
    assert ptq("check", "out", "--runtime", "transformers").code == 0
    path = Path("out/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    path.write_text(json.dumps(config))
    outcome = ptq("check", "out", "--runtime", "transformers")
    assert (outcome.code, "model.layers.1.mlp.down_proj: is dense" in outcome.err) == (3, True)


def test_a_bare_file_has_no_model_type(job):
    ptq("rtn", job, "-g", -1, "-b", 8, "--format", "compressed-tensors", "-o", "out")
    outcome = ptq("check", "out", "--runtime", "transformers")
    assert (outcome.code, "model_type" in outcome.err) == (3, True)


def without(name):
    return lambda config, tensors: tensors.pop(f"{DOWN}.{name}")


def declared(**settings):
    return lambda config, tensors: config["quantization_config"].update(settings)


def narrower(name):
    def change(config, tensors):
        tensors[f"{DOWN}.{name}"] = np.ascontiguousarray(tensors[f"{DOWN}.{name}"][:, :-1])

    return change


def filled(name, value):
    return lambda config, tensors: tensors[f"{DOWN}.{name}"].fill(value)


BROKEN = {
    "bits": ("gptq", declared(bits=8), DOWN),
    "group size": ("gptq", declared(group_size=64), f"{DOWN}.qzeros"),
    "no scales": ("gptq", without("scales"), f"{DOWN}.scales"),
    "no g_idx": ("gptq", without("g_idx"), f"{DOWN}.g_idx"),
    "no qzeros": ("awq", without("qzeros"), f"{DOWN}.qzeros"),
    "no weight_shape": ("compressed-tensors", without("weight_shape"), f"{DOWN}.weight_shape"),
    "width": ("compressed-tensors", narrower("weight_packed"), f"{DOWN}.weight_packed"),
    "unknown method": ("gptq", declared(quant_method="hqq"), "not a quantized checkpoint"),
    "layout": ("gptq", declared(checkpoint_format="gptq_p"), "gptq_p"),
    "old stream": ("compressed-tensors", declared(version="0.9.0"), "before 0.18"),
    "scales": ("mlx", filled("scales", np.nan), "not finite"),
    "biases": ("mlx", filled("biases", np.inf), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_contradict_themselves(sample, made, case):
    from safetensors.numpy import load_file, save_file

    form, change, words = BROKEN[case]
    bits = 3 if case == "old stream" else 4
    shutil.copytree(made("rtn", "-b", bits, "--format", form), "out")
    config, tensors = json.loads(Path("out/config.json").read_text()), {}
    tensors = load_file("out/model.safetensors")
    change(config, tensors)
    Path("out/config.json").write_text(json.dumps(config))
    Path("out/quantize_config.json").unlink(missing_ok=True)
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    for command in (["eval", sample, "out"], ["pack", "out", "--format", "ptq", "-o", "x"]):
        outcome = ptq(*command)
        assert (outcome.code, len(outcome.errors)) == (1, 1), outcome
        assert words in outcome.err
        assert "internal error" not in outcome.err
    assert not Path("x").exists()


def test_formats_that_are_not_known(one_block):
    assert ptq("rtn", one_block, "--format", "zip", "-o", "out").code == 2
    Path("r.toml").write_text('format = "zip"\n')
    outcome = ptq("rtn", one_block, "--config", "r.toml", "-o", "out")
    assert (outcome.code, "zip" in outcome.err) == (1, True)


def test_mixed_layers_in_a_fused_group(one_block):
    Path("r.toml").write_text('[[layers]]\nmatch = "q_proj"\nbits = 8\n')
    outcome = ptq("rtn", one_block, "--config", "r.toml", "--format", "gptq", "-o", "out")
    assert outcome.code == 1
    for word in ("k_proj has 4 bits", "q_proj has 8 bits", "fuse"):
        assert word in outcome.err
