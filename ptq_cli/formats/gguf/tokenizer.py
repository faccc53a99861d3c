"""tokenizer.json and tokenizer_config.json of a GGUF file: metadata.py's `tokenizer_metadata` the
other way, for vocabularies of bytes with merges (GPT-2's kind).

How text is split before merging has a name in the file. Names that are not known here, and
vocabularies of pieces (SentencePiece, WordPiece), have no documents: `unread` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptq_cli.formats.gguf.metadata import CONTROL, SPLITS, UNUSED, USER, WHOLE_WORDS

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _in_order(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _matches(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _in_order(split, {**_BYTES, "use_regex": False})


_DIGITS = _in_order({"type": "Digits", "individual_digits": True}, _BYTES)
_SPLITS = {  # llama.cpp's name → tokenizer.json's `pre_tokenizer`
    "gpt-2": _BYTES,
    "smollm": _DIGITS,
    "command-r": _DIGITS,
    **{name: _matches(regex) for name, regex in SPLITS.items()},
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_COMPOSED = ("qwen2", "command-r")  # text is in Unicode's form NFC
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def unread(metadata: Mapping[str, Any]) -> str | None:
    """Why a file's tokenizer is left out; None: it is not."""
    kind, split = metadata.get("tokenizer.ggml.model"), _split_name(metadata)
    if kind != "gpt2":
        return f"its kind is {kind!r}, not 'gpt2'"
    if split not in _SPLITS:
        return f"it splits text as {split!r} does, which is not known here"
    tokens, types, merges = (_list(metadata, key) for key in ("tokens", "token_type", "merges"))
    texts = all(isinstance(text, str) for text in (*tokens, *merges))
    if not tokens or not merges or len(tokens) != len(types) or not texts:
        return "its tokens, their types or its merges are missing or damaged"
    if len(set(tokens)) < len(tokens):
        return "a token stands twice"
    return None


def tokenizer_documents(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The two documents by their files' names; none where there is a reason for `unread`."""
    if unread(metadata) is not None:
        return {}
    tokens, types, merges = (_list(metadata, key) for key in ("tokens", "token_type", "merges"))
    added = [
        {
            "id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER)
    ]  # fmt: skip
    used = enumerate(zip(tokens, types, strict=True))
    split, special = _split_name(metadata), _special_tokens(metadata, tokens)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": split in WHOLE_WORDS,
        "vocab": {text: number for number, (text, kind) in used if kind != UNUSED},
        "merges": merges,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if split in _COMPOSED else None,
        "pre_tokenizer": _SPLITS[split],
        "post_processor": _post_processor(metadata, special, tokens),
        "decoder": {**_BYTES, "add_prefix_space": True},
        "model": model,
    }  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    settings["clean_up_tokenization_spaces"] = False
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    return found if isinstance(found, list) else []


def _split_name(metadata: Mapping[str, Any]) -> str:
    name = str(metadata.get("tokenizer.ggml.pre"))
    return _ALIASES.get(name, name)


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """`bos_token` and the like."""
    numbers = {own: metadata.get(f"tokenizer.ggml.{key}_token_id") for own, key in _SPECIAL.items()}
    return {
        f"{own}_token": tokens[number]
        for own, number in numbers.items()
        if isinstance(number, int) and 0 <= number < len(tokens)
    }


def _post_processor(
    metadata: Mapping[str, Any], special: Mapping[str, str], tokens: Sequence[str]
) -> dict[str, Any]:
    """What puts special tokens before and behind a text, or nothing."""
    usual = {"bos": _split_name(metadata) in WHOLE_WORDS, "eos": False}
    wanted = {name: metadata.get(f"tokenizer.ggml.add_{name}_token", usual[name]) for name in usual}
    ends = {name: special.get(f"{name}_token") for name in usual if wanted[name]}

    def wrapped(text: str, kind: int) -> list[dict[str, Any]]:
        place = [{"Sequence": {"id": text, "type_id": kind}}]
        first, last = (
            [{"SpecialToken": {"id": end, "type_id": kind}}] if (end := ends.get(name)) else []
            for name in usual
        )
        return [*first, *place, *last]

    added = [end for end in ends.values() if end]
    if not added:
        return {**_BYTES, "trim_offsets": False}
    return {
        "type": "TemplateProcessing",
        "single": wrapped("A", 0),
        "pair": [*wrapped("A", 0), *wrapped("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in added
        },
    }
