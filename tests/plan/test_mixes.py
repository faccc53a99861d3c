"""llama.cpp's mixes, against its own rules told as questions, one after the other."""

from __future__ import annotations

import pytest

from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.plan.mixes import (
    ALIASES,
    FALLBACKS,
    MIXES,
    ModelFacts,
    fallback,
    is_rounded,
    mix_named,
    mix_types,
)

MODELS = {  # facts, tied
    "dense": (ModelFacts("mistral3", 17, 8, 4), False),
    "tied": (ModelFacts("qwen3", 16, 8, 8, important=True), True),
    "shared heads": (ModelFacts("llama", 33, 8, 2), False),
    "few blocks": (ModelFacts("llama", 3, 8, 1, important=True), True),
    "large": (ModelFacts("llama", 80, 64, 8), False),
    "large, one key a head": (ModelFacts("llama", 80, 64, 64), False),
    "large qwen2": (ModelFacts("qwen2", 80, 64, 64), False),
    "eight experts": (ModelFacts("llama", 32, 32, 8, 8), False),
    "many experts": (ModelFacts("qwen3moe", 16, 32, 4, 128, True), True),
    "falcon": (ModelFacts("falcon", 32, 71, 1), False),
}
WIDTHS = (4096, 512 + 32, 192)


def shapes(facts: ModelFacts, tied: bool, columns: int, inner: int) -> dict[str, tuple[int, ...]]:
    found = {"token_embd.weight": (64, columns), "output_norm.weight": (columns,)}
    found |= {} if tied else {"output.weight": (64, columns)}
    qkv = ("attn_qkv",) if facts.architecture == "falcon" else ("attn_q", "attn_k", "attn_v")
    experts, ending = ((facts.experts,), "_exps") if facts.experts else ((), "")
    for block in range(facts.blocks):
        own = dict.fromkeys((*qkv, "attn_output"), (64, columns))
        own |= {f"ffn_{name}{ending}": (*experts, 64, columns) for name in ("gate", "up")}
        own[f"ffn_down{ending}"] = (*experts, 64, inner)
        own |= {"ffn_gate_inp": (experts[0], columns)} if experts else {}
        found |= {f"blk.{block}.{name}.weight": shape for name, shape in own.items()}
        found[f"blk.{block}.attn_norm.weight"] = (columns,)
    return found


def expected(mix: str, name: str, facts: ModelFacts, tied: bool, shape: tuple[int, ...]) -> str:
    """The type of one tensor, asked as llama_model_quantize asks, in its order."""
    main = next(kind for kind in TYPES if mix.startswith(kind))
    kind = before_widths(mix, main, name, facts, tied, shape)
    narrower = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    narrower["IQ4_XS"] = "IQ4_NL"
    return narrower[kind] if shape[-1] % TYPES[kind].block else kind


def before_widths(
    mix: str, main: str, name: str, facts: ModelFacts, tied: bool, shape: tuple[int, ...]
) -> str:
    role = name.split(".")[-2].removesuffix("_exps").replace("attn_qkv", "attn_v")
    falcon, eight = facts.architecture == "falcon", facts.experts == 8
    if role == "output" or (role == "token_embd" and tied):
        if mix == "MXFP4_MOE" or falcon or shape[-1] % TYPES[main].block or main == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    if mix == "MXFP4_MOE":
        return "MXFP4" if len(shape) == 3 else "Q8_0"
    i, n = (int(name.split(".")[1]) if name.startswith("blk") else 0), facts.blocks
    four, more = facts.heads // facts.kv_heads >= 4, i in outer(n)
    if role == "attn_v":
        return attn_v(mix, main, i, facts, four, more)
    if role == "attn_k":
        return "Q8_0" if eight else main
    if role == "attn_output":
        if falcon:
            return "Q4_K" if mix == "Q3_K_L" else main
        if eight:
            most = ["Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"]
            return "Q5_K" if mix in most else main
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, main)
    return ffn_down(mix, main, (i, n), facts, more) if role == "ffn_down" else main


