"""The Fisher information of the head in the residual stream, against one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import head_fisher as made
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.head_fisher import has_head_fisher, head_fisher
from tests.models.test_forward import LLAMA, random_weights

RANDOM = np.random.default_rng(5)
OPT = {**LLAMA, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}


@pytest.mark.parametrize("config", [LLAMA, OPT])
def test_it_is_the_mean_over_tokens_of_the_curvature(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = {"TOKENS_AT_ONCE": 7, "VOCABULARY": 11, "IDS_IN_PIECE": 3}
    for name, size in (pieces | {"TOKENS_IN_PIECE": 2, "COLUMNS_IN_PIECE": 5}).items():
        monkeypatch.setattr(made, name, size)
    arch = read_architecture(config)
    weights = random_weights(arch)
    hidden = RANDOM.standard_normal((20, arch.hidden_size)).astype(np.float32) * 3
    norm = arch.final_norm
    assert norm is not None
    for name in ("weight", "bias"):
        weights[f"{norm.name}.{name}"] = 1 + RANDOM.standard_normal(arch.hidden_size) / 9
    gain, table = weights[f"{norm.name}.weight"], weights[arch.head].astype(np.float64)
    expected = np.zeros((arch.hidden_size,) * 2)
    centre = np.eye(arch.hidden_size) - norm.centred / arch.hidden_size
    for row in hidden.astype(np.float64):
        row = centre @ row
        rms = np.sqrt((row**2).mean() + norm.eps)
        scores = table @ (row / rms * gain + weights.get(f"{norm.name}.bias", 0) * norm.centred)
        share = np.exp(scores - scores.max())
        share /= share.sum()
        slope = table @ np.diag(gain) @ centre / rms  # of the scores, by the stream
        expected += slope.T @ (np.diag(share) - np.outer(share, share)) @ slope / len(hidden)
    found = head_fisher(arch, weights, hidden)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_it_predicts_how_far_predictions_move() -> None:
    """KL ≈ ½ δᵀ F δ for small changes across the stream."""
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    hidden = RANDOM.standard_normal((1, arch.hidden_size)).astype(np.float32)
    change = RANDOM.standard_normal(arch.hidden_size) * 1e-3
    change -= hidden[0] * (change @ hidden[0]) / (hidden[0] @ hidden[0])  # the norm takes it out

    def log_shares(stream: Any) -> Any:
        stream = stream.astype(np.float64)
        assert arch.final_norm is not None
        row = stream / np.sqrt((stream**2).mean() + arch.final_norm.eps)
        scores = weights[arch.head] @ (row * weights[f"{arch.final_norm.name}.weight"])
        return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())

    before, after = log_shares(hidden[0]), log_shares(hidden[0] + change)
    moved = (np.exp(before) * (before - after)).sum()
    fisher = head_fisher(arch, weights, hidden).astype(np.float64)
    assert moved == pytest.approx(change @ fisher @ change / 2, rel=0.02)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (LLAMA, True),
        (OPT, True),
        ({**LLAMA, "model_type": "gemma2"}, False),  # its scores are capped
        ({**OPT, "do_layer_norm_before": False}, False),
    ],
)
def test_heads_that_are_something_else_have_none(config: dict[str, Any], known: bool) -> None:
    arch = read_architecture(config)
    names = {arch.head, "model.norm.weight", "model.decoder.final_layer_norm.weight"}
    assert has_head_fisher(arch, names) == known
    assert not has_head_fisher(arch, names - {arch.head})
    assert not has_head_fisher(arch, {arch.head})
