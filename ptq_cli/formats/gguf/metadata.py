"""The metadata of a GGUF file, from config.json, tokenizer.json and tokenizer_config.json.

Dictionaries in, dictionary out: key → value, whose type says GGUF's: `int` U32, `float` F32,
`bool`, `str`, or a list of strings, I32 or F32. What llama.cpp could not compute from these keys is
refused: rope scaling, sliding windows, a tokenizer of an unknown kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptq_cli.errors import InputError

# general.file_type by the type that most weights have
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38,
    "NVFP4": 39,
}  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}


def model_metadata(
    config: Mapping[str, Any], architecture: str, name: str, file_type: str
) -> dict[str, Any]:
    """Keys of the architecture; `file_type` is the type that most weights have."""
    rope = _rope(config)
    plain = {"partial_rotary_factor": 1.0, "hidden_act": "silu", "use_sliding_window": False}
    for key, value in plain.items():
        found = {**config, **rope}.get(key, value)
        if found != value:
            raise InputError(f"gguf: {key} {found!r} in config.json is not covered")
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": head_size,
        "vocab_size": config["vocab_size"],
    }
    return {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": int(size) for key, size in numbers.items()},
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(rope["rope_theta"]),
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, which older and newer versions of config.json have in
    different places, as `rope_theta`, `rope_type` and more."""
    found: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        own = dict(config.get(key) or {})
        kind = own.pop("type", None) or own.pop("rope_type", None)
        if kind not in (None, "default"):
            raise InputError(f"gguf: rope_type {kind!r} in config.json is not covered")
        found |= own
    return found


def tokenizer_metadata(
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Keys of the tokenizer: `tokenizer` is tokenizer.json, `settings` tokenizer_config.json.

    Without a tokenizer the file says so (`no_vocab`), and takes token ids only.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"gguf: a tokenizer of type {model.get('type')!r} is not covered")
    tokens, types = _tokens(int(config["vocab_size"]), tokenizer)
    pieces = bool(model.get("byte_fallback"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    result: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if pieces:
        result["tokenizer.ggml.scores"] = _scores(tokens, merges)
        result["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    else:
        result["tokenizer.ggml.pre"] = _pre_tokenizer(tokenizer)
        result["tokenizer.ggml.merges"] = merges
    return result | _special(config, tokenizer, settings, tokens)


def _tokens(vocab_size: int, tokenizer: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and their types; ids without a token are unused ones."""
    model = tokenizer["model"]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    known = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    for text, number in known.items():
        if number >= vocab_size:
            raise InputError(
                f"tokenizer.json has token {number}, but vocab_size in config.json is {vocab_size}"
            )
        tokens[number] = text
        types[number] = NORMAL
        if text == model.get("unk_token"):
            types[number] = UNKNOWN
        elif text in added:
            types[number] = CONTROL if added[text].get("special") else USER
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            types[number] = BYTE
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp joins the pair whose result has the highest score: the earlier merge."""
    joined = [merge.replace(" ", "") for merge in merges]
    rank = dict(zip(reversed(joined), reversed(range(len(merges))), strict=True))
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    normalizers = _flat(tokenizer.get("normalizer"), "normalizers")
    splits = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    spaces = [part for part in splits if part["type"] == "Metaspace"]
    return any(part["type"] == "Prepend" for part in normalizers) or any(
        part.get("prepend_scheme") != "never" for part in spaces
    )


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging. Raises InputError if it has none."""
    parts = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    normalizers = [part["type"] for part in _flat(tokenizer.get("normalizer"), "normalizers")]
    kinds = [part["type"] for part in parts]
    plain = not any(part.get("add_prefix_space") for part in parts) and set(normalizers) <= {"NFC"}
    if plain and not normalizers and parts[-1:] and parts[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")))
        if name is not None and parts[0].get("behavior") == "Isolated":
            return name
    raise InputError(
        f"gguf: tokenizer.json splits text ({', '.join(kinds) or 'no pre-tokenizer'}) in a way that"
        " llama.cpp has no known name for"
    )


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _special(
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    tokens: list[str],
) -> dict[str, Any]:
    """Ids of special tokens, whether they are added to a text, and the chat template."""
    result: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        stated, number = settings.get(f"{name}_token"), config.get(f"{name}_token_id")
        text = stated.get("content") if isinstance(stated, Mapping) else stated
        if text in tokens:
            number = tokens.index(text)
        elif isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int):
            result[f"tokenizer.ggml.{key}_token_id"] = number
    first, last = _template_ends(tokenizer)
    for name, added in (("bos", first), ("eos", last)):
        stated = settings.get(f"add_{name}_token")
        result[f"tokenizer.ggml.add_{name}_token"] = added if stated is None else bool(stated)
    if isinstance(settings.get("chat_template"), str):
        result["tokenizer.chat_template"] = settings["chat_template"]
    return result


def _template_ends(tokenizer: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether tokenizer.json puts a special token before a text, and one after it."""
    for part in _flat(tokenizer.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing" and part.get("single"):
            return "SpecialToken" in part["single"][0], "SpecialToken" in part["single"][-1]
    return False, False
