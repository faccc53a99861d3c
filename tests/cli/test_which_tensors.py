"""Which tensors are rounded, and how each: recipes, rules, what is included and left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import ptq, read_model

# ---- recipes ----


def recipe(text):
    path = Path("recipe.toml")
    path.write_text(text)
    return path


def test_a_recipe_sets_what_the_command_line_does_not(job):
    path = recipe('method = "gptq"\nbits = 3\ngroup_size = 16\nsym = false\nignore = ["down"]\n')
    arguments = ["gptq", job, "--activations", "acts", "--json", "--config", path]
    document = ptq(*arguments, "--bits", 5).document
    assert (document["settings"]["bits"], document["settings"]["group_size"]) == (5, 16)
    assert document["settings"]["sym"] is False
    assert "layers.0.down_proj" not in {row["module"] for row in document["layers"]}
    assert Path("model-gptq-w5g16-asym").is_dir()


def test_layer_rules_change_single_layers(job, check_report):
    path = recipe(
        'bits = 4\n[[layers]]\nmatch = "o_proj"\nbits = 8\ngroup_size = -1\n'
        '[[layers]]\nmatch = "down_proj"\nskip = true\n'
        '[[layers]]\nmatch = "k_proj"\nsym = false\n'
    )
    outcome = ptq("gptq", job, "--activations", "acts", "--json", "--config", path, "-o", "out")
    rows = {row["module"]: row for row in check_report(outcome.document)["layers"]}
    assert set(rows) == {"layers.0.q_proj", "layers.0.k_proj", "layers.0.o_proj"}
    assert (rows["layers.0.o_proj"]["bits"], rows["layers.0.o_proj"]["group_size"]) == (8, -1)
    assert [rows[f"layers.0.{n}_proj"]["sym"] for n in "qk"] == [True, False]
    before, after = (read_model(p) for p in (job, Path("out/model.safetensors")))
    assert after["layers.0.down_proj.weight"] == before["layers.0.down_proj.weight"]


@pytest.mark.parametrize("rule", ["[[layers]]\nmatch = '.'\nbits = 3\n", "bits = 3\n"])
def test_all_linears_of_a_site_take_the_rule(job, rule):
    document = ptq("rtn", job, "--json", "--config", recipe(rule)).document
    assert {row["bits"] for row in document["layers"]} == {3}


# ---- which tensors ----


def test_include_takes_in_embeddings_and_the_output_head(job, check_report):
    include = ["--include", "embed_tokens", "--include", "lm_head"]
    outcome = ptq("gptq", job, "--activations", "acts", "--json", *include, "-o", "out")
    rows = {row["module"]: row for row in check_report(outcome.document)["layers"]}
    # an embedding has no inputs: its search weighs all columns alike
    for module, fallback in {"embed_tokens": None, "lm_head": "no statistics for it"}.items():
        assert rows[module]["method"] == "rtn"
        assert rows[module]["fallback"] == fallback
        assert ptq_cli.load_weight("out", module).shape == (50, 32)
    assert any("lm_head" in warning for warning in outcome.warnings)


def test_ignore_leaves_tensors_as_they_are(job):
    document = ptq("pack", job, "--json", "--ignore", "q_proj.weight|k_proj", "-o", "out").document
    reasons = {entry["tensor"]: entry["reason"] for entry in document["left_alone"]}
    assert reasons == {
        "embed_tokens.weight": "embedding",
        "layers.0.q_proj.weight": "ignored",
        "layers.0.k_proj.weight": "ignored",
        "layers.0.q_proj.bias": "rank 1",
        "layers.0.input_layernorm.weight": "rank 1",
        "positions": "dtype I64",
        "lm_head.weight": "output head",
    }


# ---- act-order ----


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_desc_writes_g_idx_and_what_it_decodes_to_is_what_was_measured(job, bits):
    options = ["--act-order", "desc", "-g", 8, "--bits", bits, "--activations", "acts"]
    document = ptq("gptq", job, *options, "--json", "-o", "out").document
    tensors = read_model(Path("out/model.safetensors"))
    weights = read_model(job)
    for row in document["layers"]:
        dtype, shape, data = tensors[f"{row['module']}.g_idx"]
        assert (dtype, shape) == ("I32", [row["shape"][1]])
        groups = np.frombuffer(data, np.int32)
        assert sorted(groups) == [i // 8 for i in range(len(groups))]
        assert not np.array_equal(groups, np.sort(groups))
        bf16 = np.frombuffer(weights[row["layer"]][2], np.uint16).astype(np.uint32) << 16
        weight = bf16.view(np.float32).reshape(row["shape"])
        error = np.abs(weight - ptq_cli.load_weight("out", row["module"])).max()
        assert error == pytest.approx(row["max_abs_err"], rel=1e-6)


# ---- a model in shards ----


def test_shards_with_an_index_give_the_weights_of_one_file(job):
    from tests.builders import small_tensors, write_model

    tensors = small_tensors()
    Path("sharded").mkdir()
    weight_map = {}
    for shard, names in enumerate((list(tensors)[:4], list(tensors)[4:])):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        write_model(Path("sharded", file), {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = Path("sharded/model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    Path("sharded/config.json").write_text('{"model_type": "llama"}')
    whole = ptq("gptq", job, "--activations", "acts", "-o", "whole")
    assert whole.code == 0
    for name, model in (("a", "sharded"), ("b", index)):
        assert ptq("gptq", model, "--activations", "acts", "-o", name).code == 0
        assert Path(name, "config.json").read_text() == '{"model_type": "llama"}'
        assert read_model(Path(name, "model.safetensors")) == read_model(
            Path("whole/model.safetensors")
        )
    assert ptq("eval", "sharded", "whole", "--activations", "acts").code == 0
