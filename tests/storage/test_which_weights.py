"""Which weights of a folder are the model: shards without an index, shards alone, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_weight, small_model, small_tensors, write_model
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("here")

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
COMMANDS = ("gptq", "rtn", "pack", "awq", "calibrate")


def sharded(*names, index=False):
    """A model's tensors in turn in these shards."""
    Path("m").mkdir()
    tensors = small_tensors()
    own = {name: dict(list(tensors.items())[place::2]) for place, name in enumerate(names)}
    for name, part in own.items():
        write_model(Path("m", name), part)
    if index:
        weight_map = {tensor: name for name, part in own.items() for tensor in part}
        Path("m", INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_without_their_index():
    sharded(FIRST, SECOND)
    for command in COMMANDS:
        outcome = refused(command, "m", words=(INDEX, "missing", "hf download"))
        assert "shards" not in outcome.errors[0].partition("there is")[0]
        refused(command, f"m/{SECOND}", words=(INDEX, "missing"))
    assert ptq("inspect", f"m/{FIRST}").code == 0


@pytest.mark.parametrize("name", [FIRST, SECOND, "pytorch_model_2_of_3.safetensors"])
def test_one_shard_of_several_in_a_folder(name):
    sharded(name)
    lost = "2 of 3" if "3" in name else "1 of 2"
    for command in COMMANDS:
        refused(command, "m", words=(f"{lost} shards", "index.json is missing", name))
    outcome = ptq("rtn", f"m/{name}", "-o", "out")
    assert outcome.code == 0
    assert any(f"m/{name}: one of" in line for line in outcome.warnings)


def test_the_only_shard_is_the_model():
    sharded("model-00001-of-00001.safetensors")
    outcome = ptq("rtn", "m", "-o", "out")
    assert (outcome.code, outcome.warnings) == (0, [])


def test_a_shard_that_is_named_though_there_is_an_index():
    sharded(FIRST, SECOND, index=True)
    for command in COMMANDS:
        refused(command, f"m/{FIRST}", words=(FIRST, "one of 2 shards", INDEX))
    assert ptq("rtn", "m", "-o", "out", "--max-shard-size", "2KB").code == 0
    shard = next(Path("out").glob("*-00001-of-*.safetensors"))
    for words in (("pack", shard), ("eval", "m", shard), ("check", shard, "--runtime", "vllm")):
        refused(*words, words=(shard.name, "shards"))


def test_several_files_that_are_no_shards():
    Path("m").mkdir()
    for name in "ab":
        small_model(Path(f"m/{name}.safetensors"))
    refused("rtn", "m", words=("a.safetensors, b.safetensors", "holds the whole model"))


# ---- adapters ----


def lora(prefix="base_model.model."):
    return {
        f"{prefix}layers.0.q_proj.lora_{part}.weight": random_weight(*shape)
        for part, shape in {"A": (4, 32), "B": (12, 4)}.items()
    }


ADAPTER_CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base", "r": 4}


def adapter(folder, name="adapter_model.safetensors"):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    write_model(Path(folder, name), lora())


def test_an_adapter_is_no_model():
    adapter("m")
    for command in COMMANDS:
        for model in ("m", "m/adapter_model.safetensors"):
            refused(command, model, words=(model, "adapter (LoRA)", "merge_and_unload()"))
    assert "merge" in ptq("inspect", "m", "--json").document["quantizing"]["refused"]


def test_an_adapter_in_another_frameworks_file():
    Path("m").mkdir()
    Path("m/adapter_config.json").write_text("{}")
    Path("m/adapter_model.bin").write_bytes(b"weights")
    refused("rtn", "m", words=("adapter (LoRA)", "merge_and_unload()"))
    Path("m/adapter_config.json").unlink()
    refused("rtn", "m", words=("no .safetensors file", "save_pretrained()"))


@pytest.mark.parametrize(
    "name",
    [
        "a.q_proj.lora_A.weight", "a.q_proj.lora_B.default.weight", "a.lora_embedding_A",
        "lora_unet_down.lora_up.weight", "a.q_proj.lora_magnitude_vector", "a.k_proj.ia3_l",
        "a.q_proj.hada_w1_a", "a.q_proj.lokr_w2", "a.q_proj.base_layer.weight",
    ],
)  # fmt: skip
def test_tensors_of_an_adapter_that_is_not_merged(name, job):
    small_model(job, **{name: random_weight(4, 32)})
    for command in ("rtn", "pack"):
        refused(command, job, words=(name, "not merged", "merge_and_unload()"))


def test_an_adapter_beside_its_model_stays_behind():
    adapter("m")
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text('{"model_type": "own"}')
    for command in ("rtn", "pack"):
        outcome = ptq(command, "m", "-o", "out", "--force")
        assert outcome.code == 0
        assert [line for line in outcome.warnings if "adapter_config.json" in line]
        assert not list(Path("out").glob("adapter*"))
    refused("rtn", "m", "-o", "new", "--strict", words=("adapter_config.json",), code=1)
    Path("m/model.safetensors").rename("m/own.safetensors")
    assert ptq("rtn", "m", "-o", "again").code == 0


def test_names_that_only_look_like_an_adapters(job):
    small_model(job, **{"explorator.weight": np.ones((4, 32), np.float32)})
    assert ptq("rtn", job, "-o", "out").code == 0
