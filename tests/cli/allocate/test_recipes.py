"""A budget instead of a width: the recipe of `ptq allocate`, and the same options on gptq, rtn and
awq; what is alike, and what is pinned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.calibration.test_imatrix import write_imatrix
from tests.cli.allocate.words import (
    BLOCKS,
    BUDGET,
    CHOICES,
    QUICK,
    TOKENS,
    WIDTHS,
    bits,
    done,
    is_alike,
    recipe_of,
    refuse,
    table,
    types,
    weights_size,
)
from tests.cli.tiny_folders import mixtral
from tests.run.test_in_sequence import moe_folder
from tests.run.tiny_families import tiny_model
from tests.run.tiny_llama import tiny_llama

# ---- a recipe ----


def test_a_recipe_gives_each_layer_what_was_decided(llama, gptq):
    recipe, told = recipe_of(gptq / "r.toml"), (gptq / "printed").read_text()
    assert recipe["method"] == "gptq"
    assert recipe["group_size"] == 16
    decided = {rule["match"]: rule["bits"] for rule in recipe["layers"]}
    done("gptq", llama, *TOKENS(llama), "--config", gptq / "r.toml", "-o", "out")
    found = bits()
    for name, width in found.items():
        (own,) = {b for match, b in decided.items() if re.search(match, f"{name}.weight")}
        assert own == width
    assert len(set(found.values())) > 1
    assert is_alike(found)
    report = json.loads(Path("out/report.json").read_text())
    assert report["settings"]["allocation"] == recipe["allocation"]
    said = recipe["allocation"]
    assert report["totals"]["bits_per_weight"] == pytest.approx(said["bits_per_weight"], abs=1e-3)
    assert said["bits_per_weight"] <= 4.6
    assert said["bytes"] == weights_size(Path("out"))
    assert f"{said['predicted_kl']:.3g}" in told
    assert "ptq gptq" in told


def test_the_command_itself_takes_the_budget_and_comes_to_the_same(model, quick):
    done("rtn", model, *TOKENS(model), "--config", quick / "r.toml", "-o", "a")
    own = ("rtn", model, *TOKENS(model), *BUDGET, *WIDTHS, "-o", "b")
    done(*own)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert table() == table(quick / "t.json")
    again = done(*own)
    assert "finished already" in again.err


def test_outputs_are_called_by_their_bits(measured):
    done("allocate", measured, *TOKENS(measured), *BUDGET, *QUICK)
    assert Path("m-rtn-4.6bpw.toml").exists()
    done("rtn", measured, *TOKENS(measured), *BUDGET, *WIDTHS)
    (made,) = Path().glob("m-rtn-4.*bpw")
    assert made.is_dir()


def test_json_is_all_that_stands_on_stdout(llama, gptq):
    kept = ("--table", shutil.copy(gptq / "t.json", "t.json"), "-o", "r.toml")
    outcome = done("allocate", llama, *TOKENS(llama), *BUDGET, *WIDTHS, *kept, "--json")
    document = outcome.document
    assert document["output"] == "r.toml"
    assert set(document["groups"].values()) <= set(document["uniform"])
    costs = [own["cost"] for own in document["uniform"].values()]
    assert costs == sorted(costs, reverse=True)
    assert document["predicted_kl"] < document["uniform"]["W2A16"]["cost"]
    curve = np.array(document["curve"])
    assert (np.diff(curve[:, 0]) > 0).all()
    assert (np.diff(curve[:, 1]) < 0).all()


def test_rtn_has_a_recipe(llama, quick):
    assert recipe_of(quick / "r.toml")["method"] == "rtn"
    done("rtn", llama, "--config", quick / "r.toml", "-o", "out")
    assert len(set(bits().values())) > 1
    assert recipe_of(quick / "r.toml")["allocation"]["bytes"] == weights_size(Path("out"))


@pytest.mark.slow(2)
def test_awq_has_a_recipe(model):
    done("allocate", model, *TOKENS(model), *BUDGET, *WIDTHS, "--method", "awq", "-o", "r.toml")
    assert recipe_of()["method"] == "awq"
    done("awq", model, *TOKENS(model), "--config", "r.toml", "-o", "out")
    assert len(set(bits().values())) > 1
    assert recipe_of()["allocation"]["bytes"] == weights_size(Path("out"))


def test_fast_measures_by_rounding_to_nearest(model, quick):
    fast = ("--fast", "--drift", "0")  # nothing is made up for, as by rtn
    done("allocate", model, *TOKENS(model), *BUDGET, *WIDTHS, *fast, "-o", "r.toml")
    assert table() == table(quick / "t.json")
    assert recipe_of()["method"] == "gptq"


def test_without_a_model_that_runs_relative_errors_decide(model):
    outcome = done("allocate", model, *BUDGET, *QUICK, "-o", "r.toml")
    assert "the model was not run" in outcome.out
    assert recipe_of()["allocation"]["predicted_rel_err"] > 0
    assert len({rule["bits"] for rule in recipe_of()["layers"]}) > 1


def test_an_importance_matrix_weighs_the_errors(model):
    names = {"attn_q": 32, "attn_k": 32, "attn_v": 32, "attn_output": 32, "ffn_gate": 32,
             "ffn_up": 32, "ffn_down": 64}  # fmt: skip
    energies = np.random.default_rng(2).exponential(size=(1, 64)) ** 4
    entries = {
        f"blk.{block}.{name}.weight": (energies[:, :width], np.array([100]))
        for block in range(2)
        for name, width in names.items()
    }
    write_imatrix("i.gguf", entries)
    run = ("allocate", model, *BUDGET, *QUICK, "-o", "r.toml", "--force", "--table")
    done(*run, "without.json")
    outcome = done(*run, "with.json", "--imatrix", "i.gguf")
    assert "ptq rtn m --config r.toml --imatrix i.gguf" in outcome.out.replace(f"{model}", "m")
    with_it, without = (table(f"{word}.json")["errors"] for word in ("with", "without"))
    assert with_it.keys() == without.keys()
    assert all(with_it[name] != without[name] for name in without)
    done("rtn", model, "--config", "r.toml", "--imatrix", "i.gguf", "-o", "out")
    said = recipe_of()["allocation"]["predicted_rel_err"]
    rows = json.loads(Path("out/report.json").read_text())["layers"]
    assert sum(row["rel_err"] for row in rows) == pytest.approx(said, rel=1e-3)


def test_a_model_that_is_quantized_is_measured_against_what_it_decodes_to(model):
    done("rtn", model, "-g", 16, "-o", "q", "--bits", 8)
    outcome = done("allocate", "q", *BUDGET, *QUICK, "-o", "r.toml")
    assert "was quantized before" in outcome.err


# ---- what is alike ----


def test_experts_of_a_block_are_alike(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen2_moe", num_experts=3)
    done("rtn", model, *TOKENS(model), "--nsamples", 8, "--target-bpw", 4.3, "-g", 16,
         "--choices", "W2A16,W4A16", "--trial-tokens", 12, "-o", "out")  # fmt: skip
    found = bits()
    assert len(set(found.values())) > 1
    for block in BLOCKS:
        assert len({x for name, x in found.items() if f"{block}mlp.experts." in name}) == 1
        shared = {x for name, x in found.items() if f"{block}mlp.shared_expert." in name}
        assert len(shared) <= 2


def test_an_expert_that_no_token_reaches_takes_what_the_others_take(tmp_path):
    model = moe_folder(tmp_path / "m")
    run = (*BUDGET, "-g", 16, "--choices", "W2A16,W8A16", "-o", "out")
    done("rtn", model, *TOKENS(model), *run)
    found = bits()
    for block in BLOCKS:
        assert len({x for name, x in found.items() if f"{block}block_sparse_moe" in name}) == 1
    assert len(set(found.values())) > 1
    rows = json.loads(Path("out/report.json").read_text())["layers"]
    assert any(row.get("own_tokens") == 0 for row in rows)


def test_a_tensor_of_gguf_has_one_type(tmp_path):
    model = mixtral(tmp_path / "m")
    np.save("t.npy", np.random.default_rng(0).integers(0, 96, (4, 12)))
    done("rtn", model, "--tokens", "t.npy", "--target-bpw", 5.6, "-o", "out", "--choices",
         "Q4_0,Q8_0", "--format", "gguf", "--trial-tokens", 12)  # fmt: skip
    found = types()
    assert len(set(found.values())) > 1
    assert {"blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"} <= found.keys()
    report = json.loads(Path("out/report.json").read_text())
    assert len({row["bits"] for row in report["layers"]}) > 1


def test_choices_that_a_layer_cannot_have(tmp_path):
    model = tiny_llama(tmp_path / "m", 48)
    budget = ("--target-bpw", 5.2, "-g", 32, "--format", "gptq", "--choices", "W2A16,W3A16,W8A16")
    run = ("allocate", model, "--method", "rtn", *budget, "-o", "r.toml")
    words = ("group_size 32 does not divide in_features 48", "down_proj", "--on-misfit keep")
    refuse(*run, words=words)
    refuse("rtn", model, *budget, "-o", "out", words=words)
    done(*run, "--on-misfit", "keep")
    done("rtn", model, "--config", "r.toml", "-o", "a")
    done("rtn", model, *budget, "--on-misfit", "keep", "-o", "out")
    assert Path("a/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    found = bits()
    assert not any("down_proj" in name for name in found)
    assert is_alike(found)
    for block in BLOCKS:  # gptq holds no 3 bits in 16 rows
        assert found[f"{block}self_attn.k_proj"] != 3


# ---- what is pinned ----


def test_what_is_kept_is_kept(model):
    keep = ("--keep", "down_proj=W6A16", "--keep", "0.self_attn.[qkv]_proj=W2A16")
    done("allocate", model, *BUDGET, *QUICK, *keep, "-o", "r.toml")
    done("rtn", model, "--config", "r.toml", "-o", "out")
    for name, width in bits().items():
        if "down_proj" in name:
            assert width == 6
        if "0.self_attn" in name and "o_proj" not in name:
            assert width == 2


def test_pins_of_a_recipe_stay(model):
    Path("own.toml").write_text("group_size = 16\n[[layers]]\nmatch = '0.*o_proj'\nbits = 8\n")
    own = ("--config", "own.toml", *BUDGET, *QUICK[2:])
    done("allocate", model, *own, "-o", "r.toml")
    assert recipe_of()["layers"][-1] == {"match": "0.*o_proj", "bits": 8}
    done("rtn", model, "--config", "r.toml", "-o", "out")
    assert bits()["model.layers.0.self_attn.o_proj"] == 8


def test_ignore_and_include(model):
    more = ("--ignore", "layers.0.mlp", "--include", "lm_head", "--include", "embed_tokens")
    run = ("rtn", model, *BUDGET, *WIDTHS, *more, "-o")
    done(*run, "out")
    found = bits()
    assert {"lm_head", "model.embed_tokens"} <= found.keys()
    assert not any("layers.0.mlp" in name for name in found)
    done(*run, "kept", "--keep", "lm_head=W8A16")
    assert bits("kept")["lm_head"] == 8


def test_pins_of_gguf(model):
    keep = ("--keep", "token_embd=Q8_0", "--keep", "^output=Q5_0", "--keep", "down=Q4_0")
    run = ("--target-bpw", 6.2, *CHOICES["gguf"], "-o", "x.gguf", "--format", "gguf")
    done("rtn", model, *run, *keep)
    found = types("x.gguf")
    assert found["token_embd.weight"] == "Q8_0"
    assert found["output.weight"] == "Q5_0"
    assert {kind for name, kind in found.items() if "ffn_down" in name} == {"Q4_0"}
