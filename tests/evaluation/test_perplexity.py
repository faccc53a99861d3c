"""Perplexity and its standard error, KL, and the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.from_tokens import model_architecture
from ptq_cli.commands import api
from ptq_cli.core.report import RunReport
from ptq_cli.errors import GateMissed
from ptq_cli.evaluation.perplexity import clustered_error, difference, quantized_tensors
from ptq_cli.models.forward import stages
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.report.gates import check_gates, gates_of
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings

SAMPLE = Path(__file__).parents[2] / "sample_data"
TOKENS = TokenSettings(tokens=SAMPLE / "eval_tokens.npy", nsamples=6, seq_len=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "out"
    api.pack(SAMPLE, bits=3, sym=False, output=out)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> RunReport:
    return api.evaluate(SAMPLE, folder, tokens=TOKENS, kl_per_block=True)


def log_probabilities(folder: Path | None, tokens: Any) -> Any:
    """float64 [n, length, vocabulary], one block after the other, everything in memory."""
    checkpoint = open_checkpoint(SAMPLE)
    read = checkpoint.read
    if folder is not None:
        read = quantized_tensors(checkpoint, open_quantized(folder))
    arch, packing = model_architecture(checkpoint), pack(tokens.shape)
    hidden = embed(arch, read, tokens, packing)
    for block in range(len(arch.blocks)):
        hidden = forward_block(arch, block, read, hidden, packing)
    scores = logits(arch, read, finish(arch, read, hidden)).astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores.reshape(*tokens.shape, -1)


def test_quality_is_what_the_whole_distributions_say(folder: Path, report: RunReport) -> None:
    from ptq_cli.storage.tokens import read_tokens

    tokens = read_tokens(TOKENS, open_checkpoint(SAMPLE)).ids
    exact, ours = log_probabilities(None, tokens), log_probabilities(folder, tokens)
    quality = report.quality
    assert quality is not None
    for name, scores in (("original", exact), ("quantized", ours), ("rtn", ours)):
        nll = -np.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=2)
        assert quality["perplexity"][name] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    kl = (np.exp(exact) * (exact - ours)).sum(axis=2)[:, :-1]
    assert quality["kl"]["quantized"]["mean"] == pytest.approx(kl.mean(), rel=1e-3)
    assert quality["kl"]["quantized"]["p99_9"] == pytest.approx(np.quantile(kl, 0.999), rel=1e-3)
    same = (exact.argmax(axis=2) == ours.argmax(axis=2))[:, :-1].mean()
    assert quality["same_top"]["quantized"] == pytest.approx(same, abs=0.01)
    assert quality["tokens"] == 6 * 63
    assert quality["quantized_minus_rtn"]["perplexity"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["dynamic-token", pytest.param("static", marks=pytest.mark.slow)]
)
def test_integer_inputs_are_part_of_what_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """W8A8: perplexity is that of the integer products that `load_linear` makes."""
    from ptq_cli.storage.tokens import read_tokens

    out = tmp_path / "out"
    api.smoothquant(SAMPLE, alpha=0.5, activation_scheme=scheme, activation_bits=4, output=out)
    quality = api.evaluate(SAMPLE, out, tokens=TOKENS).quality
    assert quality is not None
    layers = open_quantized(out).layers
    integer = {module: api.load_linear(out, module) for module in layers}
    plain = stages.layers.apply_linear

    def run(linear: Any, weights: Any, inputs: Any) -> Any:
        ours = integer.get(linear.name)
        return plain(linear, weights, inputs) if ours is None else ours(inputs)

    monkeypatch.setattr(stages.layers, "apply_linear", run)
    tokens = read_tokens(TOKENS, open_checkpoint(SAMPLE)).ids
    scores = log_probabilities(out, tokens)
    nll = -np.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=2)
    assert quality["perplexity"]["quantized"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    monkeypatch.undo()
    floats = log_probabilities(None, tokens)
    exact = np.exp(-np.take_along_axis(floats[:, :-1], tokens[:, 1:, None], axis=2).mean())
    assert quality["perplexity"]["quantized"] > 1.03 * exact


def test_each_block_alone_adds_less_than_all(report: RunReport) -> None:
    assert report.quality is not None
    blocks = report.quality["kl_per_block"]
    assert len(blocks) == 4
    assert 0 < max(blocks) < report.quality["kl"]["quantized"]["mean"]


def test_the_standard_error_is_that_of_drawing_sequences() -> None:
    random = np.random.default_rng(0)

    def draw() -> tuple[Any, Any, Any]:
        shared = random.standard_normal((200, 1))  # tokens of a sequence depend on each other
        theirs = 2 + 0.3 * shared + random.standard_normal((200, 20))
        ours = theirs + 0.1 + 0.1 * shared + 0.05 * random.standard_normal((200, 20))
        return ours.ravel(), theirs.ravel(), np.repeat(np.arange(200), 20)

    found = [difference(*draw()) for _ in range(300)]
    spread = np.std([entry["perplexity"] for entry in found])
    assert np.mean([entry["standard_error"] for entry in found]) == pytest.approx(spread, rel=0.15)


def test_one_sequence_has_no_standard_error() -> None:
    entry = difference(np.ones(3), np.zeros(3), np.zeros(3, int))
    assert entry["standard_error"] is None
    assert clustered_error(np.ones(3), np.zeros(3, int)) is None


def test_the_standard_error_of_a_mean_is_that_of_the_sequences_sums() -> None:
    values, sequence = np.array([1.0, 2.0, 6.0, 3.0, 3.0]), np.array([4, 4, 7, 9, 9])
    sums = [1.0 - 3 + 2 - 3, 6.0 - 3, 0.0]  # of what is above the mean, by sequence
    wanted = np.sqrt(sum(x * x for x in sums) * 3 / 2) / 5
    assert clustered_error(values, sequence) == pytest.approx(wanted)
    alone = clustered_error(values, np.arange(5))
    assert alone == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))


@pytest.mark.parametrize("gate", ["max_perplexity_increase", "max_kl"])
def test_gates(report: RunReport, gate: str) -> None:
    check_gates(gates_of(report, **{gate: 100.0}))  # type: ignore[arg-type]
    with pytest.raises(GateMissed, match="--" + gate.replace("_", "-")):
        check_gates(gates_of(report, **{gate: 1e-6}))  # type: ignore[arg-type]
