"""`--scheme Q4_K_M` and its like: which type each tensor gets, what changes it, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.storage.gguf_file import read_gguf_header
from tests.builders import ptq, random_inputs, random_weight
from tests.cli.tiny_folders import WIDTH, dense_block, ends, llama, model_folder
from tests.storage.gguf_files import EXPERTS, write_unknown_gguf

DRY = ("--dry-run", "--json")


def wide_llama(path: Path, inner: int = 512, *, blocks: int = 2, head: bool = True) -> Path:
    """With rows of 256 columns, which K-quants hold, and of `inner`."""
    sizes = {"hidden_size": 256, "intermediate_size": inner, "num_hidden_layers": blocks}
    tensors = {"model.embed_tokens.weight": random_weight(8, 256, seed=1)}
    tensors["model.norm.weight"] = random_weight(256)
    if head:
        tensors["lm_head.weight"] = random_weight(8, 256, seed=2)
    for block in range(blocks):
        shapes = {f"self_attn.{name}_proj": (8, 256) for name in "qkv"}
        shapes |= {"self_attn.o_proj": (256, 256), "mlp.down_proj": (256, inner)}
        shapes |= {"mlp.gate_proj": (inner, 256), "mlp.up_proj": (inner, 256)}
        shapes |= {"input_layernorm": (256,), "post_attention_layernorm": (256,)}
        for name, shape in shapes.items():
            tensors[f"model.layers.{block}.{name}.weight"] = random_weight(*shape)
    return model_folder(path, "llama", tensors, **sizes, vocab_size=8, tie_word_embeddings=not head)


def types(model: Path, *options: object, command: str = "rtn") -> dict[str, str]:
    """Of the modules that a dry run would quantize."""
    outcome = ptq(command, model, *options, *DRY)
    assert outcome.code == 0, outcome.err
    return {row["module"]: row["type"] for row in outcome.document["layers"]}


def refusal(*arguments: object) -> str:
    outcome = ptq(*arguments, "-o", "out")
    assert (outcome.code, Path("out").exists()) == (1, False), outcome.err
    (error,) = outcome.errors
    return error


# ---- which types ----


def test_each_tensor_gets_the_type_of_the_mix(tmp_path):
    found = types(wide_llama(tmp_path / "m", blocks=3), "--scheme", "Q4_K_M")
    six = {"lm_head", *(f"model.layers.2.{name}" for name in ("self_attn.v_proj", "mlp.down_proj"))}
    assert {name for name, kind in found.items() if kind == "Q6_K"} == six
    assert set(found.values()) == {"Q4_K", "Q6_K"}
    assert len(found) == 3 * 7 + 2
    assert found["model.embed_tokens"] == "Q4_K"


def test_a_tied_embedding_is_the_head(tmp_path):
    model = wide_llama(tmp_path / "m", head=False)
    assert types(model, "--scheme", "Q3_K_M")["model.embed_tokens"] == "Q6_K"
    given = ("--scheme", "Q3_K_M", "--output-tensor-type", "Q8_0")
    assert types(model, *given)["model.embed_tokens"] == "Q8_0"
    given = ("--scheme", "Q3_K_M", "--token-embedding-type", "Q5_K")
    assert types(model, *given)["model.embed_tokens"] == "Q5_K"
    error = refusal("rtn", model, *given, "--output-tensor-type", "Q8_0")
    assert "--output-tensor-type Q8_0:" in error
    assert "has no such tensor" in error


def test_rows_that_no_block_divides_fall_back(tmp_path):
    found = types(wide_llama(tmp_path / "m", inner=288), "--scheme", "Q4_K_S")
    assert found["model.layers.0.mlp.down_proj"] == "Q5_0"
    assert found["model.layers.0.mlp.up_proj"] == "Q4_K"


def test_a_pure_mix_has_one_type(tmp_path):
    found = types(wide_llama(tmp_path / "m"), "--scheme", "Q5_K_M", "--pure")
    assert set(found.values()) == {"Q5_K"}


@pytest.mark.parametrize(("short", "whole"), [("Q4_K", "Q4_K_M"), ("Q3_K", "Q3_K_M")])
def test_a_short_name_is_the_middle_mix(tmp_path, short, whole):
    model = wide_llama(tmp_path / "m")
    assert types(model, "--scheme", short) == types(model, "--scheme", whole)
    assert f"m-rtn-{whole}" in ptq("rtn", model, "--scheme", short, "--dry-run").out


def test_knowing_which_inputs_matter_changes_a_mix(tmp_path):
    model = wide_llama(tmp_path / "m", blocks=8)
    plain = types(model, "--scheme", "IQ4_XS")
    acts = tmp_path / "acts"
    acts.mkdir()
    np.save(acts / "model.layers.0.self_attn.q_proj.npy", random_inputs(8, 256))
    known = types(model, "--scheme", "IQ4_XS", "--activations", acts)
    down = "model.layers.0.mlp.down_proj"
    assert (plain[down], known[down]) == ("Q5_K", "IQ4_XS")


# ---- files of any architecture, experts ----


@pytest.fixture
def unknown(here) -> Path:
    """Of an architecture that nobody knows, with experts."""
    pytest.importorskip("gguf")
    write_unknown_gguf(Path("model.gguf"))
    return Path("model.gguf")


def test_experts_have_one_type(unknown):
    found = types(unknown, "--scheme", "MXFP4_MOE")
    experts = {f"blk.0.ffn_{way}_exps.{n}" for way in ("up", "down") for n in range(EXPERTS)}
    assert {name for name, kind in found.items() if kind == "MXFP4"} == experts
    others = {"blk.0.attn_qkv", "token_embd", "output"}
    assert {name for name, kind in found.items() if kind == "Q8_0"} == others
    one = ("--scheme", "Q4_0", "--tensor-type", r"up_exps\.1\.=Q8_0")
    error = refusal("rtn", unknown, *one)
    assert "blk.0.ffn_up_exps.weight holds all experts of a block, and would be" in error
    found = types(unknown, "--scheme", "Q4_0", "--tensor-type", "up_exps=Q8_0")
    assert {found[f"blk.0.ffn_up_exps.{n}"] for n in range(EXPERTS)} == {"Q8_0"}


def test_a_mix_of_a_file_of_any_architecture_is_told_again(unknown):
    outcome = ptq(
        "rtn", unknown, "--scheme", "Q4_K_M", "--no-mse", "--token-embedding-type", "BF16",
        "-o", "out.gguf",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = ptq("inspect", "out.gguf", "--json").document["gguf"]
    assert found["stated"] == "Q4_K_M"
    assert found["differing"] == {
        "token_embd.weight": ["BF16", "Q5_0"], "blk.0.attn_k_b.weight": ["F32", "Q5_0"],
    }  # fmt: skip


# ---- types that are asked for ----


def test_the_last_of_several_types_counts(tmp_path):
    model = wide_llama(tmp_path / "m")
    found = types(
        model, "--scheme", "Q4_K_M", "--tensor-type", "ffn_=q5_k",
        "--tensor-type", r"layers\.1\.mlp\.down=Q6_K", "--tensor-type", r"blk\.0\.attn_q=IQ4_NL",
        "--output-tensor-type", "Q8_0", "--token-embedding-type", "q2_k",
    )  # fmt: skip
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.mlp.up_proj"] == "Q5_K"
    assert found["model.layers.1.mlp.down_proj"] == "Q6_K"
    assert found["model.layers.0.self_attn.q_proj"] == "IQ4_NL"
    assert found["model.layers.1.self_attn.q_proj"] == "Q4_K"
    assert (found["lm_head"], found["model.embed_tokens"]) == ("Q8_0", "Q2_K")


def test_a_recipe_says_types_and_options_go_before_it(tmp_path):
    model, recipe = wide_llama(tmp_path / "m"), tmp_path / "recipe.toml"
    recipe.write_text(
        'scheme = "Q4_K_M"\noutput_tensor_type = "Q5_K"\n'
        '[[layers]]\nmatch = "ffn_up"\ntype = "Q8_0"\n'
        '[[layers]]\nmatch = "mlp.gate_proj"\ntype = "BF16"\n'
        '[[layers]]\nmatch = "layers.1.mlp.up_proj"\ntype = "Q3_K"\n'
        '[[layers]]\nmatch = "attn_q"\nbits = 16\n'
    )
    found = types(model, "--config", recipe)
    assert found["model.layers.0.mlp.up_proj"] == "Q8_0"
    assert found["model.layers.1.mlp.up_proj"] == "Q3_K"
    assert found["lm_head"] == "Q5_K"
    assert not any("gate_proj" in name or "q_proj" in name for name in found)
    found = types(model, "--config", recipe, "--tensor-type", "ffn_up=Q6_K")
    assert {found[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1)} == {"Q6_K"}


def test_left_dense_in_a_type_and_called_by_its_mix(tmp_path):
    pytest.importorskip("gguf")
    model = llama(tmp_path / "m", seed=2)
    outcome = ptq(
        "pack", model, "--scheme", "Q4_0", "--tensor-type", "attn_k=F16", "--tensor-type",
        "attn_v=F32", "--output-tensor-type", "BF16", "--ignore", "ffn_up", "-o", "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    header = read_gguf_header(Path("out/model.gguf"))
    kinds = {tensor.spec.name: tensor.spec.dtype for tensor in header.tensors}
    assert kinds["blk.0.attn_k.weight"] == kinds["blk.1.ffn_up.weight"] == "F16"
    assert (kinds["blk.1.attn_v.weight"], kinds["output.weight"]) == ("F32", "BF16")
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q4_0", "F32")
    assert header.metadata["general.file_type"] == 2
    left = {entry["tensor"]: entry["reason"] for entry in outcome_json("out")["left_alone"]}
    assert left["lm_head.weight"] == "kept as BF16"
    assert left["model.layers.0.mlp.up_proj.weight"] == "ignored"


def outcome_json(folder: str) -> dict:
    return json.loads((Path(folder) / "report.json").read_text())


def test_the_report_names_types(tmp_path):
    pytest.importorskip("gguf")
    outcome = ptq("rtn", llama(tmp_path / "m"), "--scheme", "Q8_0", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "16 layers at 8.50 bits/weight (16 Q8_0)" in outcome.out
    document = outcome_json("out")
    assert {row["type"] for row in document["layers"]} == {"Q8_0"}
    assert "bits" not in document["settings"]
    assert document["settings"]["scheme"] == "Q8_0"


def test_a_scheme_is_known_in_small_letters(tmp_path):
    assert types(wide_llama(tmp_path / "m"), "--scheme", "q4_k_m") == types(
        tmp_path / "m", "--scheme", "Q4_K_M"
    )


# ---- what is refused ----

BESIDE = [
    (("--bits", 4), "--bits has no place beside Q4_K_M"),
    (("--group-size", 32), "--group-size has no place beside Q4_K_M"),
    (("--asym",), "--asym has no place beside Q4_K_M"),
    (("--scale-dtype", "float32"), "--scale-dtype has no place beside Q4_K_M"),
    (("--format", "gptq"), "Q4_K_M is a mix of GGUF's types, which format gptq does not hold"),
    (("--tensor-type", "ffn_down"), "not REGEX=TYPE"),
    (("--tensor-type", "ffn_down=Q4_7"), "no type 'Q4_7'; choose one of Q4_0, Q4_1"),
    (("--tensor-type", "ffn_sideways=Q4_K"), "--tensor-type ffn_sideways=Q4_K matches no tensor"),
    (("--tensor-type", "attn_norm=Q4_K"), "matches no tensor that a type could be given"),
    (("--tensor-type", "(=Q4_K"), "--tensor-type (=Q4_K: not a regular expression"),
    (("--output-tensor-type", "Q9"), "no type 'Q9'"),
]


@pytest.mark.parametrize(("options", "said"), BESIDE)
def test_what_has_no_place_beside_a_mix(tmp_path, options, said):
    assert said in refusal("rtn", wide_llama(tmp_path / "m"), "--scheme", "Q4_K_M", *options)


def test_a_mix_needs_the_names_in_gguf_whatever_the_format(tmp_path):
    options = ("--scheme", "Q4_K_M", "--format", "ptq")
    weights = wide_llama(tmp_path / "m") / "model.safetensors"
    Path(tmp_path / "alone.safetensors").write_bytes(weights.read_bytes())
    error = refusal("rtn", tmp_path / "alone.safetensors", *options)
    assert "alone.safetensors: gguf needs the model's config.json; name the model folder" in error
    error = refusal("rtn", llama(tmp_path / "b", "bloom"), *options)
    assert "model_type 'bloom' is not known" in error
    assert "--format ptq" not in error


@pytest.mark.parametrize(
    "option",
    [
        ("--tensor-type", "ffn_down=Q4_K"),
        ("--output-tensor-type", "Q4_K"),
        ("--token-embedding-type", "Q4_K"),
        ("--pure",),
    ],
)
def test_types_without_a_mix_do_nothing(tmp_path, option):
    error = refusal("rtn", llama(tmp_path / "m"), "--group-size", 32, "--format", "gguf", *option)
    assert f"{option[0]}" in error
    assert "it needs a mix of GGUF's types (--scheme Q4_K_M and its like)" in error


def test_a_type_that_the_width_does_not_allow_names_what_would_fit(tmp_path):
    model = wide_llama(tmp_path / "m", inner=288)
    options = ("--scheme", "Q4_0", "--tensor-type", "ffn_down=Q4_K")
    error = refusal("rtn", model, *options)
    assert "model.layers.{0-1}.mlp.down_proj" in error
    assert "Q4_K has blocks of 256 columns, which do not divide 288; Q5_0, as llama.cpp" in error
    found = types(model, *options, "--on-misfit", "keep")
    assert "model.layers.0.mlp.down_proj" not in found


def test_a_row_is_in_features_long_however_it_is_stored(tmp_path):
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256)}
    shapes["mlp.c_proj"] = (256, 64)
    tensors = {f"h.0.{name}.weight": random_weight(*shape) for name, shape in shapes.items()}
    tensors |= {f"h.0.{name}.bias": random_weight(shape[1]) for name, shape in shapes.items()}
    norms = [f"{name}.{part}" for name in ("h.0.ln_1", "h.0.ln_2", "ln_f") for part in
             ("weight", "bias")]  # fmt: skip
    tensors |= {name: random_weight(64) for name in norms}
    tensors |= {"wte.weight": random_weight(96, 64), "wpe.weight": random_weight(32, 64)}
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "n_ctx": 32}
    model = model_folder(tmp_path / "m", "gpt2", tensors, **sizes)
    found = types(model, "--scheme", "Q4_0", "--tensor-type", "ffn_down=Q3_K")
    assert found["h.0.mlp.c_proj"] == "Q3_K"
    assert "wpe" not in found
    options = ("--scheme", "Q4_0", "--tensor-type", "ffn_up=Q3_K")
    assert "do not divide 64; Q4_0, as llama.cpp" in refusal("rtn", model, *options)


def test_a_mix_that_has_nothing_to_fall_back_to_is_refused(tmp_path):
    tensors = {
        name: random_weight(*(48 if size == WIDTH else size for size in array.shape))
        for name, array in {**ends(head=None), **dense_block("model.layers.0.")}.items()
    }
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = model_folder(tmp_path / "m", "llama", tensors, **sizes)
    assert "multiples of 32, not 48" in refusal("rtn", model, "--scheme", "Q4_0")
    kept = types(model, "--scheme", "Q4_K_S", "--ignore", "embed_tokens")
    assert kept == {"model.layers.0.mlp.down_proj": "Q5_0"}  # the others are F16, as llama.cpp's


def test_a_scale_that_does_not_fit_asks_for_another_type(tmp_path):
    tensors = {**ends(), **dense_block("model.layers.0.")}
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"] / 64
    model = model_folder(tmp_path / "m", "llama", tensors, num_hidden_layers=1)
    options = ("--scheme", "Q8_0", "--tensor-type", "attn_q=NVFP4")
    error = refusal("rtn", model, *options)
    assert "does not fit E4M3 without a global scale" in error
    assert f"--tensor-type {name}=F32" in error
    options = (*options, "--tensor-type", f"{name}=F32")
    assert ptq("rtn", model, *options, "-o", "other").code == 0


def test_q2_k_s_needs_calibration(tmp_path):
    model = wide_llama(tmp_path / "m")
    error = refusal("rtn", model, "--scheme", "Q2_K_S")
    assert "Q2_K_S needs to know which inputs matter" in error
    assert "--scheme Q2_K" in error


RULES = [
    ("", 'match = "down"\ntype = "Q4_K"', "type goes with a mix of GGUF's types"),
    ("Q4_K_M", 'match = "down"\nbits = 8', "bits has no place beside Q4_K_M"),
    ("Q4_K_M", 'match = "down"\nscheme = "Q6_K"', "Q6_K is a mix of a whole file"),
    ("", 'match = "down"\nscheme = "Q6_K"', "Q6_K is a mix of a whole file"),
    ("Q4_K_M", 'match = "down"\ntype = "Q7"', "no type 'Q7'"),
    ("Q4_K_M", 'match = "down"\ntype = 7', "no type 7"),
]


@pytest.mark.parametrize(("scheme", "rule", "said"), RULES)
def test_rules_that_have_no_place(tmp_path, scheme, rule, said):
    recipe = tmp_path / "recipe.toml"
    first = f'scheme = "{scheme}"\n' if scheme else ""
    recipe.write_text(f"{first}[[layers]]\n{rule}\n")
    assert said in refusal("rtn", wide_llama(tmp_path / "m"), "--config", recipe)


def test_a_recipe_of_bits_goes_with_no_mix_but_that_of_an_option(tmp_path):
    model, recipe = wide_llama(tmp_path / "m"), tmp_path / "recipe.toml"
    recipe.write_text('scheme = "Q4_K_M"\nbits = 8\n')
    assert "--bits has no place beside Q4_K_M" in refusal("rtn", model, "--config", recipe)
    recipe.write_text("bits = 8\ngroup_size = 64\n")
    assert types(model, "--config", recipe, "--scheme", "Q6_K")["lm_head"] == "Q6_K"


def test_codes_that_are_there_get_no_mix(tmp_path):
    assert ptq("pack", llama(tmp_path / "m"), "-g", 32, "-o", "packed").code == 0
    error = refusal("pack", "packed", "--scheme", "Q4_K_M")
    assert "codes stay as they are: --scheme has no effect" in error


def test_a_smoother_rounds_to_a_mix(tmp_path):
    model = llama(tmp_path / "m")
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32) % 96
    np.save("tokens.npy", tokens)
    found = types(model, "--scheme", "Q4_0", "--tokens", "tokens.npy", command="awq")
    assert set(found.values()) == {"Q4_0", "Q8_0"}
    said = ("--scheme", "Q4_0", "--tokens", "tokens.npy", "--activation-scheme", "static")
    assert "says how inputs are rounded" in refusal("smoothquant", model, *said)
