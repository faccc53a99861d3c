"""config.json and the tokenizer of a GGUF file: those that its metadata was made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.formats.gguf.metadata import SPLITS, model_metadata, tokenizer_metadata
from ptq_cli.formats.gguf.tokenizer import tokenizer_documents, unread
from ptq_cli.models.gguf_config import model_config
from ptq_cli.models.gguf_keys import hyperparameters
from ptq_cli.models.gguf_names import names_of_file, names_of_model

SAMPLE = Path(__file__).parent.parent.parent / "sample_data"
CONFIG = json.loads((SAMPLE / "config.json").read_text())
TOKENIZER = json.loads((SAMPLE / "tokenizer.json").read_text())
SETTINGS = json.loads((SAMPLE / "tokenizer_config.json").read_text())
METADATA = model_metadata(hyperparameters(names_of_model(CONFIG), CONFIG), "llama", "tiny", "Q4_0")


def float32(value: Any) -> Any:
    """As it comes back from the file."""
    return float(np.float32(value)) if isinstance(value, float) else value


def read_back(**change: Any) -> dict[str, Any]:
    metadata = {key: float32(value) for key, value in {**METADATA, **change}.items()}
    stated = {key: value for key, value in metadata.items() if value is not None}
    return model_config(names_of_file("llama"), stated, 2048, {})


def test_config_comes_back() -> None:
    found = read_back()
    rope = CONFIG["rope_parameters"]
    assert found.pop("rope_theta") == rope["rope_theta"]
    assert found == {key: CONFIG[key] for key in found}
    missing = CONFIG.keys() - found.keys()
    assert missing == {  # what tensors and the tokenizer tell, and what is as in any Llama
        "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id",
        "pad_token_id", "attention_dropout", "initializer_range", "pretraining_tp", "use_cache",
        "rope_parameters", "transformers_version",
    }  # fmt: skip


def test_keys_that_llama_cpp_leaves_out() -> None:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count",
             "rope.freq_base", "attention.head_count_kv")  # fmt: skip
    found = read_back(**{f"llama.{name}": None for name in names})
    assert (found["head_dim"], found["num_key_value_heads"], found["rope_theta"]) == (32, 4, 1e4)


def test_special_tokens() -> None:
    found = read_back(**{"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 0})
    assert {key: found[key] for key in found if key.endswith("token_id")} == {
        "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), [
    ("block_count", None, "llama.block_count is missing"),
    ("block_count", 0, "llama.block_count is 0, not a whole number above 0"),
    ("block_count", "4", "llama.block_count is 4, not a whole"),
    ("attention.head_count_kv", [2, 4], r"head_count_kv is \[2, 4\], not a whole"),
    ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is missing"),
    ("rope.freq_base", float("nan"), "rope.freq_base is nan, not a positive"),
    ("attention.value_length", 16, "value_length is 16, which is not covered: .* has 32 there"),
    ("rope.dimension_count", 8, "dimension_count is 8, which is not covered: a llama has 32 there"),
    ("expert_count", 8, "llama.expert_count is 8, which is not covered"),
    ("rope.scaling.type", "yarn", "rope.scaling.factor is missing"),
    ("rope.scaling.type", "ntk", "rope.scaling.type is 'ntk', which is not covered"),
    ("attention.sliding_window", 256, "sliding_window is 256, which is not covered"),
    ("attn_logit_softcapping", 30.0, "attn_logit_softcapping is 30.0, which is not covered"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_back(**{f"llama.{key}": value})


def llama3_factor(channel: int, factor: float, theta: float, head_size: int) -> float:
    """What llama.cpp's converter writes, by transformers' formula."""
    wavelength = 2 * math.pi * theta ** (2 * channel / head_size)
    if wavelength < 8192 / 4:
        return 1.0
    if wavelength > 8192 / 1:
        return factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return 1 / ((1 - smooth) / factor + smooth)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequencies(factor: float) -> None:
    values = [llama3_factor(i, factor, 10000.0, 128) for i in range(64)]
    assert len(set(values)) > 10
    factors = np.array(values, np.float32)
    sizes = {"llama.attention.key_length": 128, "llama.attention.value_length": 128}
    metadata = {**METADATA, **sizes, "llama.rope.dimension_count": 128}
    names, tensors = names_of_file("llama"), {"rope_freqs.weight": factors}
    assert model_config(names, metadata, 8, tensors)["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors[40] *= np.float32(1.01)
    with pytest.raises(InputError, match=r"rope_freqs.weight' does not hold the factors"):
        model_config(names, metadata, 8, tensors)
    with pytest.raises(InputError, match=r"rope_freqs.weight' does not hold the factors"):
        model_config(names, metadata, 8, {"rope_freqs.weight": factors[:4]})


def documents(tokenizer: Any, settings: Any, **change: Any) -> dict[str, Any]:
    return tokenizer_documents({**tokenizer_metadata(CONFIG, tokenizer, settings), **change})


def test_the_tokenizer_comes_back() -> None:
    found = documents(TOKENIZER, SETTINGS)["tokenizer.json"]
    model = TOKENIZER["model"]
    assert found["model"]["vocab"] == model["vocab"]
    assert [m.split(" ") for m in found["model"]["merges"]] == [
        m.split(" ") if isinstance(m, str) else m for m in model["merges"]
    ]
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert found[key] == TOKENIZER[key], key
    assert documents(TOKENIZER, SETTINGS)["tokenizer_config.json"] == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def pre_tokenizer(name: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name == "gpt-2":
        return {**level, "use_regex": True}
    if name in ("smollm", "command-r"):
        first = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [first, {**level, "use_regex": True}]}
    first = {
        "type": "Split",
        "pattern": {"Regex": SPLITS[name]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [first, {**level, "use_regex": False}]}


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "command-r", *SPLITS])
def test_every_way_to_split_text(name: str) -> None:
    normalizer = {"type": "NFC"} if name in ("qwen2", "command-r") else None
    own = {**TOKENIZER, "pre_tokenizer": pre_tokenizer(name), "normalizer": normalizer}
    whole = name in ("llama-bpe", "tekken")
    own["model"] = {**TOKENIZER["model"], "ignore_merges": whole}
    assert tokenizer_metadata(CONFIG, own, {})["tokenizer.ggml.pre"] == name
    found = documents(own, SETTINGS)["tokenizer.json"]
    assert found["pre_tokenizer"] == own["pre_tokenizer"]
    assert found["normalizer"] == normalizer
    assert found["model"]["ignore_merges"] is whole


def test_tokens_put_around_a_text() -> None:
    settings = {**SETTINGS, "add_bos_token": True, "chat_template": "{{ x }}"}
    found = documents(TOKENIZER, settings)
    assert found["tokenizer_config.json"]["chat_template"] == "{{ x }}"
    wrapped = found["tokenizer.json"]["post_processor"]
    assert [next(iter(part)) for part in wrapped["single"]] == ["SpecialToken", "Sequence"]
    assert wrapped["special_tokens"] == {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    again = tokenizer_metadata(CONFIG, found["tokenizer.json"], {})
    assert again["tokenizer.ggml.add_bos_token"] is True
    assert again["tokenizer.ggml.add_eos_token"] is False


def test_ids_without_a_token_stay_without() -> None:
    own = {**CONFIG, "vocab_size": 2050}
    metadata = tokenizer_metadata(own, TOKENIZER, SETTINGS)
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD2049]"
    found = tokenizer_documents(metadata)["tokenizer.json"]["model"]["vocab"]
    assert found == TOKENIZER["model"]["vocab"]


@pytest.mark.parametrize(("change", "words"), [
    ({"tokenizer.ggml.model": "llama"}, "its kind is 'llama'"),
    ({"tokenizer.ggml.model": "no_vocab"}, "its kind is 'no_vocab'"),
    ({"tokenizer.ggml.pre": "chatglm-bpe"}, "splits text as 'chatglm-bpe' does"),
    ({"tokenizer.ggml.token_type": [1]}, "missing or damaged"),
    ({"tokenizer.ggml.tokens": [3] * 2048}, "missing or damaged"),
    ({"tokenizer.ggml.merges": 5}, "missing or damaged"),
    ({"tokenizer.ggml.tokens": ["a"] * 2048}, "a token stands twice"),
])  # fmt: skip
def test_other_tokenizers_are_left_out(change: dict[str, Any], words: str) -> None:
    metadata = {**tokenizer_metadata(CONFIG, TOKENIZER, SETTINGS), **change}
    assert words in str(unread(metadata))
    assert tokenizer_documents(metadata) == {}
