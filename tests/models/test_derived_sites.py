"""Sites of models whose family nobody knows: known families are hidden and must be found again;
names that no family has; and the recipe of what was derived, read back."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models import derived_sites
from ptq_cli.models.derived_sites import DerivedSite, derive_sites
from ptq_cli.models.detect import find_sites
from ptq_cli.models.linears import group_modules, left_alone
from ptq_cli.models.recipe import recipe_sites
from ptq_cli.models.recipe_text import recipe_text
from ptq_cli.models.sites import Norm
from tests.models.test_block_sites import (
    ATTENTION,
    CASES,
    CONFIG,
    EXPERTS,
    HEAD,
    MLP,
    USUAL,
    WIDTH,
    experts,
    gated,
    norms,
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]
NARROW = "narrow branch"  # its branch reads the norm of q, k and v, which no name and no shape says
HIDDEN = {"model_type": "unheard_of", "hidden_size": WIDTH, "num_key_value_heads": 2, **CONFIG}


def specs_of(*blocks: Shapes, path: str = "model.layers.{}.") -> dict[str, TensorSpec]:
    named = {
        path.format(number) + name: shape
        for number, block in enumerate(blocks)
        for name, shape in block.items()
    }
    return {name: TensorSpec(name, "BF16", shape) for name, shape in named.items()}


def hidden(name: str) -> tuple[set[frozenset[str]], tuple[DerivedSite, ...]]:
    """The linears that share their inputs in a block of a family, and what is derived of it when
    its name is hidden."""
    family, block, _ = CASES[name]
    prefix = "transformer.h.{}." if family == "falcon" else "model.layers.{}."
    specs = specs_of(block, path=prefix)
    derived = derive_sites(specs, HIDDEN)
    modules = [linear for site in derived for linear in site.pattern.linears]
    true = find_sites(specs, {"model_type": family, **CONFIG}).sites
    return set(map(frozenset, group_modules(modules, true))), derived


def linears_of(derived: tuple[DerivedSite, ...]) -> set[frozenset[str]]:
    return {frozenset(site.pattern.linears) for site in derived}


@pytest.mark.parametrize("name", CASES)
def test_a_family_that_is_hidden_is_found_again(name: str) -> None:
    true, derived = hidden(name)
    assert true
    if name != NARROW:
        assert linears_of(derived) == true
    for site in derived:
        shared = [group for group in true if group >= set(site.pattern.linears)]
        assert len(shared) == 1, "these do not see the same input"
        assert site.certainty in ("sure", "likely", "guess")


@pytest.mark.parametrize("name", CASES)
def test_what_feeds_a_hidden_family_is_told_or_left_out(name: str) -> None:
    """But for what names and shapes cannot tell: a norm of values that has no gains."""
    _, derived = hidden(name)
    true = {tuple(sorted(names.split())): fed for names, fed in _written_out(name)}
    path = "transformer.h.0." if CASES[name][0] == "falcon" else "model.layers.0."
    for site in derived:
        inside = tuple(sorted(linear.removeprefix(path) for linear in site.pattern.linears))
        said = (site.pattern.norm or site.pattern.after).removeprefix(path)
        if said and inside in true and name != NARROW:
            assert said == true[inside]


def _written_out(name: str) -> list[tuple[str, str | None]]:
    rows = CASES[name][2]
    return [(re.sub(r" ([kv])_proj", r" self_attn.\1_proj", names), fed) for names, fed in rows]


@pytest.mark.parametrize("name", CASES)
def test_without_the_names_of_known_families_nothing_is_joined_that_is_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived_sites, "known_row", lambda module: (module.rpartition(".")[2],))
    true, derived = hidden(name)
    for group in linears_of(derived):
        assert any(group <= other for other in true)
    assert "sure" not in {x.certainty for x in derived if len(x.pattern.linears) > 1}


OUTER = norms("norm_1", "norm_2")
ATTENDING: Shapes = {
    "attn.wq.weight": (WIDTH, WIDTH), "attn.wk.weight": (2 * HEAD, WIDTH),
    "attn.wv.weight": (2 * HEAD, WIDTH), "attn.wo.weight": (WIDTH, WIDTH),
}  # fmt: skip
SHAPED: Shapes = {
    "m.one.weight": (MLP, WIDTH), "m.two.weight": (MLP, WIDTH), "m.three.weight": (WIDTH, MLP),
}  # fmt: skip
MIXED: Shapes = {
    "att.time_maa_k": (1, 1, WIDTH), "att.receptance.weight": (WIDTH, WIDTH),
    "att.key.weight": (WIDTH, WIDTH), "att.value.weight": (WIDTH, WIDTH),
}  # fmt: skip
TURNED: Shapes = {
    "attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH), "attn.c_proj.bias": (WIDTH,),
}  # fmt: skip
FLAT: Shapes = {
    **{name.replace("attn.", ""): shape for name, shape in ATTENDING.items()},
    "gate.weight": (MLP, WIDTH), "up.weight": (MLP, WIDTH), "down.weight": (WIDTH, MLP),
}  # fmt: skip
CROSS: Shapes = {f"cross_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in ("q", "k", "v", "out")}
# A block, what more config.json says, and its sites: linears, how sure, and what may feed them.
UNHEARD: dict[str, tuple[Shapes, dict[str, Any], list[tuple[str, str, str]]]] = {
    "other words": (
        {**OUTER, **ATTENDING},
        {},
        [
            ("attn.wq attn.wk attn.wv", "likely", "norm_1"), ("attn.wo", "likely", "attn.wv"),
        ],
    ),
    "shapes of a gated MLP": (
        {**OUTER, **SHAPED},
        {},
        [("m.one m.two", "likely", "norm_2"), ("m.three", "sure", "")],
    ),
    "sizes of heads": (
        {
            "a.r.weight": (2 * HEAD, WIDTH), "a.s.weight": (WIDTH, WIDTH),
            "a.t.weight": (2 * HEAD, WIDTH), "a.u.weight": (WIDTH, WIDTH),
        },
        {},
        [("a.r a.t", "likely", ""), ("a.s", "guess", ""), ("a.u", "guess", "")],
    ),
    "no words and no sizes": (
        {"a.r.weight": (40, WIDTH), "a.s.weight": (48, WIDTH)},
        {},
        [("a.r", "guess", ""), ("a.s", "guess", "")],
    ),
    "inputs that are mixed": (
        MIXED,
        {},
        [("att.receptance", "guess", ""), ("att.key", "guess", ""), ("att.value", "guess", "")],
    ),
    "transposed, as biases say": (
        {**norms("ln_1", bias=True), **TURNED},
        {},
        [("attn.c_attn", "likely", "ln_1"), ("attn.c_proj", "likely", "")],
    ),
    "all in one module": (
        FLAT,
        {},
        [
            ("wq wk wv", "likely", ""), ("gate up", "likely", ""), ("wo", "likely", "wv"),
            ("down", "sure", "up"),
        ],
    ),
    "another sequence": (
        CROSS,
        {},
        [
            *((f"cross_attn.{x}_proj", "likely", "") for x in "qkv"),
            ("cross_attn.out_proj", "likely", "cross_attn.v_proj"),
        ],
    ),
    "side by side, as config.json says": (
        {**norms("input_layernorm"), **ATTENTION, **gated("mlp")},
        {"use_parallel_residual": True},
        [
            (
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
                "likely", "input_layernorm",
            ),
            ("self_attn.o_proj", "likely", "self_attn.v_proj"),
            ("mlp.down_proj", "sure", "mlp.up_proj"),
        ],
    ),
    "one norm behind": (
        {**norms("post_norm"), **ATTENTION, **gated("mlp")},
        {},
        [
            ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "likely", ""),
            ("mlp.gate_proj mlp.up_proj", "likely", ""),
            ("self_attn.o_proj", "likely", "self_attn.v_proj"),
            ("mlp.down_proj", "sure", "mlp.up_proj"),
        ],
    ),
    "a gate of the attention": (
        {**ATTENTION, "self_attn.gate_proj.weight": (2 * WIDTH, WIDTH)},
        {},
        [
            ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "likely", ""),
            ("self_attn.gate_proj", "guess", ""),
            ("self_attn.o_proj", "likely", "self_attn.v_proj"),
        ],
    ),
    "numbers": (
        {f"ffn_up_exps.{number}.weight": (MLP, WIDTH) for number in range(3)},
        {},
        [(f"ffn_up_exps.{number}", "guess", "") for number in range(3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNHEARD)
def test_names_that_no_family_has(name: str) -> None:
    block, more, wanted = UNHEARD[name]
    found = derive_sites(specs_of(block), {**HIDDEN, **more})
    said = [
        (" ".join(x.pattern.linears), x.certainty, x.pattern.norm or x.pattern.after) for x in found
    ]
    short = [tuple(text.replace("model.layers.0.", "") for text in row) for row in said]
    assert sorted(short) == sorted(wanted)
    assert all(site.pattern.transposed == name.startswith("transposed") for site in found)


def test_names_of_a_gguf_file() -> None:
    block: Shapes = {
        **norms("attn_norm", "ffn_norm"),
        **{f"attn_{x}.weight": (2 * HEAD, WIDTH) for x in "kv"},
        "attn_q.weight": (WIDTH, WIDTH), "attn_output.weight": (WIDTH, WIDTH),
        "ffn_gate.weight": (MLP, WIDTH), "ffn_up.weight": (MLP, WIDTH),
        "ffn_down.weight": (WIDTH, MLP),
    }  # fmt: skip
    config = {"general.architecture": "unheard_of"}
    sites = find_sites(specs_of(block, path="blk.{}."), config).sites
    found = {" ".join(x.module.removeprefix("blk.0.") for x in site.linears) for site in sites}
    assert found == {"attn_k attn_v attn_q", "attn_output", "ffn_gate ffn_up", "ffn_down"}


def test_numbers_that_no_block_has() -> None:
    specs = specs_of(ATTENTION, path=f"model.{'1' * 5000}.")
    assert derive_sites(specs, HIDDEN) == ()


def test_relu_commutes_with_a_scale() -> None:
    block = {"mlp.fc1.weight": (MLP, WIDTH), "mlp.fc2.weight": (WIDTH, MLP)}
    for activation, after in (("relu", "mlp.fc1"), ("gelu", "")):
        _, last = derive_sites(specs_of(block), {**HIDDEN, "hidden_act": activation})
        assert last.pattern.after.removeprefix("model.layers.0.") == after


@pytest.mark.parametrize("config", [{}, {"hidden_size": 7}, {"hidden_size": "wide"}])
def test_a_width_that_config_json_does_not_tell_is_that_of_most_linears(
    config: dict[str, Any],
) -> None:
    assert derive_sites(specs_of(SHAPED), config)[0].pattern.linears == (
        "model.layers.0.m.one", "model.layers.0.m.two",
    )  # fmt: skip


def test_commands_see_what_shares_an_input_and_nothing_that_takes_factors() -> None:
    specs = specs_of({**OUTER, **ATTENDING}, {**OUTER, **MIXED})
    found = find_sites(specs, HIDDEN)
    assert found.family is None
    assert [note.partition(":")[0] for note in found.notes] == [
        "model_type 'unheard_of' is not known", "sites by names and shapes (ptq inspect --sites)",
    ]  # fmt: skip
    assert "2 likely, 3 guess" in found.notes[1]
    assert all(site.feeder is None and site.reason for site in found.sites)
    modules = [linear.module for site in found.sites for linear in site.linears]
    groups = [[m.rpartition(".")[2] for m in g] for g in group_modules(modules, found.sites)]
    assert groups == [["wq", "wk", "wv"], ["wo"], ["key"], ["value"], ["receptance"]]


def test_what_stays_dense_is_in_no_site() -> None:
    block = {**USUAL, **ATTENTION, **experts(), "mlp.gate.weight": (EXPERTS, WIDTH)}
    specs = {**specs_of(block), **specs_of({"fc1.weight": (4, 4)}, path="vision_tower.layers.{}.")}
    reasons = left_alone(specs, HIDDEN)
    for site in derive_sites(specs, HIDDEN):
        assert not {f"{linear}.weight" for linear in site.pattern.linears} & reasons.keys()


def written(specs: dict[str, TensorSpec], config: dict[str, Any]) -> str:
    derived = derive_sites(specs, config)
    return recipe_text("a model", ((x.pattern, f"{x.certainty}: {x.why}") for x in derived), specs)


def looked_at(recipe: str) -> str:
    """The recipe of somebody who found that all that may feed a site does."""
    return re.sub(r"^# (?=(norm|after|layout|heads) = )", "", recipe, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in CASES if name != NARROW])
def test_a_recipe_says_what_was_derived(name: str) -> None:
    block = CASES[name][1]
    specs = specs_of(block, block)
    derived = derive_sites(specs, HIDDEN)
    recipe = written(specs, HIDDEN)
    assert "*" in recipe
    assert recipe.count("[[sites]]") <= len(derived) // 2
    sites = recipe_sites(tomllib.loads(recipe)["sites"], specs)
    assert {frozenset(x.module for x in site.linears) for site in sites} == linears_of(derived)
    assert all(site.feeder is None for site in sites)
    fed = recipe_sites(tomllib.loads(looked_at(recipe))["sites"], specs)
    by_name = {site.name: site for site in fed}
    for site in derived:
        feeder = by_name[site.pattern.linears[0]].feeder
        source = site.pattern.norm or site.pattern.after
        assert (feeder is None) == (not source)
        assert feeder is None or feeder.weight == f"{source}.weight"
        assert isinstance(feeder, Norm) == bool(site.pattern.norm)


def test_blocks_that_differ_are_written_apart() -> None:
    block = {**ATTENTION, **gated("mlp")}
    other = {name: shape for name, shape in block.items() if ".v_proj" not in name}
    specs = specs_of(block, other, block)
    recipe = written(specs, HIDDEN)
    sites = recipe_sites(tomllib.loads(recipe)["sites"], specs)
    counts = [len(site.linears) for site in sites if site.name.endswith("q_proj")]
    assert sorted(counts) == [2, 3, 3]
    assert 'linears = ["model.layers.*.mlp.down_proj"]' in recipe


def test_names_are_data_in_a_recipe() -> None:
    odd = 'a"b\\c\x1b\u202e[red]'
    specs = specs_of({f"{odd}.wq.weight": (8, WIDTH), f"{odd}.wk.weight": (8, WIDTH)})
    recipe = written(specs, HIDDEN)
    assert "\x1b" not in recipe
    assert "\u202e" not in recipe
    (entry,) = tomllib.loads(recipe)["sites"]
    assert entry["linears"] == [f"model.layers.*.{odd}.w{x}" for x in "qk"]
