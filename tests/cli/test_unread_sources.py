"""Quantized models whose layout is not read, and damaged ones: one line each."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.builders import (
    ptq,
    random_weight,
    small_tensors,
    write_model,
)
from tests.foreign import FOREIGN, GATE_UP, Q, write_foreign
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("here")

ONE = np.ones((1, 1), np.float32)
FP8 = random_weight(12, 32).astype(ml_dtypes.float8_e4m3fn)
EXPERTS = "layers.0.mlp.experts.gate_up_proj"


# ---- what is not read ----


def words(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


SCALES = np.ones((12, 1), np.float16)
# name -> tensors in the place of q_proj's weight, config.json's quantization_config, what is said
SOURCES = {
    "fp8 alone": ({f"{Q}.weight": FP8.astype(ml_dtypes.float8_e5m2)}, None, "FP8"),
    "bitsandbytes without its state": (
        {f"{Q}.weight": words(192, 1), f"{Q}.weight.absmax": ONE, f"{Q}.weight.quant_map": ONE},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
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
COMMANDS = ("gptq", "rtn", "awq", "smoothquant", "calibrate", "pack", "pack --bits 4", "dequantize")


def source(name, *, config=True):
    tensors, declared, _ = SOURCES[name]
    Path("m").mkdir()
    own = {key: value for key, value in small_tensors().items() if key != f"{Q}.weight"}
    write_model(Path("m/model.safetensors"), own | tensors)
    if config and declared is not None:
        document = {"model_type": "llama", "quantization_config": declared}
        Path("m/config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_in_a_layout_that_is_not_read(name):
    source(name)
    _, declared, said = SOURCES[name]
    for command in COMMANDS:
        said_of_a_source("m", command, said)
        if declared is None:
            said_of_a_source("m/model.safetensors", command, said)


def said_of_a_source(model, command, said):
    outcome = refused(*command.split()[:1], model, *command.split()[1:], words=(said,))
    assert f"{model}: " in outcome.errors[0]
    assert "has no effect" not in outcome.errors[0]
    if not command.startswith("pack"):
        assert "which is not read as a source" in outcome.errors[0]


@pytest.mark.parametrize("name", ["bitsandbytes without its state", "hqq", "torchao"])
def test_the_tensors_alone_say_it(name):
    """Without config.json, and as a bare file."""
    source(name, config=False)
    for model in ("m", "m/model.safetensors"):
        for command in COMMANDS:
            refused(*command.split()[:1], model, *command.split()[1:], words=(f"{model}: ",))


def test_floats_of_every_width_and_other_integers_are_no_quantized_weights(job):
    tensors = {**small_tensors(), "wide.weight": random_weight(4, 32, dtype=np.float64)}
    tensors |= {"bytes.weight": words(3, 3), "norm.scale": ONE, "logit_scale": ONE}
    write_model(job, tensors)
    assert ptq("rtn", job, "-o", "out").code == 0
    refused("dequantize", job, words=("nothing in it is quantized",))


def test_a_declaration_that_no_tensor_bears_out(job):
    Path("m").mkdir()
    write_model(Path("m/model.safetensors"), small_tensors())
    for place in ({}, {"text_config": {}}):
        inner = place.get("text_config", place)
        inner["quantization_config"] = {"quant_method": "quanto"}
        Path("m/config.json").write_text(json.dumps(place))
        for command in ("gptq", "pack", "dequantize"):
            refused(command, "m", words=("Quanto",))
    for odd in ([], {}, None, False):
        Path("m/config.json").write_text(json.dumps({"quantization_config": odd}))
        assert ptq("rtn", "m", "-o", "out", "--force").code == 0
    for odd in ([1], "fp8", 5, True):
        Path("m/config.json").write_text(json.dumps({"quantization_config": odd}))
        refused("rtn", "m", "-o", "new", words=("quantization_config",))


def test_what_is_repacked_is_still_repacked(sample):
    assert ptq("rtn", sample, "--format", "gptq", "-o", "first").code == 0
    assert ptq("pack", "first", "--format", "gptq_v2", "-o", "second").code == 0
    outcome = refused("pack", "first", "--bits", 3, words=("gptq", "--bits", "ptq rtn"))
    assert "has no effect" not in outcome.errors[0]


def test_inspect_shows_what_is_not_read():
    source("hqq")
    document = ptq("inspect", "m", "--json").document
    assert document["kind"] == "foreign"
    assert "HQQ" in document["quantizing"]["refused"]
    shown = ptq("inspect", "m")
    assert (shown.code, "cannot be quantized: m: quantized already: HQQ" in shown.out) == (0, True)


# ---- what is read, but damaged ----

NAN = FOREIGN["fbgemm"]().tensors[f"{Q}.weight"].view(np.uint8).copy()
NAN[3, 5] = 0x7F
NEGATIVE = FOREIGN["modelopt_nvfp4"]().tensors[f"{Q}.weight_scale"].view(np.uint8).copy()
NEGATIVE[1, 1] |= 0x80
F8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
NO_STATE = np.frombuffer(b"{}", np.uint8)
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
SCALES_OF, INVERSE = f"{Q}.weight_scale", f"{Q}.weight_scale_inv"
# model, tensor → what it is now (None: missing), what is said
DAMAGED = [
    ("fbgemm", {f"{Q}.weight": NAN.view(F8)}, (f"'{Q}.weight'", "0x7F", "[3, 5]")),
    ("fbgemm", {f"{Q}.weight": np.zeros((0, 64), F8)}, (f"'{Q}.weight' [0, 64] is empty",)),
    ("fbgemm", {SCALES_OF: None}, (f"'{Q}.weight' is F8_E4M3", f"no '{SCALES_OF}'")),
    ("fbgemm", {SCALES_OF: np.ones((5, 1), np.float32)}, (f"'{SCALES_OF}'", "[5, 1]", "[12, 64]")),
    ("fbgemm", {SCALES_OF: np.ones((12, 1), np.int64)}, (f"'{SCALES_OF}' is I64",)),
    ("fbgemm", {SCALES_OF: np.full((12, 1), np.nan, np.float32)}, (f"'{SCALES_OF}'", "not finite")),
    ("modelopt_nvfp4", {SCALES_OF: NEGATIVE.view(F8)}, (f"'{SCALES_OF}'", "below zero", "[1, 1]")),
    ("modelopt_nvfp4", {f"{SCALES_OF}_2": None}, (f"'{SCALES_OF}_2' is missing",)),
    ("modelopt_nvfp4", {f"{SCALES_OF}_2": np.zeros((), np.float32)}, (f"'{SCALES_OF}_2' is 0",)),
    ("modelopt_nvfp4", {f"{SCALES_OF}_2": np.ones(2, np.float32)}, ("F32 [2]",)),
    ("modelopt_nvfp4", {f"{Q}.weight": words(12, 20)}, ("40 columns, no multiple of 16",)),
    ("deepseek_v4", {f"{Q}.scale": words(5, 2).view(E8M0)}, ("[5, 2]", "8 × 32")),
    ("deepseek_v4", {f"{Q}.scale": (words(2, 2) + 255).view(E8M0)}, (f"'{Q}.scale'", "255")),
    ("hf_block", {INVERSE: np.ones((2, 3), np.float32)}, (f"'{INVERSE}'", "[2, 3]")),
    ("hf_block", {INVERSE: None}, ("weight_scale_inv",)),
    ("gpt_oss", {f"{GATE_UP}_scales": words(3, 128, 2)}, (f"'{GATE_UP}_scales'", "[3, 128, 2]")),
    ("gpt_oss", {f"{GATE_UP}_scales": words(3, 128, 1) + 255}, ("exponent 255",)),
    ("gpt_oss", {f"{GATE_UP}_blocks": words(3, 128, 1, 15)}, ("16 bytes to a block",)),
    ("nf4", {STATE: NO_STATE}, (f"'{STATE}' is no quantization state",)),
    ("nf4", {f"{Q}.weight.absmax": np.ones(7, np.float32)}, ("absmax", "[7]", "[12]")),
    ("llm_int8", {f"{Q}.SCB": np.ones(3, np.float32)}, (f"'{Q}.SCB'", "[3]", "[12]")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), DAMAGED, ids=str)
def test_a_damaged_source(name, changes, said):
    model = FOREIGN[name]()
    for tensor, values in changes.items():
        if values is None:
            del model.tensors[tensor]
        else:
            model.tensors[tensor] = values
    write_foreign(Path("m"), model)
    for command in ("dequantize", "rtn"):
        refused(command, "m", "-o", "out", words=("m/model.safetensors", *said))


def test_a_block_size_that_is_none():
    model = FOREIGN["deepseek_v4"]()
    for odd in ("big", [128], [0, 32]):
        folder = write_foreign(Path(f"m{odd}"), model)
        document = json.loads((folder / "config.json").read_text())
        document["quantization_config"]["weight_block_size"] = odd
        (folder / "config.json").write_text(json.dumps(document))
        refused("dequantize", folder, words=("weight_block_size",))


def test_a_part_that_no_layout_explains():
    """Fused experts of FP4 beside linears that are read."""
    model = FOREIGN["modelopt_nvfp4"]()
    model.tensors[f"{EXPERTS}_weight_scale"] = FP8
    write_foreign(Path("m"), model)
    refused("rtn", "m", words=("m: ", f"'{EXPERTS}_weight_scale'", "scaled-floats"))


def test_values_beyond_float16():
    model = FOREIGN["fbgemm"]()
    model.tensors[SCALES_OF] = np.full((12, 1), 1e6, np.float32)
    write_foreign(Path("m"), model)
    refused(
        "dequantize", "m", "--dtype", "float16", words=(f"'{Q}.weight'", "too large for float16")
    )
