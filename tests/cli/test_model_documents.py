"""config.json and its like, as the ecosystem writes them: with `Infinity` and `NaN`, keys in
whatever order, words where they should not be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import ptq_cli
from tests.builders import SAMPLE, ptq, small_model
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("here")

ODD = '{"time_step_limit": [0.0, Infinity], "low": -Infinity, "none": NaN, "huge": 1e999, '
TAGGED = {"__float__": "Infinity"}
TOKENS = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 2, "--seq-len", 16)


@pytest.fixture
def model(here, one_block):
    """The sample, with infinities in its config.json and keys in an order of their own."""
    folder = Path("m")
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(one_block / name, folder / name)
    own = json.loads((one_block / "config.json").read_text())
    text = json.dumps({"tagged": TAGGED, **dict(reversed(own.items()))})
    (folder / "config.json").write_text(ODD + text[1:])
    (folder / "generation_config.json").write_text('{"b": Infinity, "a": NaN}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')
    return folder


def same(value, other):
    """Equal, NaN included, and with the same keys in the same order."""
    return json.dumps(value) == json.dumps(other)


@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors", "mlx"])
def test_infinities_come_back_as_they_were(model, fmt):
    before = json.loads((model / "config.json").read_text())
    again = ["rtn", model, "--format", fmt, "-o", "out"]
    assert ptq(*again, "--sym").code == 0
    text = Path("out/config.json").read_text()
    after = json.loads(text)
    assert same({key: after[key] for key in after if key in before}, before)
    assert "Infinity" in text
    assert math.isnan(after["none"])
    generation = "generation_config.json"
    assert (Path("out") / generation).read_bytes() == (model / generation).read_bytes()
    outcome = ptq(*again, "--sym")
    assert (outcome.code, "finished already" in outcome.err) == (0, True)
    assert json.loads(Path("out/ptq_job.json").read_text(), parse_constant=pytest.fail)
    assert ptq("pack", "out", "--format", "gptq", "-o", "packed").code == 0
    assert json.loads(Path("packed/config.json").read_text())["time_step_limit"] == [0.0, math.inf]


def test_every_command_reads_them(model):
    assert ptq("inspect", model).code == 0
    assert ptq("gptq", model, *TOKENS, "--sweeps", 0, "-o", "out").code == 0
    assert ptq("calibrate", model, *TOKENS, "-o", "stats.safetensors").code == 0
    statistics = ("--calibration", "stats.safetensors")
    for command in ("awq", "smoothquant", "gptq"):
        assert ptq(command, model, *statistics, "-o", "new", "--dry-run", "--json").code == 0
    assert ptq("eval", model, "out", *TOKENS).code == 0
    assert ptq("check", "out", "--runtime", "transformers").out


def test_a_gguf_file_from_them(model):
    pytest.importorskip("gguf")
    assert ptq("rtn", model, "--format", "gguf", "-o", "out").code == 0


def test_the_order_of_keys(here):
    """Sorted ones stay sorted, as transformers writes them; others keep their order."""
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    options = ["--format", "compressed-tensors", "-g", 4, "-o", "out", "--force"]
    for config in ({"a": 1, "z": 2}, {"z": 2, "a": 1}, {"a": {"z": 2, "b": 1}, "x": 2}):
        Path("m/config.json").write_text(json.dumps(config))
        assert ptq("rtn", "m", *options).code == 0
        after = json.loads(Path("out/config.json").read_text())
        assert same({key: after[key] for key in after if key in config}, config)


def test_our_own_files_and_headers_stay_strict(here):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    assert ptq("rtn", "m", "-o", "out").code == 0
    index = '{"weight_map": {"a": "model.safetensors"}, "x": NaN}'
    Path("m/model.safetensors.index.json").write_text(index)
    refused("rtn", "m", words=("index.json", "NaN is not JSON"))
    path = Path("out/quantization.json")
    path.write_text(path.read_text().replace("{", '{"x": Infinity,', 1))
    refused("inspect", "out", words=("quantization.json", "Infinity"))


@pytest.mark.parametrize(
    "text", ['{"a": NaN, "a": Infinity}', "[" * 100_000, f'{{"a": {"9" * 5000}}}', '["Infinity"]']
)
def test_what_nobody_reads(text, job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text(text)
    refused("rtn", "m", words=("config.json",))


@pytest.mark.parametrize("kind", ["{}", "[]", "5", "null", "true", '["llama"]', '"unheard of"'])
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_type_that_is_no_word(kind, nested, model, one_block):
    own = json.loads((one_block / "config.json").read_text())
    own["model_type"] = json.loads(kind)
    (model / "config.json").write_text(json.dumps({"text_config": own} if nested else own))
    assert ptq("inspect", model).code == 0
    assert (
        ptq("rtn", model, "--format", "compressed-tensors", "--runtime", "vllm", "-o", "out").code
        == 0
    )
    for line in (["rtn", "--format", "gguf"], ["gptq", *TOKENS], ["awq", *TOKENS]):
        outcome = ptq(line[0], model, *line[1:], "--dry-run")
        assert outcome.code in (0, 1)
        assert "internal error" not in outcome.err


@pytest.mark.parametrize(
    "change",
    [{"head_dim": math.inf}, {"hidden_act": {}}, {"rope_parameters": "x"}, {"rms_norm_eps": []}],
)
def test_settings_that_are_no_numbers(change, model, one_block):
    own = json.loads((one_block / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(own | change))
    refused("gptq", model, *TOKENS, "-o", "out", words=("config.json",))
    outcome = ptq("rtn", model, "--format", "gguf", "-o", "out", "--dry-run")
    assert "internal error" not in outcome.err


def test_the_public_functions_take_it(model):
    assert ptq_cli.inspect(model)["family"] == "llama"
    assert ptq_cli.rtn(model, output="out").rows
