"""What gptq makes of the text part of a model with images, loaded by transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.storage.folder import open_quantized
from tests.builders import ptq
from tests.interop.compare import compare
from tests.interop.tiny_models import write_models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]

NAME = "qwen2_5_vl"
WORDS = 240  # tokens behind these stand for images


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_models(folder, [NAME])
    return folder


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(3, WORDS, shape)


def loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def theirs(model: Any, tokens: Any, mask: Any) -> Any:
    import torch

    with torch.no_grad():
        given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        return model(**given).logits.float().numpy()


def kl(scores: Any, others: Any) -> float:
    """Mean KL divergence of the second from the first, nats a token."""
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (scores, others))
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def test_gptq_from_text_tokens_loads_and_beats_plain_rounding(models: Path, tmp_path: Path) -> None:
    source = models / NAME
    np.save(tmp_path / "tokens.npy", drawn(3, 64, 64))
    tokens, found = drawn(4, 8, 64), {}
    exact = theirs(loaded(source), tokens, np.ones_like(tokens))
    common = ("--bits", 4, "--group-size", 32, "--format", "compressed-tensors")
    for command in ("gptq", "rtn"):
        given = ("--tokens", tmp_path / "tokens.npy") if command == "gptq" else ()
        outcome = ptq(command, source, *common, *given, "-o", tmp_path / command)
        assert outcome.code == 0, outcome.err
        scores = theirs(loaded(tmp_path / command), tokens, np.ones_like(tokens))
        found[command] = kl(exact, scores)
    print(found)
    assert found["gptq"] < found["rtn"]
    result = compare({"name": "gptq", "float": str(source), "folder": str(tmp_path / "gptq")})
    assert (result["missing"], result["unexpected"]) == ([], [])
    layers = open_quantized(tmp_path / "gptq").layers
    assert len(layers) == 14
    assert not any("visual" in module for module in layers)
