"""GGUF's row order and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_cli.core.grid import Grid
from ptq_cli.core.plugins import Contents
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf import FORMAT, TYPES, block_type, permute_rows, unpermute_rows
from ptq_cli.formats.gguf.metadata import FILE_TYPES, SPLITS, model_metadata, tokenizer_metadata
from ptq_cli.models.gguf_keys import hyperparameters
from ptq_cli.models.gguf_names import names_of_model

SAMPLE = Path(__file__).parent.parent.parent / "sample_data"
CONFIG = json.loads((SAMPLE / "config.json").read_text())
TOKENIZER = json.loads((SAMPLE / "tokenizer.json").read_text())
SETTINGS = json.loads((SAMPLE / "tokenizer_config.json").read_text())

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_row_order(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    stored = permute_rows(rows, heads)
    np.testing.assert_array_equal(unpermute_rows(stored, heads), rows)
    for head in range(heads):
        for row in range(half):
            first = head * 2 * half + row
            np.testing.assert_array_equal(stored[head * 2 * half + 2 * row], rows[first])
            np.testing.assert_array_equal(stored[head * 2 * half + 2 * row + 1], rows[first + half])
    np.testing.assert_array_equal(permute_rows(rows[:, 0], heads), stored[:, 0])


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return hyperparameters(names_of_model(config), config)


def test_model_metadata() -> None:
    assert model_metadata(keys(CONFIG), "llama", "tiny", "Q4_0") == {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 128,
        "llama.block_count": 4,
        "llama.feed_forward_length": 384,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": 2048,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }


def test_model_metadata_of_older_configs() -> None:
    own = {
        key: value for key, value in CONFIG.items() if key not in ("rope_parameters", "head_dim")
    }
    own |= {"model_type": "qwen2", "rope_theta": 1_000_000, "rope_scaling": None}
    found = model_metadata(keys(own), "qwen2", "tiny", "F16")
    assert found["qwen2.rope.freq_base"] == 1e6
    assert type(found["qwen2.rope.freq_base"]) is float  # an F32 in the file
    assert found["qwen2.attention.key_length"] == 32


@pytest.mark.parametrize("change", [
    {"rope_scaling": {"rope_type": "dynamic", "factor": 8}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8}, "model_type": "qwen2"},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 16}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
    {"partial_rotary_factor": 0.5},
    {"hidden_act": "gelu"},
    {"use_sliding_window": True, "model_type": "qwen2"},
    {"use_bidirectional_attention": True},
])  # fmt: skip
def test_what_has_no_key_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"in config.json is not covered"):
        keys(CONFIG | change)


def test_tokenizer_of_bytes() -> None:
    found = tokenizer_metadata(CONFIG, TOKENIZER, SETTINGS)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 2048
    assert tokens[:3] == ["<s>", "</s>", "!"]
    assert types[:3] == [3, 3, 1]
    assert found["tokenizer.ggml.merges"][:2] == ["Ġ Ġ", "ĠĠ ĠĠ"]
    assert {key: found[key] for key in found if not isinstance(found[key], list)} == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def tokenizer(**change: Any) -> dict[str, Any]:
    return TOKENIZER | change


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}


def split(regex: str, behavior: str = "Isolated") -> dict[str, Any]:
    own = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [own, level]}


@pytest.mark.parametrize(("change", "name"), [
    ({"pre_tokenizer": split(QWEN_SPLIT), "normalizer": {"type": "NFC"}}, "qwen2"),
    ({"pre_tokenizer": split(QWEN_SPLIT.replace("N}|", "N}{1,3}|"))}, "dbrx"),
    ({"pre_tokenizer": split(QWEN_SPLIT.replace("N}|", "N}{1,3}|")),
      "model": TOKENIZER["model"] | {"ignore_merges": True}}, "llama-bpe"),
    ({"pre_tokenizer": split(SPLITS["tekken"])}, "tekken"),
    ({"pre_tokenizer": split(SPLITS["gpt-4o"])}, "gpt-4o"),
    ({"pre_tokenizer": DIGITS}, "smollm"),
    ({"pre_tokenizer": DIGITS, "normalizer": {"type": "NFC"}}, "command-r"),
])  # fmt: skip
def test_known_splits(change: dict[str, Any], name: str) -> None:
    found = tokenizer_metadata(CONFIG, tokenizer(**change), {})
    assert found["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": split(r"\w+")},
    {"pre_tokenizer": split(QWEN_SPLIT, "Removed")},
    {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    {"normalizer": {"type": "Lowercase"}},
])  # fmt: skip
def test_unknown_splits_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"in a way that llama.cpp has no known name for"):
        tokenizer_metadata(CONFIG, tokenizer(**change), {})


def test_tokenizer_of_pieces() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "a": 4, "b": 5, "ab": 6, "aab": 7}
    own = {
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab,
            "merges": ["a b", "a ab"],
        },
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "added_tokens": [
            {"id": 1, "content": "<s>", "special": True},
            {"id": 2, "content": "</s>", "special": True},
            {"id": 8, "content": "<tool>", "special": False},
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        },
    }  # fmt: skip
    settings = {"bos_token": {"content": "<s>"}, "chat_template": "{{ x }}"}
    found = tokenizer_metadata({"vocab_size": 10, "eos_token_id": [2, 8]}, own, settings)
    assert found == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*vocab, "<tool>", "[PAD9]"],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 4, 5],
        "tokenizer.ggml.scores": [-2.0] * 6 + [0.0, -1.0, -2.0, -2.0],
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }


UNIGRAM = {
    "model": {
        "type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["▁a", -1.5]],
    },
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": "AAEC/w=="},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ],
    },
    "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "always"},
    "added_tokens": [{"id": 1, "content": "</s>", "special": True}],
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
    },
}  # fmt: skip


def test_tokenizer_of_likeliest_pieces() -> None:
    found = tokenizer_metadata({"vocab_size": 4, "eos_token_id": 1}, UNIGRAM, {})
    assert found == {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<unk>", "</s>", "▁a", "[PAD3]"],
        "tokenizer.ggml.token_type": [2, 3, 1, 5],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.5, 0.0],
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": b"\x00\x01\x02\xff",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }


@pytest.mark.parametrize("change", [
    {"model": UNIGRAM["model"] | {"byte_fallback": True}},
    {"normalizer": {"type": "NFKC"}},
    {"pre_tokenizer": {"type": "WhitespaceSplit"}},
])  # fmt: skip
def test_other_unigrams_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a Unigram that .* is not covered"):
        tokenizer_metadata({"vocab_size": 4}, UNIGRAM | change, {})


def test_a_token_before_a_text_that_is_not_its_beginning() -> None:
    """GLM-4 puts two tokens there, and has none for the beginning."""
    own = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    template = tokenizer(post_processor={"type": "TemplateProcessing", "single": own})
    for first, added in (("<s>", True), ("</s>", False), (None, False)):
        found = tokenizer_metadata({"vocab_size": 2048}, template, {"bos_token": first})
        assert found["tokenizer.ggml.add_bos_token"] is added


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(InputError, match="type 'WordPiece' is not covered") as refused:
        tokenizer_metadata(CONFIG, {"model": {"type": "WordPiece"}}, {})
    assert "convert_hf_to_gguf.py" in refused.value.hint
    with pytest.raises(InputError, match=r"has token .*, but vocab_size in config.json is 5"):
        tokenizer_metadata({"vocab_size": 5}, TOKENIZER, {})


def test_one_of_several_chat_templates() -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ y }}"}]
    found = tokenizer_metadata(CONFIG, TOKENIZER, {"chat_template": named})
    assert found["tokenizer.chat_template"] == "{{ y }}"
    assert "tokenizer.chat_template" not in tokenizer_metadata(
        CONFIG, TOKENIZER, {"chat_template": named[:1]}
    )


def test_no_tokenizer() -> None:
    assert tokenizer_metadata(CONFIG, None, {}) == {"tokenizer.ggml.model": "no_vocab"}


def test_every_type_has_a_file_type() -> None:
    assert TYPES.keys() | {"F16", "F32"} == set(FILE_TYPES)
    with pytest.raises(InputError, match="no type for 3 bits"):
        block_type(Grid(3))


def read(*specs: TensorSpec) -> Any:
    named = {f"of.{spec.name}": spec for spec in specs}
    metadata = {"general.architecture": "llama"}
    return FORMAT.layers(Contents(metadata, {}, named, lambda name: np.zeros(0)))


def test_layers_of_a_file() -> None:
    (found,) = read(
        TensorSpec("output_norm.weight", "F32", (64,)),
        TensorSpec("blk.0.attn_q.weight", "Q5_1", (32, 64)),
    )
    assert (found.module, found.shape) == ("of.blk.0.attn_q", (32, 64))
    assert found.grid == Grid(5, 32, sym=False, scale_dtype="float16")
    assert FORMAT.layers(Contents({}, {}, {}, lambda name: np.zeros(0))) == ()


def test_layers_of_a_file_that_is_not_understood() -> None:
    with pytest.raises(InputError, match=r"blk.0.attn_q.weight' is of type IQ2_XS, which"):
        read(TensorSpec("blk.0.attn_q.weight", "IQ2_XS", (32, 256)))
    with pytest.raises(InputError, match=r"has shape \[32, 40\]"):
        read(TensorSpec("blk.0.attn_q.weight", "Q4_0", (32, 40)))
