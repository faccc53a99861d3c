"""Which linears share an input and what feeds them: from config.json, from names, from a recipe."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.models.detect import find_sites
from ptq_cli.models.recipe import merge_sites, read_entry, recipe_sites
from ptq_cli.models.sites import Norm, Preceding, Rows, require_whole, rows_of
from tests.models.blocks import FAMILIES, HEAD_DIM, HIDDEN, MLP, config, tensors


def specs_of(family, kv_heads=4, n_blocks=2, drop=(), **more):
    model = tensors(family, np.random.default_rng(0), kv_heads, n_blocks)
    shapes = {name: array.shape for name, array in model.items()} | more
    return {
        n: TensorSpec(n, "BF16", s) for n, s in shapes.items() if not n.endswith(drop or ("?",))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_names_find_the_same_sites(family):
    specs = specs_of(family)
    known = find_sites(specs, config(family))
    named = find_sites(specs)
    assert known.notes == ()
    assert named.notes
    assert named.family == ("llama" if family == "mistral" else family)
    assert len(known.sites) == 8
    for a, b in zip(known.sites, named.sites, strict=True):
        assert a.linears == b.linears
        if b.feeder is not None:
            assert a.feeder == b.feeder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_in_one_site(family):
    specs = specs_of(family)
    found = [x.tensor for s in find_sites(specs, config(family)).sites for x in s.linears]
    matrices = [n for n, s in specs.items() if len(s.shape) == 2 and "embed" not in n]
    assert sorted(found) == sorted(matrices)


def test_llama_s_sites_in_words():
    sites = find_sites(specs_of("llama", kv_heads=2), config("llama", 2)).sites
    qkv, o, gate_up, down = sites[4:]
    base = "model.layers.1."
    assert qkv.name == f"{base}self_attn.q_proj"
    assert [x.module for x in qkv.linears] == [f"{base}self_attn.{n}_proj" for n in "qkv"]
    assert qkv.feeder == Norm(f"{base}input_layernorm.weight")
    assert qkv.tensors[0] == f"{base}input_layernorm.weight"
    assert isinstance(o.feeder, Preceding)
    assert o.feeder.rows == Rows(0, HEAD_DIM, HEAD_DIM, repeat=2)
    assert gate_up.feeder == Norm(f"{base}post_attention_layernorm.weight")
    assert isinstance(down.feeder, Preceding)
    assert down.feeder.weight == f"{base}mlp.up_proj.weight"
    assert down.in_features == MLP
    assert down.ties is None


def test_gemma_adds_one_and_the_mlp_norm_moves():
    first = find_sites(specs_of("gemma"), config("gemma")).sites[2].feeder
    second = find_sites(specs_of("gemma2"), config("gemma2")).sites[2].feeder
    assert first == Norm("model.layers.0.post_attention_layernorm.weight", plus_one=True)
    assert second == Norm("model.layers.0.pre_feedforward_layernorm.weight", plus_one=True)


def test_names_alone_do_not_tell_llama_from_gemma_and_say_so():
    specs = specs_of("gemma")
    assert find_sites(specs).family == "gemma"
    del specs["model.embed_tokens.weight"]
    found = find_sites(specs)
    assert found.family == "llama"
    assert "gemma" in found.notes[0]
    assert find_sites(specs, family="gemma").sites[0].feeder.plus_one


@pytest.mark.parametrize(
    ("layout", "outputs", "heads", "expected"),
    [
        ("all", 12, None, list(range(12))),
        ("second half", 24, None, list(range(12, 24))),
        ("heads", 12, None, list(range(12))),
        ("heads", 6, 4, [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]),
        ("heads", 3, 4, [0, 1, 2] * 4),
        ("q k v", 36, None, list(range(24, 36))),
        ("q k v", 24, 4, [18, 19, 20, 18, 19, 20, 21, 22, 23, 21, 22, 23]),
        ("q k v per head", 36, 4, [6, 7, 8, 15, 16, 17, 24, 25, 26, 33, 34, 35]),
    ],
)
def test_layouts(layout, outputs, heads, expected):
    assert rows_of(layout, outputs, 12, heads).index(12).tolist() == expected


@pytest.mark.parametrize(
    ("layout", "outputs", "heads", "why"),
    [
        ("all", 11, None, "11 outputs"),
        ("second half", 23, None, "23 outputs"),
        ("heads", 6, None, "without config.json"),
        ("heads", 6, 5, "5 attention heads do not divide"),
        ("heads", 9, 4, "9 outputs"),
        ("q k v", 12, 4, "12 outputs"),
        ("q k v per head", 30, 4, "30 outputs"),
        ("q k v per head", 36, None, "without config.json"),
    ],
)
def test_layouts_that_do_not_map_say_why(layout, outputs, heads, why):
    assert why in rows_of(layout, outputs, 12, heads)


def test_grouped_heads_without_config_leave_o_proj_alone():
    sites = find_sites(specs_of("llama", kv_heads=2)).sites
    assert sites[1].feeder is None
    assert "heads" in sites[1].reason
    head_norm = find_sites(specs_of("qwen3", kv_heads=2)).sites  # its size is the head's
    assert head_norm[1].ties is not None


@pytest.mark.parametrize(
    ("family", "setting", "left", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, (0, 2), "residual"),
        ("opt", {"activation_function": "gelu"}, (3,), "relu"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, (0, 2, 3), "residual|gelu"),
    ],
)
def test_settings_that_forbid_a_fold(family, setting, left, why):
    sites = find_sites(specs_of(family, n_blocks=1), config(family) | setting).sites
    assert tuple(i for i, site in enumerate(sites) if site.feeder is None) == left
    assert all(any(word in sites[i].reason for word in why.split("|")) for i in left)


def test_opt_without_config_looks_at_the_last_norm_and_refuses_fc2():
    specs = specs_of("opt", n_blocks=1)
    sites = find_sites(specs).sites
    assert [site.feeder is None for site in sites] == [False, False, False, True]
    assert "not known whether" in sites[3].reason
    del specs["model.decoder.final_layer_norm.weight"]
    assert [s.feeder is None for s in find_sites(specs).sites] == [True, False, True, True]


def test_a_stranger_in_the_block_forbids_its_folds():
    router = {"model.layers.1.mlp.router.weight": (8, HIDDEN)}
    sites = find_sites(specs_of("llama", **router), config("llama")).sites
    assert all(site.feeder is not None for site in sites[:4])
    assert all("router" in site.reason for site in sites[4:])


def test_a_missing_norm_or_linear_is_an_error_for_those_who_fold():
    sites = find_sites(specs_of("llama", drop=("1.input_layernorm.weight",)), config("llama")).sites
    assert sites[4].feeder is None
    with pytest.raises(InputError, match=r"model.layers.1.input_layernorm.weight not in"):
        require_whole(sites)
    cut = find_sites(specs_of("llama", drop=("0.self_attn.k_proj.weight",)), config("llama")).sites
    with pytest.raises(InputError, match="k_proj"):
        require_whole(cut)
    require_whole(find_sites(specs_of("llama"), config("llama")).sites)


def test_shapes_that_do_not_fit_leave_the_site_alone():
    wide = {"model.layers.0.input_layernorm.weight": (HIDDEN + 1,)}
    site = find_sites(specs_of("llama", **wide), config("llama")).sites[0]
    assert site.feeder is None
    assert "gains" in site.reason


def test_nothing_takes_factors_in_unknown_models():
    unknown = find_sites(specs_of("llama"), {"model_type": "mamba"})
    assert [site.feeder for site in unknown.sites] == [None] * 8
    assert "mamba" in unknown.notes[0]
    nameless = find_sites({"a.weight": TensorSpec("a.weight", "F32", (3, 3))})
    assert (nameless.family, nameless.sites) == (None, ())
    assert nameless.notes == ("the tensors' names fit no family",)
    other = find_sites(specs_of("gpt2"), config("llama"))
    assert other.sites == ()
    assert "llama" in other.notes[0]


def test_names_do_not_take_other_models_for_llama():
    olmo2 = specs_of("gemma3", drop=("input_layernorm.weight", "pre_feedforward_layernorm.weight"))
    assert find_sites(olmo2).family is None
    moe = specs_of("llama", **{f"model.layers.{i}.mlp.gate.weight": (8, HIDDEN) for i in (0, 1)})
    assert find_sites(moe).family is None
    starcoder = specs_of("gpt2", n_blocks=1)
    name = "transformer.h.0.attn.c_attn.weight"
    starcoder[name] = TensorSpec(name, "F32", (HIDDEN + 2 * HEAD_DIM, HIDDEN))
    assert find_sites(starcoder).family is None


def test_text_config_and_other_prefixes():
    inside = {"model_type": "gemma3", "text_config": config("gemma3", 2)}
    specs = {
        n.replace("model.layers", "model.language_model.layers"): s
        for n, s in specs_of("gemma3", 2).items()
    }
    specs["vision.layers.0.fc1.weight"] = TensorSpec("vision.layers.0.fc1.weight", "F32", (4, 4))
    found = find_sites(specs, inside)
    assert found.family == "gemma3"
    assert len(found.sites) == 8
    assert found.sites[1].ties is not None


def test_a_family_the_model_is_not_is_an_error():
    with pytest.raises(InputError, match="gpt2"):
        find_sites(specs_of("llama"), config("llama"), family="gpt2")
    with pytest.raises(InputError, match="did you mean llama"):
        find_sites(specs_of("llama"), family="lama")


RECIPE = [
    {"linears": ["blocks.*.q", "blocks.*.kv"], "norm": "blocks.*.ln"},
    {"linears": ["blocks.*.out"], "after": "blocks.*.kv", "layout": "heads", "heads": 4},
]


def recipe_specs(**more):
    shapes = {}
    for i in (0, 1, 10):
        shapes |= {f"blocks.{i}.q.weight": (24, 24), f"blocks.{i}.kv.weight": (12, 24)}
        shapes |= {f"blocks.{i}.ln.weight": (24,), f"blocks.{i}.ln.bias": (24,)}
        shapes |= {f"blocks.{i}.out.weight": (24, 24)}
    return {n: TensorSpec(n, "F32", s) for n, s in (shapes | more).items()}


def test_recipe_sites_are_written_out_for_every_number():
    sites = recipe_sites(RECIPE, recipe_specs())
    assert [s.name for s in sites[:3]] == ["blocks.0.q", "blocks.1.q", "blocks.10.q"]
    assert sites[2].feeder == Norm("blocks.10.ln.weight", "blocks.10.ln.bias")
    assert [x.module for x in sites[2].linears] == ["blocks.10.q", "blocks.10.kv"]
    assert sites[3].ties is not None
    alone = recipe_sites([{"linears": ["blocks.0.out"]}], recipe_specs())
    assert alone[0].feeder is None
    assert "recipe" in alone[0].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norms": "x"}, "did you mean norm"),
        ({"linears": []}, "list of modules"),
        ({"linears": ["blocks.*.nothing"]}, "no such module"),
        ({"linears": ["blocks.*.q", "blocks.*.k"]}, r"blocks\.0\.k"),
        ({"norm": "blocks.*.norm"}, r"blocks\.0\.norm"),
        ({"norm": "blocks.*.ln.*"}, r"as many \*"),
        ({"norm": "blocks.0.ln"}, "feeds two sites"),
        ({"after": "blocks.*.kv"}, "exclude each other"),
        ({"plus_one": "yes"}, "plus_one = 'yes': not bool"),
        ({"layout": "halves"}, "layout"),
        ({"linears": ["blocks.*.ln"]}, "not a linear"),
    ],
)
def test_recipes_that_do_not_fit_are_errors(change, words):
    with pytest.raises(InputError, match=words):
        recipe_sites([RECIPE[0] | change], recipe_specs())


def test_a_recipe_s_shapes_are_checked():
    with pytest.raises(InputError, match="outputs"):
        recipe_sites([RECIPE[1] | {"layout": "all"}], recipe_specs())
    with pytest.raises(InputError, match="gains for 24 inputs"):
        recipe_sites([RECIPE[0]], recipe_specs(**{"blocks.0.ln.weight": (23,)}))
    with pytest.raises(InputError, match="two sites"):
        recipe_sites([RECIPE[0], {"linears": ["blocks.0.q"]}], recipe_specs())
    assert read_entry(RECIPE[1]).heads == 4


def test_a_recipe_goes_before_detection():
    specs = specs_of("llama", n_blocks=1)
    detected = find_sites(specs, config("llama")).sites
    base = "model.layers.0."
    own = recipe_sites([{"linears": [f"{base}mlp.down_proj"]}], specs)
    merged = merge_sites(detected, own)
    assert len(merged) == 4
    assert merged[-1].feeder is None
    split = merge_sites(detected, recipe_sites([{"linears": [f"{base}mlp.up_proj"]}], specs))
    assert f"{base}mlp.gate_proj" not in [x.module for site in split for x in site.linears]


def test_a_recipe_may_not_leave_out_a_linear_that_its_norm_is_known_to_feed():
    specs = specs_of("llama", n_blocks=1)
    detected = find_sites(specs, config("llama")).sites
    entry = {"linears": ["model.layers.*.mlp.up_proj"]}
    own = recipe_sites([entry | {"norm": "model.layers.*.post_attention_layernorm"}], specs)
    with pytest.raises(InputError, match=r"gate_proj"):
        merge_sites(detected, own)