def outer(n: int) -> set[int]:
    """Blocks of more bits."""
    middle = range(n // 8 + 2, n, 3)
    return {*range(n // 8), *middle, *(i for i in range(n) if i >= 7 * n // 8)}


def attn_v(mix: str, main: str, i: int, facts: ModelFacts, four: bool, more: bool) -> str:
    kind = main
    if mix == "Q2_K":
        kind = "Q4_K" if four else "Q3_K"
    elif mix == "Q2_K_S" and four:
        kind = "Q4_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if i < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and four):
        kind = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and more:
        kind = "Q6_K"
    elif mix == "Q4_K_S" and i < 4:
        kind = "Q5_K"
    large = facts.blocks == 80 and (facts.architecture == "qwen2" or facts.heads > facts.kv_heads)
    if large and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if facts.experts == 8 else kind


def ffn_down(mix: str, main: str, place: tuple[int, int], facts: ModelFacts, more: bool) -> str:
    (i, n), falcon = place, facts.architecture == "falcon"
    eighth, sixteenth = i < n // 8, i < n // 16
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q2_K_S":
        return "Q4_K" if eighth else main
    if mix == "Q3_K_M":
        return "Q5_K" if sixteenth else "Q4_K" if not falcon or more else "Q3_K"
    if mix == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if mix == "Q4_K_M" and falcon:
        return "Q6_K" if sixteenth else "Q5_K" if more else main
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else main
    if mix in ("IQ4_NL", "IQ4_XS") and eighth and not facts.important:
        return "Q5_K"
    if mix == "Q4_K_S" and eighth and not falcon:
        return "Q5_K"
    if mix in ("Q4_0", "Q5_0") and eighth and facts.important:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    return main


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_tensor_gets_llama_cpps_type(mix, model):
    facts, tied = MODELS[model]
    for columns in WIDTHS:
        tensors = shapes(facts, tied, columns, columns + 256)
        found = mix_types(mix, facts, tensors)
        wanted = {
            name: expected(mix, name, facts, tied, shape)
            for name, shape in tensors.items()
            if not name.endswith(("_norm.weight", "_inp.weight"))
        }
        assert found == wanted


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q6_K", "IQ4_XS", "Q5_0"])
def test_a_pure_mix_has_one_type_where_it_fits(mix):
    facts, tied = MODELS["eight experts"]
    found = mix_types(mix, facts, shapes(facts, tied, 4096, 4096), pure=True)
    assert set(found.values()) == {mix_named(mix).main}
    narrow = mix_types(mix, facts, shapes(facts, tied, 544, 4096), pure=True)
    main = mix_named(mix).main
    assert {narrow["output.weight"], narrow["blk.0.attn_v.weight"]} == {fallback(main, 544)}
    assert narrow["blk.0.ffn_down_exps.weight"] == main


@pytest.mark.parametrize(("kind", "other"), FALLBACKS.items())
def test_what_no_block_divides_falls_back(kind, other):
    assert [fallback(kind, columns) for columns in (512, 288, 100)] == [kind, other, "F16"]
    assert fallback("Q4_0", 100) == "Q4_0"  # there is nothing to take: the format refuses it


def test_the_numbers_of_file_types_are_llama_cpps():
    numbers = {name: mix.file_type for name, mix in MIXES.items()}
    assert numbers == {
        "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
        "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
        "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    }  # fmt: skip
    assert {name: mix_named(name).file_type for name in ALIASES} == {
        "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "rounded"),
    [
        ("blk.0.attn_q.weight", (8, 256), True),
        ("blk.0.ffn_down_exps.weight", (4, 8, 256), True),
        ("blk.0.ffn_down_exps.weight", (4, 1, 256), True),
        ("blk.0.attn_q.bias", (8, 256), False),
        ("blk.0.ffn_gate_inp.weight", (4, 256), False),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256), False),  # a vector, to ggml
        ("blk.0.attn_q_norm.weight", (8, 256), False),
        ("position_embd.weight", (8, 256), False),
        ("token_embd.weight", (8, 256), True),
        ("per_layer_token_embd.weight", (8, 256), True),
        ("blk.0.ssm_conv1d.weight", (8, 4), False),
        ("rope_freqs.weight", (32,), False),
    ],
)
def test_what_stays_as_it_is(name, shape, rounded):
    assert is_rounded(name, shape) is rounded
