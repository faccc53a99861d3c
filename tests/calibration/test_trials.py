"""What changed tensors do to the predictions: versions side by side against whole models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration import trials
from ptq_cli.calibration.from_tokens import TokenSource, token_source
from ptq_cli.calibration.trials import LOST, Trials
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.likelihood import Prediction, measure_tokens
from ptq_cli.models.forward.stages import embed, finish, forward_block
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from tests.run.tiny_families import tiny_model
from tests.run.tiny_llama import tiny_llama

Q0, V1 = (f"model.layers.{block}.self_attn.{x}_proj.weight" for block, x in enumerate("qv"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALL = 1 << 20


def tokens_of(model: Path, ids: Any = None, mask: Any = None, path: Any = None) -> TokenSource:
    """The model on tokens, those beside it where none are given."""
    checkpoint, file, ends = open_checkpoint(model), path or model / "tokens.npy", None
    if ids is not None:
        np.save(file, ids)
    if mask is not None:
        np.save(ends := model / "mask.npy", mask)
    return token_source(checkpoint, read_tokens(TokenSettings(file, mask=ends), checkpoint), (0, 0))


def changes(source: TokenSource, *names: str, scale: float = 0.05) -> dict[str, Callable[[], Any]]:
    """Tensors with noise, by name."""

    def noisy(name: str) -> Any:
        weight = np.asarray(source.checkpoint.read(name))
        random = np.random.default_rng(len(name))
        return (weight + scale * random.standard_normal(weight.shape)).astype(np.float32)

    return {name: lambda name=name: noisy(name) for name in names}  # type: ignore[misc]


def predictions(source: TokenSource, ids: Any, mask: Any, changed: Mapping[str, Any]) -> Prediction:
    """Of a whole model, all tensors in float32."""
    arch, packing = source.arch, pack(ids.shape, mask)

    def read(name: str) -> Any:
        return changed[name]() if name in changed else source.checkpoint.read(name)

    def weights(name: str) -> Any:
        return np.asarray(read(name)).astype(np.float32)

    hidden = embed(arch, weights, ids, packing)
    for block in range(len(arch.blocks)):
        hidden = forward_block(arch, block, weights, hidden, packing)
    return Prediction(arch, weights, finish(arch, weights, hidden))


def whole_models(source: TokenSource, trials: Mapping[Any, Any], ids: Any, mask: Any = None) -> Any:
    """The slow twin: every version from its tokens to its predictions."""
    exact = predictions(source, ids, mask, {})
    found = {}
    for key, changed in trials.items():
        model = predictions(source, ids, mask, changed)
        nothing = np.zeros(len(exact.finished), np.int64)
        found[key] = float(measure_tokens(model, nothing, exact).kl.mean())
    return found


def tried(source: TokenSource, trials: Mapping[Any, Any], n_tokens: int = ALL) -> Any:
    """All in one wave. trials: by block (-1: embeddings) and name"""
    run = Trials(source, n_tokens, 2)
    run.embed({key: own for key, own in trials.items() if key[0] == "-1"})
    for block in range(len(source.arch.blocks) + 1):
        run.advance({key: own for key, own in trials.items() if key[0] == str(block)})
    return run.divergences()


def trials_of(source: TokenSource, head: str = HEAD) -> dict[tuple[str, str], Any]:
    n_blocks = len(source.arch.blocks)
    return {
        ("-1", "embedding"): changes(source, EMBEDDING),
        ("0", "query"): changes(source, Q0),
        ("1", "value"): changes(source, V1, scale=0.2),
        (str(n_blocks), "head"): changes(source, head),
    }


def test_a_trial_is_the_model_with_these_tensors(tmp_path: Path) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    own = trials_of(source)
    found = tried(source, own)
    wanted = whole_models(source, own, np.load(tmp_path / "m" / "tokens.npy"))
    assert found == {key: pytest.approx(kl, rel=1e-3, abs=1e-6) for key, kl in wanted.items()}
    assert min(found.values()) > 1e-4


def test_a_tied_embedding_is_the_head_too(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != HEAD}, model / "model.safetensors")
    source = tokens_of(model)
    own = {("-1", "both"): changes(source, EMBEDDING)}
    wanted = whole_models(source, own, np.load(model / "tokens.npy"))
    assert tried(source, own) == {("-1", "both"): pytest.approx(wanted["-1", "both"], rel=1e-3)}


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_changed_together(tmp_path: Path, kind: str) -> None:
    source = tokens_of(tiny_model(tmp_path / "m", kind))
    linears = [x for place in source.places.values() if place.expert for x in place.linears]
    names = [f"{x}.weight" for x in linears if x.startswith("model.layers.1.")]
    own = {("1", "experts"): changes(source, *names, scale=0.2)}
    (wanted,) = whole_models(source, own, np.load(tmp_path / "m" / "tokens.npy")).values()
    assert wanted > 1e-3
    assert tried(source, own)["1", "experts"] == pytest.approx(wanted, rel=1e-3)


def test_waves_change_no_number(tmp_path: Path) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    own = trials_of(source)
    alone: dict[Any, float] = {}
    run = Trials(source, ALL, 1)
    for block in range(-1, len(source.arch.blocks) + 1):
        some = {key: changed for key, changed in own.items() if key[0] == str(block)}
        run.embed(some) if block < 0 else run.advance(some)
        assert run.nbytes == len(some) * run.state_bytes
        alone |= run.divergences()
        assert run.nbytes == 0
    assert alone == tried(source, own)


def test_what_was_changed_is_dropped_behind_its_block(tmp_path: Path) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    run, kept = Trials(source, ALL, 1), {}
    for name in (EMBEDDING, Q0, HEAD):
        (own,) = changes(source, name).values()
        kept[name] = weakref.ref(own)
        if name == EMBEDDING:
            run.embed({("", name): {name: own}})
        else:
            run.advance({("", name): {name: own}})
        del own
    gc.collect()
    assert [name for name, own in kept.items() if own() is not None] == [HEAD]
    assert len(run.divergences()) == 3


@pytest.mark.parametrize("length", [12, 16, 20])
def test_sequences_are_cut_and_evenly_spaced(tmp_path: Path, length: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(trials, "LENGTH", 16)
    ids = np.random.default_rng(1).integers(0, 40, (10, length))
    source = tokens_of(tiny_llama(tmp_path / "m"), ids)
    cut = min(length, 16)
    run = Trials(source, 3 * cut + 1, 1)
    assert run.n_tokens == 3 * cut
    assert run.tokens.tolist() == ids[[0, 3, 6], :cut].tolist()
    own = {("0", "query"): changes(source, Q0)}
    (wanted,) = whole_models(source, own, ids[[0, 3, 6], :cut]).values()
    assert tried(source, own, 3 * cut + 1)["0", "query"] == pytest.approx(wanted, rel=1e-3)


def test_fewer_tokens_than_a_sequence_are_one(tmp_path: Path) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    assert Trials(source, 1, 1).n_tokens == 12
    assert Trials(source, ALL, 1).n_tokens == 16 * 12


def test_padding_is_no_token(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trials, "LENGTH", 16)
    ids = np.random.default_rng(2).integers(0, 40, (6, 20))
    mask = np.ones(ids.shape, np.uint8)
    mask[0, :11] = 0  # padded on the left
    mask[1, 5:] = 0
    mask[2, 18:] = 0
    source = tokens_of(tiny_llama(tmp_path / "m"), ids, mask)
    assert Trials(source, ALL, 1).n_tokens == 9 + 5 + 4 * 16
    cut, kept = ids[:, :16].copy(), mask[:, :16].copy()
    cut[0], kept[0] = ids[0, 4:], mask[0, 4:]
    own = trials_of(source)
    wanted = whole_models(source, own, cut, kept.astype(bool))
    found = tried(source, own)
    assert found == {key: pytest.approx(kl, rel=1e-3, abs=1e-6) for key, kl in wanted.items()}


def test_what_breaks_the_predictions_is_a_number(tmp_path: Path, monkeypatch: Any) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    run = Trials(source, ALL, 1)
    run.advance({("0", name): changes(source, Q0) for name in "abc"})
    broken = np.array([np.inf, np.nan, 0.5])
    monkeypatch.setattr(trials, "divergences", lambda exact, models: broken)
    assert [*run.divergences().values()] == [LOST, LOST, 0.5]


def test_what_later_layers_make_up_for_costs_less(tmp_path: Path) -> None:
    source = tokens_of(tiny_llama(tmp_path / "m"))
    key, name, found = ("0", "larger"), "model.layers.0.mlp.down_proj.weight", {}
    larger = {name: lambda: 1.5 * np.asarray(source.checkpoint.read(name)).astype(np.float32)}
    for corrected in ((), (key,)):
        run = Trials(source, ALL, 1)
        run.advance({key: larger}, corrected)
        found[corrected] = run.divergences()[key]
    assert 0 < found[key,] < 0.8 * found[()]
