"""Choices, what they cost, and the recipe of a decision."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Plan, Unit
from ptq_cli.errors import InputError
from ptq_cli.plan.allocation import Budget, Trial, decide, divergence_of, is_linear
from ptq_cli.plan.choices import kept_rules, make_groups, read_choice, read_choices, recipe_rules
from ptq_cli.plan.recipe import recipe_text
from ptq_cli.registry import format_named

PTQ = format_named("ptq")


def layer(module: str, bits: int, rows: int = 32) -> Layer:
    shape = (rows, 64)
    return Layer(module, f"{module}.weight", shape, shape, "BF16", Grid(bits, 32, True))


def plan(bits: int, modules: Mapping[str, int], pinned: Mapping[str, int] = {}) -> Plan:
    layers = tuple(layer(name, pinned.get(name, bits), rows) for name, rows in modules.items())
    units = tuple(Unit(x.module, (x,), None, 0) for x in layers)
    return Plan("rtn", (), "ptq", units, (), (), 0, 0)


MODULES = {
    f"model.layers.{block}.{name}": rows
    for block in range(3)
    for name, rows in {
        "self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16,
        "self_attn.o_proj": 32, "mlp.experts.0.up_proj": 8, "mlp.experts.0.gate_proj": 8,
        "mlp.experts.1.up_proj": 8, "mlp.experts.1.gate_proj": 8, "mlp.experts.1.down_proj": 8,
        "mlp.experts.0.down_proj": 8,
    }.items()
}  # fmt: skip
WIDTHS = {"W2A16": 2, "W4A16": 4, "W8A16": 8}


def groups_of(pinned: Mapping[str, int] = {}) -> Any:
    return make_groups({k: plan(b, MODULES, pinned) for k, b in WIDTHS.items()}, PTQ, {})


def test_groups_are_what_runtimes_fuse() -> None:
    groups = {group.name: group for group in groups_of()}
    assert len(groups) == 3 * 3
    names = [x.rpartition(".")[2] for x in groups["model.layers.1.self_attn.q_proj"].modules]
    assert names == ["q_proj", "k_proj", "v_proj"]
    assert len(groups["model.layers.2.mlp.experts"].modules) == 6
    own = groups["model.layers.0.self_attn.o_proj"]
    specs = PTQ.specs(layer("model.layers.0.self_attn.o_proj", 4))
    assert own.sizes["W4A16"] == sum(spec.nbytes for spec in specs)
    assert own.weights == 32 * 64


def test_a_tensor_of_gguf_is_a_group() -> None:
    names = {f"{module}.weight": re.sub(r"experts\.\d", "exps", module) for module in MODULES}
    plans = {k: plan(b, MODULES) for k, b in WIDTHS.items()}
    groups = make_groups(plans, PTQ, names)
    assert len(groups) == 3 * (4 + 3)
    assert sorted(len(group.modules) for group in groups) == [1] * 12 + [2] * 9


def test_a_choice_that_not_all_of_a_group_can_have_is_none() -> None:
    some = {name: rows for name, rows in MODULES.items() if "1.self_attn.k" not in name}
    plans = {"W2A16": plan(2, some), "W4A16": plan(4, MODULES)}
    groups = {group.name: group for group in make_groups(plans, PTQ, {})}
    assert [*groups["model.layers.1.self_attn.q_proj"].sizes] == ["W4A16"]
    assert [*groups["model.layers.0.self_attn.q_proj"].sizes] == ["W2A16", "W4A16"]


def test_pins_leave_nothing_to_decide_and_hold_of_all_that_is_fused() -> None:
    q, k, v = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    groups = {group.name: group for group in groups_of({q: 8, k: 8, v: 8})}
    assert groups[q].decided
    assert not groups["model.layers.1.self_attn.q_proj"].decided
    for pinned in ({q: 8}, {q: 8, k: 8, v: 4}):
        with pytest.raises(InputError, match="are one matrix in runtimes"):
            groups_of(pinned)


def test_a_recipe_gives_each_layer_its_pick() -> None:
    groups = groups_of()
    names = [*WIDTHS]
    picks = [names[number * number % 3] for number in range(len(groups))]
    choices = {name: read_choice(name) for name in names}
    rules = recipe_rules(groups, picks, choices, PTQ)
    text = recipe_text({"group_size": 32, "layers": rules}, "gptq", ["a\nb"])
    read = tomllib.loads(text)["layers"]
    for group, pick in zip(groups, picks, strict=True):
        for own in group.layers[pick]:
            found = [rule["bits"] for rule in read if re.search(rule["match"], own.tensor)]
            assert found == [WIDTHS[pick]], own.tensor


def test_words_of_choices() -> None:
    assert read_choice(" w3a16 ").rule == {"bits": 3}
    assert read_choice("nvfp4").rule == {"scheme": "NVFP4"}
    assert read_choice("q4_k").rule == {"type": "Q4_K"}
    assert next(x.name for x in read_choices((), format_named("gguf"))) == "Q2_K"
    widths = read_choices(("W4A16", "W3A16"), PTQ)
    kept = kept_rules(["a=b$=W4A16"], widths)
    assert kept == ({"match": "a=b$", "bits": 4},)


# ---- costs ----


def test_a_cost_goes_through_its_trials() -> None:
    trials = [Trial(0.01, 0.1), Trial(0.16, 3.2)]
    assert divergence_of(0.01, trials) == pytest.approx(0.1)
    assert divergence_of(0.16, trials) == pytest.approx(3.2)
    assert divergence_of(0.04, trials) == pytest.approx(0.1 * 2**2.5)
    assert divergence_of(0.001, trials) == pytest.approx(0.01)  # in proportion below
    assert divergence_of(0.0, trials) == 0
    assert divergence_of(0.5, []) == 0
    assert divergence_of(0.02, [Trial(0.01, 0.1)]) == pytest.approx(0.2)


def test_what_is_linear_is_told() -> None:
    assert is_linear([Trial(0.01, 0.1), Trial(0.1, 1.1)])
    assert not is_linear([Trial(0.01, 0.1), Trial(0.1, 4.0)])
    assert is_linear([])


# ---- decisions ----

COSTS = {"W2A16": 1.0, "W4A16": 0.1, "W8A16": 0.01}
NAMES = {name: read_choice(name) for name in WIDTHS}


def decided(**budget: Any) -> Any:
    groups = groups_of()
    scale = {group.name: 1.0 + number for number, group in enumerate(groups)}
    costs = {name: {c: by * x for c, x in COSTS.items()} for name, by in scale.items()}
    return groups, decide(groups, NAMES, costs, Budget(**budget), 100)


@pytest.mark.parametrize("bpw", [2.8, 3.0, 4.0, 5.5, 8.0])
def test_bits_are_those_of_what_is_rounded_with_its_scales(bpw: float) -> None:
    groups, (picks, _, uniform) = decided(bits_per_weight=bpw)
    size = sum(g.sizes[pick] for g, pick in zip(groups, picks, strict=True))
    weights = sum(group.weights for group in groups)
    assert 8 * size / weights <= bpw
    assert [*uniform] == [*WIDTHS]
    assert uniform["W2A16"][1] == 100 + sum(group.sizes["W2A16"] for group in groups)


def test_a_size_counts_what_no_choice_changes() -> None:
    groups, (picks, points, _) = decided(size=15000)
    size = sum(g.sizes[pick] for g, pick in zip(groups, picks, strict=True))
    assert 14500 < size + 100 <= 15000
    costs = [cost for _, _, cost in points]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("budget", "word"),
    [({"size": 100}, "less than the smallest choices take"), ({"size": 10**9}, "more than"),
     ({"bits_per_weight": 1.0}, "2.750"), ({"bits_per_weight": 20.0}, "8.750")],
)  # fmt: skip
def test_a_budget_out_of_reach(budget: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=re.escape(word)):
        decided(**budget)
