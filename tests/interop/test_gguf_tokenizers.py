"""Tokenizers of every kind that GGUF files hold, in llama.cpp: texts are cut as transformers cuts
them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ptq_cli.commands import api
from ptq_cli.formats.gguf.metadata import SPLITS, WHOLE_WORDS
from tests.builders import random_weight
from tests.cli.tiny_folders import WIDTH, dense_block, model_folder
from tests.interop import ggml

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("tokenizers", "transformers", "xllamacpp", "gguf"))),
        reason="needs the extra interop",
    ),
    pytest.mark.filterwarnings("ignore"),
]
ROOT = Path(__file__).parent.parent.parent
SPECIAL = ["<unk>", "<s>", "</s>"]
SIZE = 800
TEXTS = [
    "Hello world", "two  spaces   here ", "I'm you'RE they've 12345 67", "", "x",
    "tabs\tand\nnew\n\n\nlines  \n x", "def f(x):\n    return x + 1  # ünï", "a/b//c\r\n\r\n",
    "Ünïcödé straße été русский язык 日本語 中文 العربية 🙂", "one</s> <s> two <unk>three",
    "one</s><s>two<unk>three",
    "don't WON'T HelloWorld XMLHttp 3.14159 $%^&*()_+", "ａｂｃ ① ½", "\u00a0nbsp\u3000wide",
]  # fmt: skip
KINDS = [*SPLITS, "gpt-2", "smollm", "command-r", "llama", "gemma", "t5"]


def corpus() -> list[str]:
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:6]]
    return [*texts, *[text for text in TEXTS if "</s>" not in text] * 20]


def of_bytes(kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    found = Tokenizer(models.BPE(ignore_merges=kind in WHOLE_WORDS))
    if kind in SPLITS:
        first = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        own = level if kind == "gpt-2" else pre_tokenizers.Sequence([digits, level])
        found.pre_tokenizer = own
    if kind in ("qwen2", "command-r"):
        found.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(corpus(), trainer)
    return found


def of_pieces(kind: str) -> Any:
    """With merges, of pieces, as transformers makes them of SentencePiece's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    own = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=[*SPECIAL, *own], show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    found = Tokenizer(trained.model)
    found.add_special_tokens(SPECIAL)
    spaces = normalizers.Replace(" ", "▁")
    if kind == "llama":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        found.normalizer = spaces
        found.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return found


def of_likeliest_pieces() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    found = Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(corpus(), trainer)
    return found


def write_folder(folder: Path, kind: str) -> Any:
    """A tiny Llama with such a tokenizer; the tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if kind == "t5":
        own = of_likeliest_pieces()
    else:
        own = of_pieces(kind) if kind in ("llama", "gemma") else of_bytes(kind)
    own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tensors = dense_block("model.layers.0.")
    tensors["model.embed_tokens.weight"] = random_weight(SIZE, WIDTH)
    tensors["model.norm.weight"] = random_weight(WIDTH)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    model_folder(folder, "llama", tensors, num_hidden_layers=1, vocab_size=SIZE, **ends)
    found = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.save_pretrained(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_alike(kind: str, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tokenizer = write_folder(model, kind)
    api.rtn(model, bits=8, group_size=32, format="gguf", output=out)
    vocabulary = ggml.Vocabulary(out / "model.gguf")
    # llama.cpp puts a space before each piece of text, also where one is there.
    texts = [text for text in TEXTS if kind != "t5" or "> " not in text]
    for text in texts:
        wanted = tokenizer(text).input_ids
        assert vocabulary.tokens(text) == wanted, text
        assert wanted[0] == 1
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert vocabulary.tokens(text, special=False) == plain
    vocabulary.close()
