"""Blocks of dense families against plain twins: one head, one query at a time, in float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.families import falcon
from ptq_cli.models.forward import architecture, attention, layers, stages
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.mlp import MLP
from tests.models.test_attention import slow_attention
from tests.models.test_forward import slow_rms, slow_rope

RANDOM = np.random.default_rng(11)
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
HEADS, HEAD = 4, 8
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD,
}  # fmt: skip
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
Own = Callable[[str], Any]


def random_weights(arch: Architecture) -> dict[str, Any]:
    """What the architecture reads; the head is the embedding, or beside it."""
    width, shapes = arch.hidden_size, {arch.embedding: (50, 32), arch.head: (50, 32)}
    norms: dict[Any, tuple[int, ...]] = {arch.final_norm: (width,), arch.embedding_norm: (width,)}
    for block in arch.blocks:
        mixer, mlp = block.attention, block.feed_forward
        assert mixer is not None
        assert isinstance(mlp, MLP)
        counts = {"q": mixer.n_heads, "k": mixer.n_kv_heads}
        keys = HEAD * mixer.n_kv_heads
        rows = [HEADS * HEAD, keys, keys] if len(mixer.qkv) > 1 else [HEADS * HEAD + 2 * keys]
        inner = mlp.width * (2 if mlp.gated and len(mlp.inputs) == 1 else 1)
        linears = [*zip(mixer.qkv, rows, strict=True), *((x, inner) for x in mlp.inputs)]
        for linear, n in linears:
            shapes |= {f"{linear.name}.weight": (n, width), f"{linear.name}.bias": (n,)}
        for linear, n in ((mixer.output, HEADS * HEAD), (mlp.output, mlp.width)):
            shapes |= {f"{linear.name}.weight": (width, n), f"{linear.name}.bias": (width,)}
        norms |= dict.fromkeys(block.norms.values(), (width,))
        for role, norm in mixer.norms.items():
            whole = (counts[role] * HEAD,) if mixer.norm_whole else (counts[role], HEAD)
            norms[norm] = whole
    found = {
        name: RANDOM.standard_normal(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()
    }
    for norm, shape in norms.items():
        if norm is not None:
            found[f"{norm.name}.weight"] = 1 + RANDOM.standard_normal(shape) / 5
            found[f"{norm.name}.bias"] = RANDOM.standard_normal(shape) / 5
    return {name: values.astype(np.float32) for name, values in found.items()}


def centred(own: Own, name: str, x: Any, bias: bool = True) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return slow_rms(x, own(f"{name}.weight"), 1e-5) + (own(f"{name}.bias") if bias else 0)


def linear(own: Own, name: str, x: Any, bias: bool = True) -> Any:
    return x @ own(f"{name}.weight").T + (own(f"{name}.bias") if bias else 0)


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def gelu(x: Any) -> Any:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def turned(x: Any, dims: int, interleaved: bool = False) -> Any:
    """[n, length, heads, 8]: the first channels, halves or neighbours together."""
    order = [*range(0, dims, 2), *range(1, dims, 2)] if interleaved else [*range(dims)]
    out = x.copy()
    out[..., order] = slow_rope(x[..., order], 1e4)
    return out


def attended(q: Any, k: Any, v: Any, **own: Any) -> Any:
    return slow_attention(q, k, v, MASK, HEAD**-0.5, **own).reshape(*MASK.shape, -1)


def split_by_key_heads(fused: Any, n_kv: int) -> tuple[Any, ...]:
    """For each key head its queries, its key and its value."""
    rows = iter(np.moveaxis(fused.reshape(*MASK.shape, -1, HEAD), 2, 0))
    q, k, v = [], [], []
    for _ in range(n_kv):
        q += [next(rows) for _ in range(HEADS // n_kv)]
        k.append(next(rows))
        v.append(next(rows))
    return tuple(np.stack(heads, axis=2) for heads in (q, k, v))


def slow_fused(
    own: Own,
    x: Any,
    *,
    n_kv: int = HEADS,
    dims: int = 0,
    slopes: float = 0,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    parallel: bool = False,
    normed_residual: bool = False,
    module: str = "self_attention",
    bias: bool = True,
) -> Any:
    """A block of BLOOM, Falcon or GPT-NeoX. dims: channels that turn; slopes: ALiBi's, times
    this"""
    first = centred(own, norms[0], x)
    q, k, v = split_by_key_heads(linear(own, f"{module}.query_key_value", first, bias), n_kv)
    if dims:
        q, k = turned(q, dims), turned(k, dims)
    alibi = slopes * np.exp2(-2 * (1 + np.arange(HEADS))) if slopes else None
    mixed = linear(own, f"{module}.dense", attended(q, k, v, slopes=alibi), bias)
    second = centred(own, norms[1], x if parallel else (first if normed_residual else x) + mixed)
    inner = gelu(linear(own, "mlp.dense_h_to_4h", second, bias))
    outputs = linear(own, "mlp.dense_4h_to_h", inner, bias)
    if normed_residual:
        return second + outputs
    return x + mixed + outputs


def slow_cohere(own: Own, x: Any) -> Any:
    inputs = centred(own, "input_layernorm", x, bias=False)
    q, k, v = (
        linear(own, f"self_attn.{role}_proj", inputs, False).reshape(*MASK.shape, -1, HEAD)
        for role in "qkv"
    )
    q, k = (centred(own, f"self_attn.{role}_norm", y, False) for role, y in (("q", q), ("k", k)))
    mixed = attended(turned(q, HEAD, True), turned(k, HEAD, True), v)
    gate, up = (linear(own, f"mlp.{name}_proj", inputs, False) for name in ("gate", "up"))
    outputs = linear(own, "mlp.down_proj", silu(gate) * up, False)
    return x + linear(own, "self_attn.o_proj", mixed, False) + outputs


def slow_olmo2(own: Own, x: Any) -> Any:
    def rms(name: str, y: Any) -> Any:
        return slow_rms(y, own(f"{name}.weight"), 1e-5)

    q, k, v = (linear(own, f"self_attn.{role}_proj", x, False) for role in "qkv")
    q, k = rms("self_attn.q_norm", q), rms("self_attn.k_norm", k)
    q, k, v = (y.reshape(*MASK.shape, -1, HEAD) for y in (q, k, v))
    mixed = linear(own, "self_attn.o_proj", attended(turned(q, HEAD), turned(k, HEAD), v), False)
    x = x + rms("post_attention_layernorm", mixed)
    gate, up = (linear(own, f"mlp.{name}_proj", x, False) for name in ("gate", "up"))
    return x + rms(
        "post_feedforward_layernorm", linear(own, "mlp.down_proj", silu(gate) * up, False)
    )


def slow_glm4(own: Own, x: Any) -> Any:
    def rms(name: str, y: Any) -> Any:
        return slow_rms(y, own(f"{name}.weight"), 1e-5)

    inputs = rms("input_layernorm", x)
    q, k, v = (
        linear(own, f"self_attn.{role}_proj", inputs).reshape(*MASK.shape, -1, HEAD)
        for role in "qkv"
    )
    mixed = attended(turned(q, HEAD // 2, True), turned(k, HEAD // 2, True), v)
    x = x + rms("post_self_attn_layernorm", linear(own, "self_attn.o_proj", mixed, False))
    both = linear(own, "mlp.gate_up_proj", rms("post_attention_layernorm", x), False)
    inner = silu(both[..., :40]) * both[..., 40:]
    return x + rms("post_mlp_layernorm", linear(own, "mlp.down_proj", inner, False))


def slow_starcoder2(own: Own, x: Any) -> Any:
    inputs = centred(own, "input_layernorm", x)
    q, k, v = (
        linear(own, f"self_attn.{role}_proj", inputs).reshape(*MASK.shape, -1, HEAD)
        for role in "qkv"
    )
    mixed = attended(turned(q, HEAD), turned(k, HEAD), v, window=4)
    x = x + linear(own, "self_attn.o_proj", mixed)
    inner = gelu(linear(own, "mlp.c_fc", centred(own, "post_attention_layernorm", x)))
    return x + linear(own, "mlp.c_proj", inner)


ONE, TWO = ("input_layernorm", "input_layernorm"), ("ln_attn", "ln_mlp")
NEOX = {"module": "attention", "dims": 2}
TWINS: dict[str, tuple[dict[str, Any], Callable[[Own, Any], Any]]] = {
    "bloom": ({}, lambda own, x: slow_fused(own, x, slopes=1)),
    "bloom, normed residual": (
        {"apply_residual_connection_post_layernorm": True},
        lambda own, x: slow_fused(own, x, slopes=1, normed_residual=True),
    ),
    "cohere": ({"use_qk_norm": True, "rope_theta": 1e4}, slow_cohere),
    "falcon": (
        {}, lambda own, x: slow_fused(own, x, n_kv=1, dims=8, norms=ONE, parallel=True, bias=False)
    ),
    "falcon, new decoder": (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        lambda own, x: slow_fused(own, x, n_kv=2, dims=8, norms=TWO, parallel=True, bias=False),
    ),
    "falcon, new decoder of one norm": (
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        lambda own, x: slow_fused(own, x, n_kv=2, dims=8, norms=ONE, parallel=True, bias=False),
    ),
    "falcon, rw": (FALCON_RW, lambda own, x: slow_fused(own, x, slopes=HEAD**-0.5)),
    "glm4": ({"rms_norm_eps": 1e-5}, slow_glm4),
    "gpt_neox": ({}, lambda own, x: slow_fused(own, x, parallel=True, **NEOX)),
    "gpt_neox, in turn": (
        {"use_parallel_residual": False}, lambda own, x: slow_fused(own, x, **NEOX)
    ),
    "olmo2": ({}, slow_olmo2),
    "starcoder2": ({"sliding_window": 4}, slow_starcoder2),
}  # fmt: skip
GELU = {"hidden_act": "gelu_new", "activation": "gelu_new"}


def config_of(name: str) -> dict[str, Any]:
    kind = name.partition(",")[0]
    sizes: dict[str, Any] = {**SIZES, "model_type": kind, **TWINS[name][0]}
    if "slow_fused" in TWINS[name][1].__code__.co_names:
        sizes |= {**GELU, "ffn_hidden_size": 40}  # key heads are not read
    return sizes


def own_of(arch: Architecture, weights: dict[str, Any]) -> Own:
    """A tensor by its name inside block 0."""
    base = arch.attentions[0].module.rpartition(".")[0]
    return lambda name: weights[f"{base}.{name}"].astype(float)


@pytest.mark.parametrize("name", TWINS)
def test_a_block_equals_the_plain_one(name: str) -> None:
    arch = read_architecture(config_of(name))
    weights = random_weights(arch)
    packing = pack(MASK.shape, MASK)
    hidden = RANDOM.standard_normal((*MASK.shape, 32)).astype(np.float32)
    before = hidden.copy()
    found = stages.forward_block(arch, 0, weights, packing.flat(hidden), packing)
    wanted = TWINS[name][1](own_of(arch, weights), hidden.astype(float))
    np.testing.assert_allclose(found, packing.flat(wanted), atol=2e-5)
    np.testing.assert_array_equal(hidden, before)


def logits_of(arch: Architecture, weights: dict[str, Any]) -> Any:
    tokens = np.arange(27).reshape(MASK.shape)
    packing = pack(MASK.shape, MASK)
    hidden = stages.embed(arch, weights, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = stages.forward_block(arch, index, weights, hidden, packing)
    return stages.logits(arch, weights, stages.finish(arch, weights, hidden))


def test_granites_multipliers_may_as_well_stand_in_a_llamas_weights() -> None:
    granite = {
        **SIZES, "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
        "attention_multiplier": 0.25, "logits_scaling": 5.0,
    }  # fmt: skip
    arch = read_architecture(granite)
    weights = random_weights(arch)
    base = "model.layers.0."
    factors = {
        arch.embedding: 3.0, arch.head: 1 / 5.0, f"{base}self_attn.o_proj.weight": 0.3,
        f"{base}mlp.down_proj.weight": 0.3, f"{base}self_attn.q_proj.weight": 0.25 * HEAD**0.5,
    }  # fmt: skip
    scaled = {name: x * np.float32(factors.get(name, 1)) for name, x in weights.items()}
    wanted = logits_of(read_architecture({**SIZES, "model_type": "llama"}), scaled)
    np.testing.assert_allclose(logits_of(arch, weights), wanted, atol=1e-5)


def test_commands_logits_are_scaled() -> None:
    weights = random_weights(read_architecture(config_of("cohere")))
    usual, doubled = (
        logits_of(read_architecture({**config_of("cohere"), **own}), weights)
        for own in ({}, {"logit_scale": 0.125})
    )
    np.testing.assert_allclose(doubled, 2 * usual, rtol=1e-6)


def test_blooms_embeddings_are_normed() -> None:
    arch = read_architecture(config_of("bloom"))
    weights = random_weights(arch)
    found = stages.embed(arch, weights, np.array([[3, 4]]), pack((1, 2)))
    name = "transformer.word_embeddings_layernorm"
    wanted = centred(lambda own: weights[own].astype(float), name, weights[arch.embedding][3:5])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("cohere", ["q_proj k_proj v_proj gate_proj up_proj", "o_proj down_proj"]),
        ("falcon", ["query_key_value dense_h_to_4h", "dense dense_4h_to_h"]),
        ("falcon, new decoder", ["query_key_value dense_h_to_4h", "dense dense_4h_to_h"]),
        ("falcon, rw", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_branches_side_by_side_are_two_stages(name: str, sites: list[str]) -> None:
    arch = read_architecture(config_of(name))
    found = [stage.sites for stage in stages.stages(arch, 0, pack(MASK.shape, MASK))]
    inner = [
        " ".join(x.rpartition(".")[2] for group in own.values() for x in group) for own in found
    ]
    assert inner == sites
    shared = len(set(arch.blocks[0].norms.values())) == 1
    assert len(found[0]) == (2 if name == "falcon, new decoder" else 1)
    assert shared == (name in ("cohere", "falcon"))


def test_which_blocks_turn_queries_and_keys() -> None:
    def turning(**config: Any) -> list[bool]:
        arch = read_architecture({**SIZES, "num_hidden_layers": 4, **config})
        return [attention.rope is not None for attention in arch.attentions]

    def windows(**config: Any) -> list[int | None]:
        arch = read_architecture({**SIZES, "num_hidden_layers": 4, **config})
        return [attention.window for attention in arch.attentions]

    smollm3 = {"model_type": "smollm3"}
    assert turning(**smollm3) == [True, True, True, False]
    assert turning(**smollm3, no_rope_layer_interval=2) == [True, False, True, False]
    assert turning(**smollm3, no_rope_layers=[0, 1, 1, 1]) == [False, True, True, True]
    on = {"use_sliding_window": True, "sliding_window": 5}
    assert windows(**smollm3, sliding_window=5) == [None] * 4
    assert windows(**smollm3, **on) == [None, None, None, 5]
    cohere2 = {"model_type": "cohere2", "sliding_window": 5}
    assert turning(**cohere2) == [True, True, True, False]
    assert windows(**cohere2) == [5, 5, 5, None]
    assert turning(**cohere2, sliding_window_pattern=2) == [True, False, True, False]
    assert turning(model_type="falcon", **FALCON_RW) == [False] * 4


def test_olmo_3_stretches_the_positions_of_blocks_that_see_all_tokens() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    nested = {
        "full_attention": {**scaling, "rope_theta": 9e3},
        "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
    }
    old = {"rope_theta": 9e3, "rope_scaling": scaling}  # `rope_theta` is not for windows
    for own, local in ((old, 5e5), ({"rope_parameters": nested}, 9e3)):
        config = {**SIZES, "model_type": "olmo3", "num_hidden_layers": 4, **own}
        ropes = [attention.rope for attention in read_architecture(config).attentions]
        assert [rope and (rope.kind, rope.theta) for rope in ropes] == [
            *[("default", local)] * 3,
            ("yarn", 9e3),
        ]


def test_gemmas_gelu_is_that_of_tanh() -> None:
    for activation in ("gelu", "gelu_pytorch_tanh"):
        config = {**SIZES, "model_type": "gemma", "hidden_act": activation}
        mlp = read_architecture(config).blocks[0].feed_forward
        assert isinstance(mlp, MLP)
        assert mlp.activation == "gelu_pytorch_tanh"


def test_falcons_slopes_are_bfloat16() -> None:
    def rounded(x: Any) -> Any:
        """To 8 bits behind the first one, halves to the even neighbour."""
        fraction, exponent = np.frexp(np.asarray(x, dtype=float))
        return np.ldexp(np.rint(fraction * 256), exponent - 8)

    slopes = np.exp2(-(1 + np.arange(16)) / 2)
    wanted = rounded(rounded(slopes)[:, None] * rounded(np.arange(300)))
    np.testing.assert_array_equal(falcon.alibi(16, 300), wanted)


@pytest.mark.parametrize("name", TWINS)
def test_a_block_stays_within_its_stated_memory(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(architecture, "WORKSPACE", 0)
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    monkeypatch.setattr(layers, "CHUNK", 64)
    arch = read_architecture(config_of(name))
    weights, packing = random_weights(arch), pack((100, 10))
    hidden = RANDOM.standard_normal((1000, 32)).astype(np.float32)
    tracemalloc.start()
    stages.forward_block(arch, 0, weights, hidden, packing)
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.3 * arch.block_memory(1000) < peak < arch.block_memory(1000)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ["no_rope_layers", "1 ", "2 blocks"]),
        (
            {"model_type": "cohere2", "layer_types": ["full_attention"]},
            ["layer_types", "1 ", "2 blocks"],
        ),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 3},
            ["4 attention heads", "3 key heads"],
        ),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": "2"},
            ["num_kv_heads is '2'"],
        ),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, ["no_rope_layer_interval is 0"]),
        ({"model_type": "glm4", "partial_rotary_factor": 0.1}, ["turns 0 channels"]),
    ],
)
def test_what_cannot_be_is_said(config: dict[str, Any], words: list[str]) -> None:
    config = {**SIZES, "num_hidden_layers": 2, **config}
    with pytest.raises(InputError) as caught:
        read_architecture(config)
    assert all(word in str(caught.value) for word in words)
