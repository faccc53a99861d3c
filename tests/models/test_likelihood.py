"""Likelihoods in pieces against whole rows in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import likelihood, stages
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack

RANDOM = np.random.default_rng(7)
LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
HOLES = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 1, 1]])


def random_array(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_likelihoods_in_pieces_equal_those_of_whole_rows(scale: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(likelihood, "VOCABULARY", 7)
    monkeypatch.setattr(likelihood, "LOGITS", 7 * 4)
    arch = read_architecture(LLAMA)
    weights = {arch.head: random_array(50, 32, scale=0.2)}
    finished, other = random_array(11, 32, scale=scale), random_array(11, 32)
    targets = RANDOM.integers(0, 50, 11)
    model = likelihood.Prediction(arch, weights, finished)
    base = likelihood.Prediction(arch, weights, finished + other * 0.1)
    found = likelihood.measure_tokens(model, targets, base)

    def log_softmax(prediction: likelihood.Prediction) -> Any:
        scores = stages.logits(arch, weights, prediction.finished).astype(float)
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    own, wanted = log_softmax(model), log_softmax(base)
    np.testing.assert_allclose(found.nll, -own[np.arange(11), targets], atol=1e-5 * scale)
    np.testing.assert_allclose(found.reference_nll, -wanted[np.arange(11), targets], atol=1e-4)
    kl = (np.exp(wanted) * (wanted - own)).sum(axis=1)
    np.testing.assert_allclose(found.kl, kl, atol=1e-6 * scale)
    np.testing.assert_array_equal(found.top, own.argmax(axis=1))
    assert found.same_top == np.mean(own.argmax(1) == wanted.argmax(1))
    assert likelihood.measure_tokens(model, targets, model).kl.max() == 0


# ---- several versions of a model ----


def prediction(finished: Any, head: Any = None) -> likelihood.Prediction:
    arch = read_architecture(LLAMA)
    weights = {arch.head: random_array(50, 32, scale=0.2) if head is None else head}
    return likelihood.Prediction(arch, weights, finished)


def exact_divergence(reference: likelihood.Prediction, model: likelihood.Prediction) -> float:
    """KL in float64, from whole rows of float32 logits."""
    own, wanted = (
        stages.logits(x.arch, x.weights, x.finished).astype(np.longdouble)
        for x in (model, reference)
    )
    own, wanted = (x - np.logaddexp.reduce(x, axis=1)[:, None] for x in (own, wanted))
    return float((np.exp(wanted) * (wanted - own)).sum(axis=1).mean())


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 100.0])
def test_divergences_in_pieces_equal_those_of_whole_rows(scale: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(likelihood, "VOCABULARY", 7)
    monkeypatch.setattr(likelihood, "LOGITS", 7 * 4)
    head, finished = random_array(50, 32, scale=0.2), random_array(11, 32)
    reference = prediction(finished, head)
    others = [
        prediction(finished + random_array(11, 32, scale=scale), head),
        prediction(finished, head + random_array(50, 32, scale=0.2 * scale)),
    ]
    found = likelihood.divergences(reference, [*others, reference])
    wanted = [exact_divergence(reference, other) for other in others]
    np.testing.assert_allclose(found[:2], wanted, rtol=2e-4)
    assert found[2] == 0
    targets = np.zeros(11, np.int64)
    for own, other in zip(found, others, strict=False):
        measured = likelihood.measure_tokens(other, targets, reference).kl.mean()
        np.testing.assert_allclose(own, measured, rtol=1e-3, atol=2e-6)


def test_a_version_whose_predictions_are_lost_diverges_without_bounds() -> None:
    reference, other = prediction(random_array(11, 32)), prediction(random_array(11, 32))
    found = likelihood.divergences(reference, [prediction(random_array(11, 32, scale=1e4))])
    assert found[0] > 700
    other.finished[3] = np.nan
    assert np.isnan(likelihood.divergences(reference, [other])[0])


def test_versions_do_not_depend_on_one_another() -> None:
    head, finished = random_array(50, 32, scale=0.2), random_array(11, 32)
    reference = prediction(finished, head)
    others = [prediction(random_array(11, 32), head) for _ in range(3)]
    alone = [likelihood.divergences(reference, [other])[0] for other in others]
    assert likelihood.divergences(reference, others).tolist() == alone
    assert likelihood.divergences(reference, []).tolist() == []


def test_next_tokens_stay_within_their_sequence() -> None:
    tokens = np.arange(27).reshape(3, 9)
    rows, targets = likelihood.next_tokens(tokens, pack(HOLES.shape, HOLES))
    own = pack(HOLES.shape, HOLES).flat(tokens)[rows]
    pairs = dict(zip(own.tolist(), targets.tolist(), strict=True))
    row0 = {i: i + 1 for i in range(8)}
    row1 = {11: 12, 12: 13, 13: 14, 14: 15}
    row2 = {18: 19, 19: 21, 21: 22, 22: 25, 25: 26}
    assert pairs == row0 | row1 | row2


def test_the_sample_model_predicts_its_own_language() -> None:
    import json

    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors import safe_open

    folder = Path(__file__).parents[2] / "sample_data"
    with safe_open(folder / "model.safetensors", framework="np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arch = read_architecture(json.loads((folder / "config.json").read_text()), weights)
    tokens = np.load(folder / "eval_tokens.npy")[:4, :96].astype(np.int64)
    packing = pack(tokens.shape)
    hidden = stages.embed(arch, weights, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = stages.forward_block(arch, index, weights, hidden, packing)
    rows, targets = likelihood.next_tokens(tokens, packing)
    finished = stages.finish(arch, weights, hidden)[rows]
    model = likelihood.Prediction(arch, weights, finished)
    nll = likelihood.measure_tokens(model, targets, model).nll
    assert nll.mean() < 0.6 * math.log(arch.vocab_size)
