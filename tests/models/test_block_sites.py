"""Every kind of block that the families know, by the names and shapes of its tensors: what shares
an input, what feeds it, and why some take no factors. That folds are exact is proven against
transformers in tests/interop/test_folding_architectures.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.models.detect import Sites, find_sites
from ptq_cli.models.families import FAMILIES, TOLD_BY_NAMES
from ptq_cli.models.linears import group_modules
from ptq_cli.models.sites import Norm, Preceding, Rows, require_whole

WIDTH, HEADS, HEAD, MLP, EXPERTS = 32, 4, 8, 48, 3
CONFIG = {"num_attention_heads": HEADS}


def norms(*names: str, bias: bool = False) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": (WIDTH,) for name in names for part in parts}


def linears(**rows: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name.replace('__', '.')}.weight": shape for name, shape in rows.items()}


def gated(path: str, width: int = MLP) -> dict[str, tuple[int, ...]]:
    shapes = {f"{path}.{name}_proj.weight": (width, WIDTH) for name in ("gate", "up")}
    return {**shapes, f"{path}.down_proj.weight": (WIDTH, width)}


def experts(path: str = "mlp.experts") -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for number in range(EXPERTS)
        for name, shape in gated(f"{path}.{number}", 16).items()
    }


ATTENTION: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.k_proj.weight": (2 * HEAD, WIDTH),
    "self_attn.v_proj.weight": (2 * HEAD, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
}
USUAL = norms("input_layernorm", "post_attention_layernorm")
ROUTER = {"mlp.gate.weight": (EXPERTS, WIDTH)}
LATENT = {
    "self_attn.q_a_proj.weight": (12, WIDTH), "self_attn.q_b_proj.weight": (HEADS * 10, 12),
    "self_attn.q_a_layernorm.weight": (12,), "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_a_proj_with_mqa.weight": (18, WIDTH),
    "self_attn.kv_b_proj.weight": (HEADS * (6 + HEAD), 16),
    "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
}  # fmt: skip
LITE = {name: shape for name, shape in LATENT.items() if ".q_" not in name}
LITE["self_attn.q_proj.weight"] = (HEADS * 10, WIDTH)
FUSED = linears(
    self_attention__query_key_value=(WIDTH + 4 * HEAD, WIDTH),
    self_attention__dense=(WIDTH, WIDTH),
    mlp__dense_h_to_4h=(MLP, WIDTH),
    mlp__dense_4h_to_h=(WIDTH, MLP),
)
DELTA = {
    "linear_attn.in_proj_qkvz.weight": (64, WIDTH), "linear_attn.in_proj_ba.weight": (8, WIDTH),
    "linear_attn.out_proj.weight": (WIDTH, 16), "linear_attn.norm.weight": (8,),
    "linear_attn.A_log": (4,), "linear_attn.dt_bias": (4,), "linear_attn.conv1d.weight": (48, 1, 4),
}  # fmt: skip
MAMBA = {
    "mamba.in_proj.weight": (70, WIDTH), "mamba.out_proj.weight": (WIDTH, 32),
    "mamba.norm.weight": (32,), "mamba.A_log": (4,), "mamba.D": (4,), "mamba.dt_bias": (4,),
    "mamba.conv1d.weight": (40, 1, 4), "mamba.conv1d.bias": (40,),
}  # fmt: skip
STACKED = {
    "mlp.router.weight": (EXPERTS, WIDTH), "mlp.router.bias": (EXPERTS,),
    "mlp.experts.gate_up_proj": (EXPERTS, WIDTH, 32),
    "mlp.experts.gate_up_proj_bias": (EXPERTS, 32),
    "mlp.experts.down_proj": (EXPERTS, 16, WIDTH), "mlp.experts.down_proj_bias": (EXPERTS, WIDTH),
    "self_attn.sinks": (HEADS,),
}  # fmt: skip
NARROW = {
    "laurel.linear_left.weight": (4, WIDTH), "laurel.linear_right.weight": (WIDTH, 4),
    "per_layer_input_gate.weight": (6, WIDTH), "per_layer_projection.weight": (WIDTH, 6),
    "altup.correct_output_scale": (WIDTH,), "altup.correction_coefs.weight": (4, 4),
    "altup.prediction_coefs.weight": (16, 4), "altup.modality_router.weight": (4, WIDTH),
    "self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,),
    **norms(
        "altup.router_norm", "laurel.post_laurel_norm", "post_per_layer_input_norm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
SHARED = {**gated("mlp.shared_expert"), "mlp.shared_expert_gate.weight": (1, WIDTH)}
QKV = "self_attn.q_proj k_proj v_proj"
EACH = [f"mlp.experts.{e}" for e in range(EXPERTS)]
ROUTED = " ".join(f"{e}.gate_proj {e}.up_proj" for e in EACH)
DOWN = [(f"{e}.down_proj", f"{e}.up_proj") for e in EACH]
ATTENDED = [(QKV, "input_layernorm"), ("self_attn.o_proj", "self_attn.v_proj")]
PLAIN = [
    ("mlp.gate_proj mlp.up_proj", "post_attention_layernorm"),
    ("mlp.down_proj", "mlp.up_proj"),
]
QUERY_KEY_VALUE = "self_attention.query_key_value"
LAST = ("self_attention.dense", QUERY_KEY_VALUE)
NOT_LINEAR = ("mlp.dense_4h_to_h", None)

# family, the tensors of a block, and its sites: the linears and what feeds them, or None
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], list[tuple[str, str | None]]]] = {
    "mixture": (
        "qwen3_moe",
        {
            **ATTENTION, **USUAL, **ROUTER, **experts(),
            "self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,),
        },
        [*ATTENDED, (f"mlp.gate {ROUTED}", "post_attention_layernorm"), *DOWN],
    ),
    "shared expert": (
        "qwen2_moe",
        {**ATTENTION, **USUAL, **ROUTER, **experts(), **SHARED},
        [
            *ATTENDED,
            (
                "mlp.gate mlp.shared_expert_gate mlp.shared_expert.gate_proj"
                f" mlp.shared_expert.up_proj {ROUTED}",
                "post_attention_layernorm",
            ),
            ("mlp.shared_expert.down_proj", "mlp.shared_expert.up_proj"),
            *DOWN,
        ],
    ),
    "no experts": ("qwen2_moe", {**ATTENTION, **USUAL, **gated("mlp")}, [*ATTENDED, *PLAIN]),
    "latent attention": (
        "deepseek_v3",
        {**LATENT, **USUAL, **gated("mlp")},
        [
            ("self_attn.q_a_proj self_attn.kv_a_proj_with_mqa", "input_layernorm"),
            ("self_attn.q_b_proj", "self_attn.q_a_layernorm"),
            ("self_attn.kv_b_proj", "self_attn.kv_a_layernorm"),
            ("self_attn.o_proj", "self_attn.kv_b_proj"),
            *PLAIN,
        ],
    ),
    "latent attention, whole queries": (
        "deepseek_v3",
        {
            **LITE, **USUAL, **ROUTER, **experts(), **gated("mlp.shared_experts"),
            "mlp.gate.e_score_correction_bias": (EXPERTS,),
        },
        [
            ("self_attn.q_proj self_attn.kv_a_proj_with_mqa", "input_layernorm"),
            ("self_attn.kv_b_proj", "self_attn.kv_a_layernorm"),
            ("self_attn.o_proj", "self_attn.kv_b_proj"),
            (
                f"mlp.gate mlp.shared_experts.gate_proj mlp.shared_experts.up_proj {ROUTED}",
                "post_attention_layernorm",
            ),
            ("mlp.shared_experts.down_proj", "mlp.shared_experts.up_proj"),
            *DOWN,
        ],
    ),
    "delta rule": (
        "qwen3_next",
        {**DELTA, **USUAL, **gated("mlp")},
        [
            ("linear_attn.in_proj_qkvz linear_attn.in_proj_ba", "input_layernorm"),
            ("linear_attn.out_proj", None),
            *PLAIN,
        ],
    ),
    "side by side": (
        "cohere",
        {**ATTENTION, **norms("input_layernorm"), **gated("mlp")},
        [
            (f"{QKV} mlp.gate_proj mlp.up_proj", "input_layernorm"),
            ("self_attn.o_proj", "self_attn.v_proj"),
            ("mlp.down_proj", "mlp.up_proj"),
        ],
    ),
    "one after the other": (
        "falcon",
        {**FUSED, **norms("input_layernorm", "post_attention_layernorm", bias=True)},
        [
            (QUERY_KEY_VALUE, "input_layernorm"), LAST,
            ("mlp.dense_h_to_4h", "post_attention_layernorm"), NOT_LINEAR,
        ],
    ),
    "side by side, one norm": (
        "falcon",
        {**FUSED, **norms("input_layernorm", bias=True)},
        [(f"{QUERY_KEY_VALUE} mlp.dense_h_to_4h", "input_layernorm"), LAST, NOT_LINEAR],
    ),
    "side by side, two norms": (
        "falcon",
        {**FUSED, **norms("ln_attn", "ln_mlp", bias=True)},
        [(QUERY_KEY_VALUE, "ln_attn"), LAST, ("mlp.dense_h_to_4h", "ln_mlp"), NOT_LINEAR],
    ),
    "norms behind branches": (
        "olmo2",
        {
            **ATTENTION, **gated("mlp"),
            **norms("post_attention_layernorm", "post_feedforward_layernorm"),
            "self_attn.q_norm.weight": (WIDTH,), "self_attn.k_norm.weight": (2 * HEAD,),
        },
        [(QKV, None), ATTENDED[1], ("mlp.gate_proj mlp.up_proj", None), PLAIN[1]],
    ),
    "Mamba": (
        "bamba",
        {**MAMBA, **norms("input_layernorm", "pre_ff_layernorm"), **gated("feed_forward")},
        [
            ("mamba.in_proj", None), ("mamba.out_proj", None),
            ("feed_forward.gate_proj feed_forward.up_proj", "pre_ff_layernorm"),
            ("feed_forward.down_proj", "feed_forward.up_proj"),
        ],
    ),
    "stacked experts": (
        "gpt_oss", {**ATTENTION, **USUAL, **STACKED}, [*ATTENDED, ("mlp.router", None)]
    ),
    "narrow branch": (
        "gemma3n",
        {**ATTENTION, **USUAL, **gated("mlp"), **NARROW},
        [
            (f"{QKV} laurel.linear_left", None), ("self_attn.o_proj", None),
            ("laurel.linear_right", "laurel.linear_left"),
            ("per_layer_input_gate", None), ("per_layer_projection", None),
            (PLAIN[0][0], "pre_feedforward_layernorm"), PLAIN[1],
        ],
    ),
}  # fmt: skip


def found(name: str, *whole: bool, **more: Any) -> tuple[str, Sites]:
    """The path of the last block and the sites of all. more: further tensors of the last, or () for
    one that it lacks; whole: true for a whole block before it"""
    family, shapes, _ = CASES[name]
    record = next(own for own in FAMILIES if own.name == family)
    blocks = [shapes for _ in whole] + [{**shapes, **more}]
    paths = [f"{record.names.prefixes[0]}{record.names.blocks}.{i}." for i in range(len(blocks))]
    named = {
        path + inner: shape
        for path, block in zip(paths, blocks, strict=True)
        for inner, shape in block.items()
        if shape
    }
    specs = {full: TensorSpec(full, "BF16", shape) for full, shape in named.items()}
    return paths[-1], find_sites(specs, {"model_type": record.model_types[-1], **CONFIG})


@pytest.mark.parametrize("name", CASES)
def test_the_sites_of_a_block(name: str) -> None:
    path, sites = found(name)
    said = []
    for site in sites.sites:
        short = [linear.module.removeprefix(path) for linear in site.linears]
        fed = None if site.feeder is None else site.feeder.weight.removeprefix(path)
        said.append((short, None if fed is None else fed.removesuffix(".weight")))
        assert (site.reason is None) == (site.feeder is not None)
        assert not site.missing
        if isinstance(site.feeder, Norm):
            assert site.feeder.plus_one == (CASES[name][0] == "qwen3_next")
    expand = {QKV.split()[i]: f"self_attn.{x}_proj" for i, x in ((1, "k"), (2, "v"))}
    wanted = [([expand.get(x, x) for x in names.split()], fed) for names, fed in CASES[name][2]]
    assert said == wanted
    require_whole(sites.sites)


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_is_not_known_forbids_the_folds_of_its_block(name: str) -> None:
    _, sites = found(name, **{"self_attn.adapter.weight": (4, WIDTH)})
    assert all(site.feeder is None for site in sites.sites)
    assert any("adapter" in (site.reason or "") for site in sites.sites)


def test_experts_share_their_input_with_nobody() -> None:
    path, sites = found("shared expert")
    modules = [linear.module for site in sites.sites for linear in site.linears]
    groups = group_modules(modules, sites.sites)
    short = [tuple(module.removeprefix(path) for module in group) for group in groups]
    assert short[2] == (
        "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
    )  # fmt: skip
    assert short[3:6] == [(f"{e}.gate_proj", f"{e}.up_proj") for e in EACH]
    linears = {linear.module: linear for site in sites.sites for linear in site.linears}
    assert linears[f"{path}mlp.experts.1.up_proj"].expert == f"{path}mlp.experts.1"
    assert linears[f"{path}mlp.shared_expert.up_proj"].expert == ""


@pytest.mark.parametrize("lost", ["mlp.experts.1.up_proj", "mlp.experts.2.down_proj", "mlp.gate"])
def test_an_expert_that_is_missing_is_an_error_for_those_who_fold(lost: str) -> None:
    _, sites = found("mixture", True, **{f"{lost}.weight": ()})
    with pytest.raises(InputError, match=lost):
        require_whole(sites.sites)


def test_values_of_latent_attention_lie_behind_the_keys_of_each_head() -> None:
    _, sites = found("latent attention")
    feeder = sites.sites[3].feeder
    assert isinstance(feeder, Preceding)
    assert feeder.rows == Rows(6, HEAD, 6 + HEAD)


def test_falcon_s_values_lie_behind_the_queries_of_their_group() -> None:
    _, sites = found("side by side, one norm")  # [2 queries, key, value] of 2 groups
    feeder = sites.sites[1].feeder
    assert isinstance(feeder, Preceding)
    assert feeder.rows == Rows(3 * HEAD, HEAD, 4 * HEAD, 2)
    rows = np.arange(4 * 2 * HEAD).reshape(2, 4, HEAD)[:, 3]
    np.testing.assert_array_equal(feeder.rows.index(WIDTH), rows.repeat(2, axis=0).ravel())


def test_names_alone_tell_the_families_that_they_told() -> None:
    assert [family.name for family in TOLD_BY_NAMES] == [
        "gemma3", "gemma2", "gemma", "qwen3", "qwen2", "llama", "mistral", "phi3", "opt", "gpt2",
        "bloom",
    ]  # fmt: skip
    named, shapes = "model.layers.0.", {**ATTENTION, **USUAL, **gated("mlp")}
    specs = {named + name: TensorSpec(named + name, "F32", shapes[name]) for name in shapes}
    assert find_sites(specs).notes[0].startswith("names fit llama, mistral and gemma alike")
