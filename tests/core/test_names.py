"""Folded names expand to exactly the names they were made of."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptq_cli.core.names import by_number, fold_names, natural

KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]

SLOW_MACHINES = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def expand(pattern: str) -> list[str]:
    """Every name of a folded list; a slow twin of no code of the package."""
    return [name for part in alternatives(pattern) for name in product(part)]


def alternatives(text: str) -> list[str]:
    """Split at the commas outside of braces."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def product(part: str) -> list[str]:
    """One alternative: what stands before, in and after each pair of braces."""
    pieces: list[list[str]] = []
    while part:
        if part[0] != "{":
            plain = re.match(r"[^{]+", part).group()
            pieces.append([plain])
            part = part[len(plain) :]
            continue
        depth, end = 0, 0
        for c in part:
            end += 1
            depth += (c == "{") - (c == "}")
            if depth == 0:
                break
        inside, part = part[1 : end - 1], part[end:]
        found = []
        for own in alternatives(inside):
            numbers = re.fullmatch(r"(\d+)-(\d+)", own)
            found += (
                [str(i) for i in range(int(numbers[1]), int(numbers[2]) + 1)]
                if numbers
                else product(own)
            )
        pieces.append(found)
    return ["".join(choice) for choice in itertools.product(*pieces)]


def layers(numbers, kinds=KINDS, parent="model.layers"):
    return [f"{parent}.{i}.{kind}" for i in numbers for kind in kinds]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        (layers([3], ["mlp.up_proj"]), "model.layers.3.mlp.up_proj"),
        (
            layers(range(30)),
            "model.layers.{0-29}.{self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj}",
        ),
        (layers([0, 10, 1], KINDS[:4]), "model.layers.{0-1,10}.self_attn.{q,k,v,o}_proj"),
        (layers([0, 1, 2, 3, 7, 9, 10], ["fc1"]), "model.layers.{0-3,7,9-10}.fc1"),
        (layers([0], ["fc1", "fc2"]), "model.layers.0.fc{1-2}"),
        (
            layers(range(3), [f"experts.{j}.w{k}" for j in range(128) for k in (1, 2, 3)]),
            "model.layers.{0-2}.experts.{0-127}.w{1-3}",
        ),
        (
            [*layers(range(4), KINDS[:3]), *layers([2], KINDS[4:5])],
            "model.layers.{{0-3}.self_attn.{q,k,v}_proj, 2.mlp.gate_proj}",
        ),
        (
            [*layers(range(3), KINDS[4:]), "lm_head"],
            "model.layers.{0-2}.mlp.{gate,up,down}_proj, lm_head",
        ),
        (["a.b{1}", "a.c", "a.1-2", "a b"], "a.c, a.b{1}, a.1-2, a b"),
    ],
)  # fmt: skip
def test_folded(names, folded):
    assert fold_names(names) == folded


words = st.sampled_from(
    ["q_proj", "k_proj", "_proj", "fc1", "fc2", "fc", "0", "1", "2", "10", "01", "", "x"]
)
names_ = st.lists(st.lists(words, min_size=1, max_size=4).map(".".join), max_size=25)
depth = st.integers(0, 40)
real = st.lists(
    st.tuples(depth, st.sampled_from(KINDS)).map(lambda x: f"h.{x[0]}.{x[1]}"), max_size=60
)


@SLOW_MACHINES
@given(names_ | real)
def test_expanding_the_braces_gives_the_names(names):
    folded = fold_names(names, 10**9)
    assert sorted(expand(folded)) == sorted(set(names)) or (not names and not folded)


@SLOW_MACHINES
@given(real, st.integers(20, 300))
def test_the_length_is_bounded_and_the_rest_counted(names, width):
    folded = fold_names(names, width)
    shown, _, more = folded.partition(", and ")
    distinct = set(names)
    assert len(folded) <= width or len(expand(shown)) <= 1
    if more:
        missing = int(more.removesuffix(" more"))
        assert set(expand(shown)) < distinct
        assert len(expand(shown)) + missing == len(distinct)


def test_natural_order():
    assert sorted(layers([10, 2, 1], ["a"]), key=natural) == layers([1, 2, 10], ["a"])


def test_by_number_words_stay_as_they_come():
    kinds = ["self_attn.q_proj", "mlp.down_proj", "fc10", "fc9"]
    stored = ["lm_head", *layers([0, 1, 10, 11, 2], kinds), "a"]
    wanted = ["lm_head", *layers([0, 1, 2, 10, 11], [*kinds[:2], "fc9", "fc10"]), "a"]
    assert by_number(stored) == wanted
