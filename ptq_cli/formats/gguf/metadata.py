"""The metadata of a GGUF file, from config.json, tokenizer.json and tokenizer_config.json.

Dictionaries in, dictionary out: key → value, whose type says GGUF's: `int` U32, `float` F32,
`bool`, `str`, `bytes` (a list of U8), or a list of strings, I32 or F32. A tokenizer of a kind that
llama.cpp does not have is refused.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from ptq_cli.core.text import TWO_STEPS
from ptq_cli.errors import InputError

# general.file_type by the type that most weights have
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38,
    "NVFP4": 39,
}  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_WORDS = (f"{_BEFORE}{_UPPER}*{_LOWER}+", f"{_BEFORE}{_UPPER}+{_LOWER}*")
_SLASHES = _ENDS.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_NUMBERS = rf"{_SHORT}|{_BEFORE}\p{{L}}+|\p{{N}}"
SPLITS = {  # llama.cpp's names for how text is split before merging
    "qwen2": rf"{_NUMBERS}{_ENDS}",
    "dbrx": rf"{_NUMBERS}{{1,3}}{_ENDS}",
    "llama-bpe": rf"{_NUMBERS}{{1,3}}{_ENDS}",
    "tekken": rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}{_SLASHES}",
    "gpt-4o": rf"{_WORDS[0]}{_SHORT}?|{_WORDS[1]}{_SHORT}?|\p{{N}}{{1,3}}{_SLASHES}",
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # what is in the vocabulary is taken before any merge


def model_metadata(
    keys: Mapping[str, Any], architecture: str, name: str, file_type: str
) -> dict[str, Any]:
    """Keys of the model: `keys` are those of its architecture, without that before them (the
    families know them: models/gguf_keys.py); `file_type` is the type that most weights have."""
    return {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }


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
    kinds = {"BPE": _merged, "Unigram": _likeliest}
    if model.get("type") not in kinds:
        raise InputError(
            f"gguf: a tokenizer of type {model.get('type')!r} is not covered", hint=TWO_STEPS
        )
    tokens, types = _tokens(int(config["vocab_size"]), tokenizer)
    return {
        **kinds[model["type"]](tokenizer, tokens),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special(config, tokenizer, settings, tokens),
    }


def _merged(tokenizer: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Keys of a vocabulary with merges, of bytes (GPT-2's kind) or of pieces (SentencePiece's)."""
    model = tokenizer["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not model.get("byte_fallback"):
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(tokenizer),
            "tokenizer.ggml.merges": merges,
        }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": _scores(tokens, merges),
        "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer),
    }


def _likeliest(tokenizer: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Keys of a vocabulary of pieces with log-probabilities: of all ways to cut a text into them
    the likeliest is taken (llama.cpp's kind "t5")."""
    model = tokenizer["model"]
    normalizers = {n["type"]: n for n in _flat(tokenizer.get("normalizer"), "normalizers")}
    splits = [part["type"] for part in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    odd = set(normalizers) - {"Precompiled", "Replace"}
    if model.get("byte_fallback") or odd or splits != ["Metaspace"]:
        what = "falls back to bytes" if model.get("byte_fallback") else "normalizes or splits text"
        raise InputError(f"gguf: a Unigram that {what} is not covered so", hint=TWO_STEPS)
    own = dict(model["vocab"])
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.scores": [float(own.get(token, 0.0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer),
        "tokenizer.ggml.remove_extra_whitespaces": "Replace" in normalizers,
    }
    if charsmap := normalizers.get("Precompiled", {}).get("precompiled_charsmap"):
        keys["tokenizer.ggml.precompiled_charsmap"] = b64decode(charsmap)
    return keys


def _tokens(vocab_size: int, tokenizer: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and their types; ids without a token are unused ones."""
    model = tokenizer["model"]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    known = _vocabulary(model) | {text: token["id"] for text, token in added.items()}
    unknown = model.get("unk_id", known.get(str(model.get("unk_token"))))
    for text, number in known.items():
        if number >= vocab_size:
            raise InputError(
                f"tokenizer.json has token {number}, but vocab_size in config.json is {vocab_size}"
            )
        tokens[number] = text
        types[number] = NORMAL
        if number == unknown:
            types[number] = UNKNOWN
        elif text in added:
            types[number] = CONTROL if added[text].get("special") else USER
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            types[number] = BYTE
    return tokens, types


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the tokens of a model, which Unigram lists with their scores."""
    if isinstance(model["vocab"], Mapping):
        return dict(model["vocab"])
    return {text: number for number, (text, _) in enumerate(model["vocab"])}


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
    if plain and parts[-1:] and parts[-1].get("use_regex", True):
        if kinds == ["ByteLevel"] and not normalizers:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "command-r" if normalizers else "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        regex, whole = (parts[0].get("pattern") or {}).get("Regex"), _whole_words(tokenizer)
        known = [name for name, own in SPLITS.items() if own == regex]
        if known and parts[0].get("behavior") == "Isolated":
            return next((name for name in known if (name in WHOLE_WORDS) is whole), known[0])
    raise InputError(
        f"gguf: tokenizer.json splits text ({', '.join(kinds) or 'no pre-tokenizer'}) in a way that"
        " llama.cpp has no known name for",
        hint=TWO_STEPS,
    )


def _whole_words(tokenizer: Mapping[str, Any]) -> bool:
    return bool(tokenizer["model"].get("ignore_merges"))


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
    ends = dict(zip(("bos", "eos"), _template_ends(tokenizer), strict=True))
    for name, end in ends.items():
        stated, number = (
            settings.get(f"add_{name}_token"),
            result.get(f"tokenizer.ggml.{name}_token_id"),
        )
        added = end is not None and number is not None and end == tokens[number]
        result[f"tokenizer.ggml.add_{name}_token"] = added if stated is None else bool(stated)
    template = settings.get("chat_template")
    if isinstance(template, list):  # of several by name
        template = {own["name"]: own["template"] for own in template}.get("default")
    if isinstance(template, str):
        result["tokenizer.chat_template"] = template
    return result


def _template_ends(tokenizer: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that tokenizer.json puts right before a text, and behind it."""
    for part in _flat(tokenizer.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing" and part.get("single"):
            first, last = (part["single"][place].get("SpecialToken") or {} for place in (0, -1))
            return first.get("id"), last.get("id")
    return None, None
