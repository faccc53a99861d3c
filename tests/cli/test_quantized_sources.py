"""Quantized models as MODEL: read as the floats they stand for, or refused with what they are."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ptq_cli
from ptq_cli.storage.sources import open_float
from tests.builders import (
    half_sample,
    ptq,
    random_weight,
    read_model,
    small_tensors,
    tree,
    write_model,
)
from tests.cli.tiny_folders import llama
from tests.foreign import FOREIGN, GATE_UP, Q, write_foreign
from tests.refusals import refused
from tests.stopping import STAGED, killed

pytestmark = pytest.mark.usefixtures("here")

FLOAT32 = ("--dtype", "float32")
FP8 = random_weight(12, 32).astype(ml_dtypes.float8_e4m3fn)


def arrays(path):
    """Name → array, read without this project's code."""
    words = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "I64": np.int64}
    return {
        name: np.frombuffer(content, words[dtype]).reshape(shape)
        for name, (dtype, shape, content) in read_model(Path(path)).items()
    }


# ---- what is read ----


@pytest.mark.parametrize("name", FOREIGN)
def test_the_float_model_of_what_others_publish(name):
    """Every weight is what its layout says; all else is as it was, and nothing is left over."""
    model = FOREIGN[name]()
    write_foreign(Path("m"), model)
    outcome = ptq("dequantize", "m", "-o", "out", *FLOAT32)
    assert (outcome.code, outcome.warnings) == (0, [])
    found = arrays("out/model.safetensors")
    for tensor, weight in model.weights.items():
        np.testing.assert_array_equal(found[tensor], weight)
        assert found[tensor].dtype == np.float32
    plain = {k: v for k, v in small_tensors().items() if k not in model.weights}
    biases = {k: v for k, v in model.tensors.items() if k.endswith("_bias")}
    assert found.keys() == {*plain, *biases, *model.weights}
    for tensor, values in (plain | biases).items():
        assert found[tensor].tobytes() == values.tobytes()
    config = json.loads(Path("out/config.json").read_text())
    kept = json.loads(Path("m/config.json").read_text())
    del kept["quantization_config"]
    assert config == {**kept, "torch_dtype": "float32"}
    assert Path("out/tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("name", FOREIGN)
def test_it_is_written_in_the_dtype_of_the_model(name):
    model = FOREIGN[name]()
    write_foreign(Path("m"), model)
    assert ptq("dequantize", "m", "-o", "out").code == 0
    found = arrays("out/model.safetensors")
    for tensor, weight in model.weights.items():
        assert found[tensor].tobytes() == weight.astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_without_a_dtype_is_what_its_other_tensors_are():
    write_foreign(Path("m"), FOREIGN["fbgemm"](), dtype=None)
    assert ptq("dequantize", "m", "-o", "out").code == 0
    assert arrays("out/model.safetensors")[f"{Q}.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"


def test_what_only_hf_quant_config_says():
    """Model Optimizer's file beside config.json, which no output keeps."""
    model = FOREIGN["modelopt_fp8"]()
    write_foreign(Path("m"), model._replace(declared=None))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    Path("m/hf_quant_config.json").write_text(json.dumps(said))
    for command, folder in (("dequantize", "out"), ("rtn", "again")):
        options = FLOAT32 if command == "dequantize" else ("--group-size", 4)
        assert ptq(command, "m", "-o", folder, *options).code == 0
        assert not Path(folder, "hf_quant_config.json").exists()
    (tensor, weight), *_ = model.weights.items()
    np.testing.assert_array_equal(arrays("out/model.safetensors")[tensor], weight)
    Path("m/hf_quant_config.json").write_text("[]")
    refused("rtn", "m", "-o", "new", words=("m/hf_quant_config.json",))


def test_a_bare_file_without_config():
    for name in ("gpt_oss", "modelopt_nvfp4", "nf4"):
        model = FOREIGN[name]()
        folder = write_foreign(Path(name), model)
        (folder / "config.json").unlink()
        outcome = ptq("dequantize", folder / "model.safetensors", "-o", f"{name}-out", *FLOAT32)
        assert outcome.code == 0, outcome
        found = arrays(f"{name}-out/model.safetensors")
        for tensor, weight in model.weights.items():
            np.testing.assert_array_equal(found[tensor], weight)


@pytest.mark.parametrize("name", FOREIGN)
def test_rounding_a_quantized_model_is_rounding_what_it_decodes_to(name):
    write_foreign(Path("m"), FOREIGN[name](), dtype="float32")
    assert ptq("dequantize", "m", "-o", "float", *FLOAT32).code == 0
    options = ("--group-size", 4, "--format", "ptq", "--scale-dtype", "float16")
    for model in ("m", "float"):
        outcome = ptq("rtn", model, *options, "-o", f"{model}-out", "--strict")
        assert outcome.code == 0, outcome
    files = [read_model(Path(f"{model}-out/model.safetensors")) for model in ("m", "float")]
    assert files[0] == files[1]
    report = json.loads(Path("m-out/report.json").read_text())
    assert any("m was quantized before (" in warning for warning in report["warnings"])
    assert "quantization_config" not in json.loads(Path("m-out/config.json").read_text())
    first, second = (ptq("eval", model, "m-out", "--json") for model in ("m", "float"))
    assert (first.code, second.code) == (0, 0)
    errors = [[row["rel_err"] for row in out.document["layers"]] for out in (first, second)]
    assert errors[0] == errors[1]
    assert not any("other bytes" in warning for warning in first.document["warnings"])


WRITTEN = {
    "ptq": (), "gptq": (), "gptq_v2": ("--asym",), "awq": ("--asym",), "compressed-tensors": (),
    "mlx": (), "gguf": ("--group-size", 32), "onnx": (),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITTEN)
def test_what_this_tool_writes_is_read(form):
    pytest.importorskip(form if form in ("gguf", "onnx") else "numpy")
    source = llama(Path("float"))
    options = WRITTEN[form] or ("--group-size", 64)
    if "--group-size" not in options:
        options = (*options, "--group-size", 64)
    assert ptq("rtn", source, "--format", form, *options, "-o", "m").code == 0
    assert ptq("dequantize", "m", "-o", "out", *FLOAT32).code == 0
    found, original = arrays("out/model.safetensors"), arrays("float/model.safetensors")
    assert found.keys() == original.keys()
    for name, weight in found.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            np.testing.assert_array_equal(weight, ptq_cli.load_weight("m", module))
        elif form != "gguf":  # which casts vectors
            assert weight.tobytes() == original[name].tobytes()
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"
    assert ptq("inspect", "out", "--json").document["kind"] == "float"


SCHEMES = [
    ("FP8_DYNAMIC", ()), ("FP8", ("--activations", "float/activations")), ("FP8_BLOCK", ()),
    ("FP8_BLOCK", ("--format", "fp8")), ("NVFP4A16", ()), ("MXFP4A16", ()), ("MXFP8", ()),
    ("NVFP4", ("--activations", "float/activations")), ("MXFP4A16", ("--format", "mlx")),
    ("NVFP4A16", ("--format", "ptq")),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=str)
def test_schemes_of_small_floats_are_read(scheme, options):
    half_sample(Path("float"))
    words = ("--scheme", scheme, "--ignore", "model.layers.1.*", "-o", "m")
    assert ptq("rtn", "float", *words, *options).code == 0
    outcome = ptq("dequantize", "m", "-o", "out", *FLOAT32)
    assert outcome.code == 0, outcome
    found, original = arrays("out/model.safetensors"), arrays("float/model.safetensors")
    assert found.keys() == original.keys()
    for name in original:
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            np.testing.assert_array_equal(found[name], ptq_cli.load_weight("m", module))
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())


def with_tokens(form: str, *options: object) -> tuple[str, Path]:
    """A quantized model `m` of two small blocks, and tokens for it."""
    llama(Path("float"), dtype="float32")
    assert ptq("rtn", "float", "--format", form, "-g", 64, *options, "-o", "m").code == 0
    path = Path("tokens.npy")
    np.save(path, np.random.default_rng(0).integers(0, 96, (6, 16)).astype(np.int32))
    return "--tokens", path


def test_scales_of_the_cache_are_left_out():
    tokens = with_tokens("ptq")
    words = (*tokens, "--kv-cache", "fp8", "-g", 64, "--format", "compressed-tensors")
    assert ptq("gptq", "float", *words, "-o", "cached").code == 0
    assert any(name.endswith("k_scale") for name in read_model(Path("cached/model.safetensors")))
    assert ptq("dequantize", "cached", "-o", "out").code == 0
    names = arrays("out/model.safetensors").keys()
    assert names == arrays("float/model.safetensors").keys()


@pytest.mark.slow
def test_calibration_and_gptq_run_on_what_it_decodes_to():
    """The same bytes from the quantized folder and from its float32 folder, on tokens too."""
    tokens = with_tokens("compressed-tensors")
    assert ptq("dequantize", "m", "-o", "wide").code == 0
    for model in ("m", "wide"):
        options = ("--bits", 3, "-g", 32, "-o", f"{model}-out", "--workers", 1)
        assert ptq("gptq", model, *tokens, *options).code == 0
        assert ptq("calibrate", model, *tokens, "-o", f"{model}.st").code == 0
    files = [read_model(Path(f"{model}-out/model.safetensors")) for model in ("m", "wide")]
    assert files[0] == files[1]
    statistics = [read_model(Path(f"{model}.st")) for model in ("m", "wide")]
    assert statistics[0] == statistics[1]
    quality = [ptq("eval", model, "m-out", *tokens, "--json") for model in ("m", "wide")]
    assert quality[0].document["quality"] == quality[1].document["quality"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
def test_smoothing_a_quantized_model(bits):
    tokens = with_tokens("gptq", "--bits", 8)
    assert ptq("dequantize", "m", "-o", "wide").code == 0
    for model in ("m", "wide"):
        words = ("--bits", bits, *tokens, "-o", f"{model}-out")
        assert ptq("smoothquant", model, *words).code == 0
    assert "quantization_config" not in json.loads(Path("m-out/config.json").read_text())
    files = [read_model(Path(f"{model}-out/model.safetensors")) for model in ("m", "wide")]
    assert files[0] == files[1]


def test_experts_in_one_tensor_are_seen_one_by_one():
    """Gate and up take turns, inputs before outputs: each expert is decoded alone."""
    model = FOREIGN["gpt_oss"]()
    checkpoint = open_float(write_foreign(Path("m"), model))
    experts = GATE_UP.removesuffix("gate_up_proj")
    for number in range(3):
        both = model.weights[GATE_UP][number]
        for place, name in enumerate(("gate_proj", "up_proj")):
            tensor = f"{experts}{number}.{name}.weight"
            np.testing.assert_array_equal(checkpoint.matrix(tensor, (64, 32)), both[:, place::2].T)
        down = model.weights[f"{experts}down_proj"][number]
        tensor = f"{experts}{number}.down_proj.weight"
        np.testing.assert_array_equal(checkpoint.matrix(tensor, (32, 64)), down.T)
        bias = model.tensors[f"{GATE_UP}_bias"][number]
        np.testing.assert_array_equal(
            checkpoint.read(f"{experts}{number}.up_proj.bias"), bias[1::2]
        )


def test_what_a_worker_gets_is_small():
    checkpoint = open_float(write_foreign(Path("m"), FOREIGN["modelopt_nvfp4"]()))
    part = pickle.loads(pickle.dumps(checkpoint.part([f"{Q}.weight"])))
    assert len(pickle.dumps(part)) < 4096
    assert list(part.tensors) == [f"{Q}.weight"]
    np.testing.assert_array_equal(
        part.matrix(f"{Q}.weight", (12, 64)), checkpoint.matrix(f"{Q}.weight", (12, 64))
    )


@pytest.mark.parametrize("changed", ["weight", "weight_scale", "weight_scale_2"])
def test_the_fingerprint_tells_scales_apart(changed):
    model = FOREIGN["modelopt_nvfp4"]()
    first = open_float(write_foreign(Path("m"), model)).fingerprint
    again = open_float(write_foreign(Path("again"), model)).fingerprint
    stored = model.tensors[f"{Q}.{changed}"]
    model.tensors[f"{Q}.{changed}"] = (stored.astype(np.float32) * 0.5).astype(stored.dtype)
    other = open_float(write_foreign(Path("other"), model)).fingerprint
    assert first == again != other


# ---- dequantize as a command ----


def test_the_same_again_force_and_shards():
    write_foreign(Path("m"), FOREIGN["hf_block"]())
    command = ("dequantize", "m", "-o", "out", "--max-shard-size", "8KB")
    assert ptq(*command).code == 0
    names = sorted(os.listdir("out"))
    assert "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    found: dict[str, object] = {}
    for name in names:
        if name.endswith(".safetensors"):
            found |= read_model(Path("out", name))
    assert ptq("dequantize", "m", "-o", "whole").code == 0
    assert found == read_model(Path("whole/model.safetensors"))
    before = tree(Path("out"))
    again = ptq(*command)
    assert (again.code, tree(Path("out"))) == (0, before)
    assert "finished already" in again.err
    refused("dequantize", "m", "-o", "out", *FLOAT32, words=("out: exists already",))
    assert ptq("dequantize", "m", "-o", "out", *FLOAT32, "--force").code == 0
    refused("dequantize", "m", "-o", "m", "--force", words=("m: holds", "is being read"))


def test_what_it_would_take_and_what_it_says():
    write_foreign(Path("m"), FOREIGN["gpt_oss"]())
    dry = ptq("dequantize", "m", "--dry-run", "--json")
    assert (dry.code, Path("m-float").exists()) == (0, False)
    assert len(dry.document["units"]) == 2
    outcome = ptq("dequantize", "m", "--json")
    assert outcome.document["quantized_as"] == "MXFP4"
    assert (outcome.document["decoded"], outcome.document["output"]) == (2, "m-float")
    assert ptq_cli.dequantize("m", "other")["decoded"] == 2


@pytest.mark.slow
def test_a_killed_run_goes_on():
    llama(Path("float"))
    assert ptq("rtn", "float", "--format", "gptq", "--group-size", 64, "-o", "m").code == 0
    assert ptq("dequantize", "m", "-o", "whole").code == 0
    command = ("dequantize", "m", "-o", "out")
    killed(STAGED, 6, *command)
    assert os.listdir("out.partial/units") != []
    outcome = ptq(*command)
    assert outcome.code == 0
    assert sum("kept from the interrupted run" in line for line in outcome.progress) == 5
    assert tree(Path("out")) == tree(Path("whole"))
    assert not Path("out.partial").exists()


def test_reading_stays_within_a_layer():
    """Twelve layers of a quarter of a million weights: the peak is that of one or two."""
    shape, layers = (512, 512), 12
    stored = {}
    for number in range(layers):
        weight = random_weight(*shape, seed=number).astype(ml_dtypes.float8_e4m3fn)
        stored[f"layers.{number}.q_proj.weight"] = weight
        stored[f"layers.{number}.q_proj.weight_scale"] = np.ones((512, 1), np.float32)
    Path("m").mkdir()
    write_model(Path("m/model.safetensors"), stored)
    declared = {"quant_method": "fbgemm_fp8"}
    document = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": declared}
    Path("m/config.json").write_text(json.dumps(document))
    assert ptq("dequantize", "m", "-o", "warm").code == 0  # imports
    tracemalloc.start()
    assert ptq("dequantize", "m", "-o", "out").code == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 11 * shape[0] * shape[1]  # 2 bytes written, 4 decoded, 1 stored, and masks
    assert peak < 2 * layers * shape[0] * shape[1] / 2


# ---- inspect ----


def test_inspect_shows_it():
    write_foreign(Path("m"), FOREIGN["gpt_oss"]())
    document = ptq("inspect", "m", "--json").document
    assert (document["kind"], document["quantized_as"]) == ("float", "MXFP4")
    shown = ptq("inspect", "m")
    assert "quantized before (MXFP4)" in shown.out
