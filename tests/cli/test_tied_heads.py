"""Heads that are tied to the embedding: what is written says that a quantized one is not, and what
cannot be done is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq_cli.models.ties import ties
from tests.builders import ptq
from tests.cli.tiny_folders import dense_block, ends, llama, model_folder

HEAD = ("--include", "lm_head", "--group-size", 32)
TIED = {"tie_word_embeddings": True}


def config_of(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("form", ["compressed-tensors", "ptq", "mlx", "gptq"])
@pytest.mark.parametrize("seed", [1, 2])  # the head is the embedding, or another
@pytest.mark.parametrize(("kind", "config"), [("llama", TIED), ("gemma2", {}), ("strange", {})])
def test_a_quantized_head_is_said_not_to_be_tied(tmp_path, form, seed, kind, config):
    source = llama(tmp_path / "m", kind, seed, **config)
    outcome = ptq("pack", source, *HEAD, "--format", form, "-o", "out")
    assert outcome.code == 0, outcome.err
    assert config_of("out")["tie_word_embeddings"] is False
    if form == "ptq":
        assert ptq("pack", "out", "--format", "gptq", "-o", "again").code == 0
        assert config_of("again")["tie_word_embeddings"] is False


def test_the_text_model_says_so_too(tmp_path):
    text = {"model_type": "gemma3_text", **TIED}
    source = llama(tmp_path / "m", "gemma3", text_config=text)
    assert ptq("pack", source, *HEAD, "--format", "compressed-tensors", "-o", "out").code == 0
    config = config_of("out")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("options", [(), HEAD])
def test_a_config_that_was_right_stays_as_it_was(tmp_path, options):
    source = llama(tmp_path / "m", **({} if options else TIED))
    assert ptq("pack", source, *options, "-o", "out").code == 0
    assert (tmp_path / "m/config.json").read_bytes() == Path("out/config.json").read_bytes()


def test_an_embedding_quantized_beside_a_head_is_not_it_any_more(tmp_path):
    source = llama(tmp_path / "m", **TIED)
    options = ["--include", "embed_tokens", "--group-size", 32, "--format", "mlx"]
    assert ptq("pack", source, *options, "-o", "out").code == 0
    assert config_of("out")["tie_word_embeddings"] is False


def lone(path: Path, head: str | None, **config) -> Path:
    tensors = {**ends(head=head), **dense_block("model.layers.0.")}
    if head:
        del tensors["model.embed_tokens.weight"]
    return model_folder(path, "llama", tensors, **TIED, **config)


@pytest.mark.parametrize("form", ["compressed-tensors", "ptq", "mlx"])
def test_a_head_without_a_tensor_is_refused(tmp_path, form):
    outcome = ptq("pack", lone(tmp_path / "m", None), *HEAD, "--format", form, "-o", "out")
    assert (outcome.code, len(outcome.errors), Path("out").exists()) == (1, 1, False)
    for word in ("lm_head", "tied to model.embed_tokens.weight", "leave it out"):
        assert word in outcome.errors[0]


def test_the_embedding_of_both_can_be_quantized(tmp_path):
    source = lone(tmp_path / "m", None)
    options = ["--include", "model.embed_tokens", "--group-size", 32, "--format", "mlx"]
    assert ptq("pack", source, *options, "-o", "out").code == 0
    assert config_of("out")["tie_word_embeddings"] is True


def test_a_head_that_is_stored_for_both_is_refused(tmp_path):
    outcome = ptq("rtn", lone(tmp_path / "m", "lm_head"), *HEAD, "-o", "out")
    assert (outcome.code, Path("out").exists()) == (1, False)
    assert "is the embedding too" in outcome.err
    assert "leave lm_head out of --include" in outcome.err


def test_check_knows_a_head_that_is_tied(tmp_path):
    source = llama(tmp_path / "m", **TIED)
    assert ptq("pack", source, *HEAD, "--format", "compressed-tensors", "-o", "out").code == 0
    assert ptq("check", "out", "--runtime", "transformers").code == 0
    config = config_of("out") | TIED  # as this tool wrote it once
    Path("out/config.json").write_text(json.dumps(config))
    outcome = ptq("check", "out", "--runtime", "transformers")
    assert outcome.code == 3
    assert "lm_head: is quantized, but config.json ties it" in outcome.err


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("llama", False), ("qwen2", False), ("gemma", True), ("gemma2", True),
        ("gemma3_text", True), ("gemma3n_text", True), ("gpt2", True), ("opt", True),
        ("bloom", True), ("cohere", True),
        ("falcon", True), ("smollm3", True), ("starcoder2", True), ("gpt_neox", False),
    ],
)  # fmt: skip
def test_what_families_take_for_granted(kind, tied):
    assert ties({"model_type": kind}) is tied
    assert ties({"model_type": kind, "tie_word_embeddings": not tied}) is not tied


def test_predictions_are_of_the_head_that_is_stored(tmp_path):
    from ptq_cli.models.forward.architecture import read_architecture

    config = json.loads((llama(tmp_path / "m", **TIED) / "config.json").read_text())
    both = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert read_architecture(config, both).head == "lm_head.weight"
    assert read_architecture(config, both[:2]).head == "model.embed_tokens.weight"
