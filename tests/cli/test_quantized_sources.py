"""Models that are quantized already: every command says what they are, and that they are not read
as a source yet; a model that is half FP8 is not half-copied."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ptq_cli
from tests.builders import ptq, random_weight, small_tensors, write_model
from tests.refusals import Q, refused

pytestmark = pytest.mark.usefixtures("here")

EXPERTS = "layers.0.mlp.experts.gate_up_proj"
ONE = np.ones((1, 1), np.float32)
FP8 = random_weight(12, 32).astype(ml_dtypes.float8_e4m3fn)


def words(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


SCALES = np.ones((12, 1), np.float16)
EXPERT_BLOCKS = {f"{EXPERTS}_blocks": words(2, 4, 2, 16), f"{EXPERTS}_scales": words(2, 4, 2)}
FLOAT_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "quantization_status": "compressed", "config_groups": {"group_0": FLOAT_GROUP},
}  # fmt: skip

# name -> tensors in the place of q_proj's weight, config.json's quantization_config, what is said
SOURCES = {
    "fp8": (
        {f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": ONE},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "FP8",
    ),
    "fp8 with .scale": (
        {f"{Q}.weight": FP8, f"{Q}.scale": ONE.astype(ml_dtypes.float8_e8m0fnu)},
        None,
        "FP8",
    ),
    "fp8 alone": ({f"{Q}.weight": FP8.astype(ml_dtypes.float8_e5m2)}, None, "FP8"),
    "mxfp4": (EXPERT_BLOCKS, {"quant_method": "mxfp4"}, "MXFP4"),
    "mxfp4 without config": (EXPERT_BLOCKS, None, "MXFP4"),
    "compressed fp8": (
        {f"{Q}.weight": FP8, f"{Q}.weight_scale": SCALES},
        COMPRESSED,
        "compressed-tensors, float-quantized",
    ),
    "bitsandbytes 4 bits": (
        {f"{Q}.weight": words(192, 1), f"{Q}.weight.absmax": ONE, f"{Q}.weight.quant_map": ONE},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes",
    ),
    "bitsandbytes 8 bits": (
        {f"{Q}.weight": words(12, 32, dtype=np.int8), f"{Q}.SCB": np.ones(12, np.float32)},
        None,
        "bitsandbytes",
    ),
    "hqq": ({f"{Q}.W_q": words(12, 16), f"{Q}.scale": ONE}, {"quant_method": "hqq"}, "HQQ"),
    "torchao": (
        {f"{Q}._weight_qdata": words(12, 32, dtype=np.int8), f"{Q}._weight_scale": ONE},
        {"quant_method": "torchao"},
        "torchao",
    ),
    "mlx": (
        {f"{Q}.weight": words(12, 4, dtype=np.uint32), f"{Q}.scales": SCALES},
        None,
        "MLX",
    ),
    "nvfp4": (
        {f"{Q}.weight": words(12, 16), f"{Q}.weight_scale": FP8[:, :2], f"{Q}.weight_scale_2": ONE},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "Model Optimizer, NVFP4",
    ),
    "gptq": (
        {f"{Q}.qweight": words(4, 12, dtype=np.int32), f"{Q}.scales": SCALES},
        None,
        "GPTQ or AWQ",
    ),
    "int8 with scales": (
        {f"{Q}.weight": words(12, 32, dtype=np.int8), f"{Q}.weight_scales": SCALES},
        None,
        "integers with scales",
    ),
    "somebody's": (
        {f"{Q}.weight": words(12, 32, dtype=np.int8)},
        {"quant_method": "nobody_knows"},
        "nobody_knows",
    ),
}  # fmt: skip
COMMANDS = ("gptq", "rtn", "awq", "smoothquant", "calibrate", "pack", "pack --bits 4")

REPACKED = ("fp8", "compressed fp8")  # to another format of the same numbers


def source(name, *, config=True):
    tensors, declared, _ = SOURCES[name]
    Path("m").mkdir()
    own = {key: value for key, value in small_tensors().items() if key != f"{Q}.weight"}
    write_model(Path("m/model.safetensors"), own | tensors)
    if config and declared is not None:
        document = {"model_type": "llama", "quantization_config": declared}
        Path("m/config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_quantized_already(name):
    source(name)
    _, declared, said = SOURCES[name]
    for command in COMMANDS:
        if command.startswith("pack") and name in REPACKED:
            continue
        said_of_a_source("m", command, said)
        if declared is None:
            said_of_a_source("m/model.safetensors", command, said)


def said_of_a_source(model, command, said):
    outcome = refused(*command.split()[:1], model, *command.split()[1:], words=(said,))
    assert f"{model}: " in outcome.errors[0]
    assert "has no effect" not in outcome.errors[0]
    if "MLX" not in outcome.errors[0]:
        assert "not read as a source yet" in outcome.errors[0]


@pytest.mark.parametrize("name", ["fp8", "compressed fp8", "mxfp4", "bitsandbytes 4 bits", "hqq"])
def test_the_tensors_alone_say_it(name):
    """Without config.json, and as a bare file."""
    source(name, config=False)
    for model in ("m", "m/model.safetensors"):
        for command in COMMANDS:
            refused(*command.split()[:1], model, *command.split()[1:], words=("not read as",))


def test_floats_of_every_width_and_other_integers_are_no_quantized_weights(job):
    tensors = {**small_tensors(), "wide.weight": random_weight(4, 32, dtype=np.float64)}
    tensors |= {"bytes.weight": words(3, 3), "norm.scale": ONE, "logit_scale": ONE}
    write_model(job, tensors)
    assert ptq("rtn", job, "-o", "out").code == 0


def test_inspect_shows_it(here):
    source("fp8 with .scale")
    document = ptq("inspect", "m", "--json").document
    assert document["kind"] == "foreign"
    assert "FP8" in document["quantizing"]["refused"]
    assert {"tensor": f"{Q}.weight", "dtype": "F8_E4M3"}.items() <= {
        key: value for entry in document["tensors"] if entry["tensor"] == f"{Q}.weight"
        for key, value in entry.items()
    }.items()  # fmt: skip
    shown = ptq("inspect", "m")
    assert (shown.code, "cannot be quantized: m: quantized already: FP8" in shown.out) == (0, True)


def test_a_declaration_that_no_tensor_bears_out(job):
    Path("m").mkdir()
    write_model(Path("m/model.safetensors"), small_tensors())
    for place in ({}, {"text_config": {}}):
        inner = place.get("text_config", place)
        inner["quantization_config"] = {"quant_method": "fp8"}
        Path("m/config.json").write_text(json.dumps(place))
        for command in ("gptq", "pack"):
            refused(command, "m", words=("FP8", "no tensor is", "take quantization_config out"))
    for odd in ([], {}, None, False):
        Path("m/config.json").write_text(json.dumps({"quantization_config": odd}))
        assert ptq("rtn", "m", "-o", "out", "--force").code == 0
    for odd in ([1], "fp8", 5, True):
        Path("m/config.json").write_text(json.dumps({"quantization_config": odd}))
        refused("rtn", "m", "-o", "new", words=("quantization_config",))


def test_a_gguf_file(here):
    Path("m").mkdir()
    Path("m/model.gguf").write_bytes(b"GGUF" + bytes(100))
    for command in ("gptq", "rtn", "awq", "calibrate"):
        for model in ("m", "m/model.gguf"):
            refused(command, model, words=("m/model.gguf", "GGUF", "not read as a source yet"))


def test_what_is_repacked_is_still_repacked_but_no_source(sample):
    assert ptq("rtn", sample, "--format", "gptq", "-o", "first").code == 0
    assert ptq("pack", "first", "--format", "gptq_v2", "-o", "second").code == 0
    for command in ("gptq", "rtn", "awq"):
        refused(command, "first", words=("GPTQ, 4 bits", "not read as a source yet"))
    outcome = refused("pack", "first", "--bits", 3, words=("gptq", "--bits", "not read as"))
    assert "has no effect" not in outcome.errors[0]
    with pytest.raises(ptq_cli.PtqError, match="not read as a source yet"):
        ptq_cli.rtn("first")
