"""Folders of shards whose index, config.json or files do not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import ptq, read_model, small_model, small_tensors, write_model
from tests.refusals import DOWN, Q, refused

pytestmark = pytest.mark.usefixtures("here")


def shards(weight_map=None, first=(Q,), second=(DOWN,), index=None):
    tensors = small_tensors()
    Path("m").mkdir()
    for number, names in enumerate((first, second)):
        part = {f"{name}.weight": tensors[f"{name}.weight"] for name in names}
        write_model(Path(f"m/{'ab'[number]}.safetensors"), part)
    if weight_map is None:
        weight_map = {f"{Q}.weight": "a.safetensors", f"{DOWN}.weight": "b.safetensors"}
    content = json.dumps({"weight_map": weight_map}) if index is None else index
    Path("m/model.safetensors.index.json").write_text(content)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "C:\\a.safetensors", ".", "a.bin", "", 5]
)  # fmt: skip
def test_shards_are_plain_names(shard):
    shards({f"{Q}.weight": shard})
    refused("pack", "m", words=(INDEX, f"{Q}.weight", "plain name"))


def test_a_missing_shard(job):
    shards()
    Path("m/b.safetensors").unlink()
    refused("pack", "m", words=(INDEX, "b.safetensors", "1 of 2"))


def test_a_shard_without_its_tensor():
    shards({f"{Q}.weight": "a.safetensors", f"{DOWN}.weight": "a.safetensors"})
    refused("pack", "m", words=(INDEX, f"{DOWN}.weight"))


@pytest.mark.parametrize("home", ["a.safetensors", "b.safetensors"])
def test_a_tensor_in_two_shards(home):
    weight_map = {f"{Q}.weight": home, f"{DOWN}.weight": "b.safetensors"}
    weight_map |= {"layers.0.o_proj.weight": "a.safetensors"}
    shards(weight_map, first=(Q, "layers.0.o_proj"), second=(DOWN, Q))
    refused("pack", "m", words=(INDEX, f"{Q}.weight", "a.safetensors", "b.safetensors"))


def test_a_tensor_that_the_index_does_not_know_is_a_warning():
    shards(first=(Q, "layers.0.o_proj"))
    outcome = ptq("pack", "m", "-o", "out")
    assert outcome.code == 0
    assert any("layers.0.o_proj.weight" in line for line in outcome.warnings)
    assert "layers.0.o_proj.weight" not in read_model(Path("out/model.safetensors"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000,
     '{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}'],
    ids=["empty", "list", "nothing", "map a list", "map empty", "nested", "twice"],
)  # fmt: skip
def test_an_index_that_is_none(content):
    shards(index=content)
    refused("pack", "m", words=(INDEX,))


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_config_that_is_none(content, job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text(content)
    refused("pack", "m", words=("config.json",))


def test_folders_without_weights_or_with_too_many():
    Path("m").mkdir()
    refused("pack", "m", words=("m", "no .safetensors file"))
    for name in "ab":
        small_model(Path(f"m/{name}.safetensors"))
    refused("pack", "m", words=("a.safetensors, b.safetensors",))
