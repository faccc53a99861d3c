"""What runtimes make of small floats, from files alone."""

from __future__ import annotations

from typing import Any

import pytest

from ptq_cli.core.layer import Layer
from ptq_cli.formats.runtimes import facts, loads
from ptq_cli.formats.runtimes.artifact import FAILS, LIMIT, Artifact
from ptq_cli.registry import format_named
from tests.formats.float_weights import float_layer

EXPERT = "model.layers.0.mlp.experts.0.down_proj"
DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def artifact(fmt: str, own: Layer, fused: tuple[str, ...] = ()) -> Artifact:
    record, dense = format_named(fmt), ["lm_head"]
    config: dict[str, Any] = {"model_type": "qwen3_moe", "dtype": DTYPES[own.dtype]}
    config |= dict.fromkeys(record.config_keys, record.config([own], dense))
    return Artifact(fmt, [own], dense, config, ["config.json", "tokenizer.json"], fused)


def said(level: str, runtime: str, *given: Any, **more: Any) -> list[str]:
    return [fact.text for fact in facts(artifact(*given, **more), runtime) if fact.level == level]


@pytest.mark.parametrize(("scheme", "words"), [
    ("NVFP4A16", "without its global scale: noise"),
    ("NVFP4", "without its global scale: noise"),
    ("MXFP8A16", "several FP8 scales"),
    ("FP8_BLOCK", "several FP8 scales"),
    ("FP8_DYNAMIC", None), ("MXFP4A16", None), ("MXFP4", None),
])  # fmt: skip
def test_experts_that_transformers_fuses(scheme: str, words: str | None) -> None:
    own = float_layer(scheme, module=EXPERT)
    found = said(FAILS, "transformers", "compressed-tensors", own, fused=(EXPERT,))
    assert len(found) == (words is not None)
    assert all(words is not None and words in text for text in found)
    limits = said(LIMIT, "transformers", "compressed-tensors", own, fused=(EXPERT,))
    assert any("its inputs are not rounded" in text for text in limits) == (
        own.activation is not None
    )
    assert loads(facts(artifact("compressed-tensors", own, (EXPERT,)), "vllm"))


@pytest.mark.parametrize(("scheme", "dtype", "level"), [
    ("NVFP4", "BF16", None), ("NVFP4", "F16", FAILS), ("NVFP4A16", "F16", LIMIT),
    ("MXFP4A16", "F16", LIMIT), ("FP8A16", "BF16", None),
])  # fmt: skip
def test_what_is_unpacked_to_bfloat16(scheme: str, dtype: str, level: str | None) -> None:
    own = float_layer(scheme, dtype=dtype)
    words = "loads only with" if level == FAILS else "is dequantized when loaded"
    for each in (FAILS, LIMIT):
        found = said(each, "transformers", "compressed-tensors", own)
        assert any(words in text for text in found) == (each == level), found


@pytest.mark.parametrize(("rows", "fails"), [(64, False), (128, False), (192, True), (256, False)])
def test_blocks_that_are_cut_short(rows: int, fails: bool) -> None:
    """transformers 5.23 divides the rows by the rows of scales."""
    own = float_layer("FP8_BLOCK", (rows, 256), scale_dtype="float32")
    assert format_named("fp8").misfit(own) is None
    found = said(FAILS, "transformers", "fp8", own)
    assert any("no multiple of the block" in text for text in found) == fails
    assert loads(facts(artifact("fp8", own), "vllm"))


def test_inputs_in_fp4_want_hardware_that_has_it() -> None:
    for scheme, words in (("NVFP4", "Blackwell"), ("W4AFP8", "8.9"), ("FP8", "8.9")):
        found = said(LIMIT, "vllm", "compressed-tensors", float_layer(scheme))
        assert any(words in text for text in found), scheme
    assert not said(LIMIT, "vllm", "compressed-tensors", float_layer("NVFP4A16"))


@pytest.mark.parametrize(("name", "rows", "fails"), [
    ("q_proj", 192, True), ("v_proj", 192, False), ("q_proj", 256, False), ("o_proj", 192, False),
])  # fmt: skip
def test_blocks_of_what_vllm_fuses(name: str, rows: int, fails: bool) -> None:
    own = float_layer("FP8_BLOCK", (rows, 256), module=f"model.layers.0.self_attn.{name}")
    found = said(FAILS, "vllm", "compressed-tensors", own)
    assert any("that vLLM fuses" in text for text in found) == fails


def test_whole_tensors_have_other_names_in_vllm() -> None:
    own = float_layer("FP8", scale_dtype="float32")
    assert any("other names" in text for text in said(FAILS, "vllm", "fp8", own))
    assert loads(facts(artifact("compressed-tensors", float_layer("FP8")), "vllm"))
