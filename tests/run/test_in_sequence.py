"""Statistics from tokens: of the float model, and of the model as it is rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.calibration.find import SourceSettings
from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.calibration.from_tokens import TokenSource, model_architecture
from ptq_cli.calibration.stream import Stream
from ptq_cli.calibration.streams import Streams
from ptq_cli.commands import api
from ptq_cli.commands.quantize import prepare
from ptq_cli.core.progress import Progress
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import begin, embed, stages
from ptq_cli.numerics.statistics import SiteAccumulator
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from tests.builders import ptq
from tests.stopping import TOLD, killed

SAMPLE = Path(__file__).parents[2] / "sample_data"
TOKENS = {"tokens": SAMPLE / "calibration_tokens.npy", "nsamples": 24, "seq_len": 48}
SETTINGS = TokenSettings(**TOKENS)  # type: ignore[arg-type]
FAST: dict[str, Any] = {"bits": 3, "sym": False, "refine": 0, "sweeps": 0, "mse": False}


def observed(read: Any, ids: Any, mask: Any = None, model: Path = SAMPLE) -> dict[str, Any]:
    """The inputs of every site, everything in one batch."""
    return watched(read, ids, mask, model)[0]


def watched(
    read: Any, ids: Any, mask: Any = None, model: Path = SAMPLE
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of every site, and the residual stream that its outputs will be added to."""
    arch = model_architecture(open_checkpoint(model))
    packing = pack(ids.shape, mask)
    hidden, inputs, streams = embed(arch, read, ids, packing), {}, {}
    for block in range(len(arch.blocks)):
        state = begin(arch, block, read, hidden)
        for stage in stages(arch, block, packing):
            inputs |= state.inputs
            streams |= dict.fromkeys(state.inputs, state.hidden)
            state = stage.apply(read, state)
        hidden = state.hidden
    return inputs, streams


def held_in(lengths: Any) -> Any:
    """The tokens of every eighth sequence, which are held out."""
    return np.repeat(np.arange(len(lengths)) % 8 == 7, lengths)


def accumulated(inputs: Any, held: Any) -> SiteStatistics:
    sums = SiteAccumulator(inputs.shape[1])
    sums.update(inputs, held)
    return sums.result("site", ("site",))


def same_bytes(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_calibration_sees_what_the_float_model_computes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SAMPLE)
    mask = np.ones((24, 48), np.uint8)
    mask[::3, 40:] = 0
    np.save(tmp_path / "mask.npy", mask)
    settings = TokenSettings(TOKENS["tokens"], seq_len=48, nsamples=24)  # type: ignore[arg-type]
    ids = read_tokens(settings, checkpoint).ids
    np.save(tmp_path / "ids.npy", ids)
    masked = TokenSettings(tmp_path / "ids.npy", mask=tmp_path / "mask.npy")
    out = tmp_path / "stats.safetensors"
    api.calibrate(SAMPLE, output=out, tokens=masked)
    statistics = open_calibration(out)
    for site, inputs in observed(checkpoint.read, ids, mask.astype(bool)).items():
        held = held_in(mask.sum(axis=1).tolist())
        found, wanted = statistics.load(site), accumulated(inputs, held)
        assert found.n_tokens == wanted.n_tokens
        np.testing.assert_allclose(found.hessian, wanted.hessian, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.heldout, wanted.heldout, rtol=1e-3, atol=1e-4)
        assert found.linears[0] == site


def seen_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, SiteStatistics]:
    """The statistics of each site that a run in sequence makes, in that order."""
    seen: dict[str, SiteStatistics] = {}
    load = Streams.statistics

    def spy(self: Streams, site: str) -> SiteStatistics:
        seen[site] = load(self, site)
        return seen[site]

    monkeypatch.setattr(Streams, "statistics", spy)
    return seen


def test_each_site_sees_what_the_rounded_layers_before_it_produce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by(monkeypatch)
    api.gptq(SAMPLE, output=tmp_path / "out", **TOKENS, **FAST)
    checkpoint = open_checkpoint(SAMPLE)
    ids = read_tokens(SETTINGS, checkpoint).ids
    rounded = quantized_tensors(checkpoint, open_quantized(tmp_path / "out"))
    (exact, exact_streams), (ours, streams) = watched(checkpoint.read, ids), watched(rounded, ids)
    assert list(seen) == list(exact)
    held = held_in([ids.shape[1]] * len(ids))
    for site, inputs in ours.items():
        hessian, kept = accumulated(inputs, held).hessian, inputs[~held]
        found, adds = seen[site].drift, site.endswith(("o_proj", "down_proj"))
        missing, moved = exact_streams[site] - streams[site], (exact[site] - inputs)[~held]
        if adds:
            weight = checkpoint.read(f"{site}.weight").astype(np.float32)
            lacking = missing[~held] + moved @ weight.T
        assert found is not None
        for value, wanted in (
            (seen[site].hessian, hessian),
            (seen[site].heldout, inputs[held]),
            (found.inputs, None if adds else moved.T @ kept / len(kept)),
            (found.heldout, exact[site][held]),
            (found.outputs, lacking.T @ kept / len(kept) if adds else None),
            (found.heldout_stream, missing[held] if adds else None),
        ):
            if wanted is None:
                assert value is None
            else:
                np.testing.assert_allclose(value, wanted, rtol=1e-2, atol=1e-3)
    first = seen["model.layers.0.self_attn.q_proj"].drift
    assert first is not None
    assert first.inputs is not None
    assert not first.inputs.any()


def test_parallel_layers_is_calibrate_then_gptq(tmp_path: Path) -> None:
    api.gptq(SAMPLE, output=tmp_path / "a", parallel_layers=True, **TOKENS, **FAST)
    api.calibrate(SAMPLE, output=tmp_path / "stats.safetensors", tokens=SETTINGS)
    calibration = tmp_path / "stats.safetensors"
    api.gptq(SAMPLE, output=tmp_path / "b", calibration=calibration, **FAST)
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def test_strength_zero_needs_no_float_stream(tmp_path: Path) -> None:
    source = SourceSettings(tokens=SETTINGS)
    job = prepare("gptq", SAMPLE, {"drift": 0.0}, source=source, output=tmp_path / "out")
    assert isinstance(job.source, TokenSource)
    assert not job.source.drifts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    api.gptq(SAMPLE, output=out, **TOKENS, **FAST)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "memory"),
    [
        *((10, "1KiB"), (10, "1GiB")),
        pytest.param(1, "1KiB", marks=pytest.mark.slow),
        pytest.param(7, "1GiB", marks=pytest.mark.slow),
        pytest.param(27, "1GiB", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    tmp_path: Path, whole: Path, after: int, memory: str
) -> None:
    """With states in files, or in memory; and in memory from then on."""

    def stop(progress: Progress) -> None:
        if progress.done == after:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        api.gptq(SAMPLE, output=out, listen=stop, max_memory=memory, **TOKENS, **FAST)
    assert not out.exists()
    found = {path.name for path in (tmp_path / "out.partial" / "stream").iterdir()}
    states = {"float.now", "rounded.now"}
    assert found & states == (states if memory == "1KiB" else set())
    boundaries = {name for name in found - states if not name.endswith(".next")}
    assert len(boundaries) == 2  # before the block in hand, of either model
    api.gptq(SAMPLE, output=out, **TOKENS, **FAST)
    assert same_bytes(out, whole)


def test_a_finished_block_is_not_entered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 16:  # two sites into block 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.gptq(SAMPLE, output=tmp_path / "out", listen=stop, **TOKENS, **FAST)
    entered: list[int] = []
    enter = Stream.enter
    monkeypatch.setattr(
        Stream, "enter", lambda self, block: (entered.append(block), enter(self, block))
    )
    api.gptq(SAMPLE, output=tmp_path / "out", **TOKENS, **FAST)
    assert min(entered) == 2


def test_a_boundary_that_a_power_loss_damaged_is_made_anew(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.gptq(SAMPLE, output=tmp_path / "out", listen=stop, **TOKENS, **FAST)
    path = tmp_path / "out.partial" / "stream" / "rounded.2"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes(len(content) - 5000))
    entered: list[int] = []
    enter = Stream.enter
    monkeypatch.setattr(
        Stream, "enter", lambda self, block: (entered.append(block), enter(self, block))
    )
    api.gptq(SAMPLE, output=tmp_path / "out", **TOKENS, **FAST)
    assert entered == [0, 0]
    assert same_bytes(tmp_path / "out", whole)


@pytest.mark.slow
def test_bytes_do_not_depend_on_threads(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq_cli.calibration.from_tokens.BATCH_TOKENS", 256)
    for n in (1, 3):
        monkeypatch.setattr(TokenSource, "n_threads", lambda *_, n=n: n)
        api.gptq(SAMPLE, output=tmp_path / f"{n}", **TOKENS, **FAST)
    assert same_bytes(tmp_path / "1", tmp_path / "3")


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 13, 28])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, whole: Path, number: int) -> None:
    out = tmp_path / "out"
    words = ["--bits", "3", "--asym", "--refine", "0", "--sweeps", "0", "--no-mse"]
    words += ["--tokens", str(TOKENS["tokens"]), "--nsamples", "24", "--seq-len", "48"]
    words = ["gptq", str(SAMPLE), *words, "-o", str(out)]
    killed(TOLD, number, *words)
    assert ptq(*words).code == 0
    assert same_bytes(out, whole)


def moe_folder(folder: Path) -> Path:
    """A random mixture of four experts in two blocks; expert 3 of block 0 is never chosen."""
    config = {
        "model_type": "mixtral", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "sliding_window": None,
    }  # fmt: skip
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 32),
        "lm_head.weight": (40, 32),
        "model.norm.weight": (32,),
    }  # fmt: skip
    for block in range(2):
        base = f"model.layers.{block}."
        shapes |= {
            base + f"self_attn.{n}_proj.weight": (16 if n in "kv" else 32, 32) for n in "qkvo"
        }
        shapes |= {base + f"{n}_layernorm.weight": (32,) for n in ("input", "post_attention")}
        moe = base + "block_sparse_moe."
        shapes[moe + "gate.weight"] = (4, 32)
        for expert in range(4):
            for name, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32))):
                shapes[f"{moe}experts.{expert}.{name}.weight"] = shape
    tensors = {
        name: (random.standard_normal(shape) / 5).astype(np.float32) if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }  # fmt: skip
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    router[2:] = [router[0], -router[0] - router[1]]  # the last is best only where both are bad
    router[2] *= 2
    router[3] = 0
    router[:3] = np.abs(router[:3])
    tensors["model.embed_tokens.weight"] = np.abs(tensors["model.embed_tokens.weight"]) + 1
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    np.save(folder / "tokens.npy", random.integers(0, 40, (16, 12)))
    return folder


def test_experts_without_tokens_are_named(tmp_path: Path) -> None:
    model = moe_folder(tmp_path / "moe")
    lonely = "model.layers.0.block_sparse_moe.experts.3.w1"
    settings, none = TokenSettings(model / "tokens.npy"), {"min_expert_tokens": 0}
    result = api.calibrate(model, output=tmp_path / "stats.safetensors", tokens=settings, **none)
    assert any("experts.{1,3}.w" in warning for warning in result["warnings"])
    assert lonely not in result["sites"]
    where = {"tokens": model / "tokens.npy", "output": tmp_path / "out"}
    report = api.gptq(model, **where, **none, ignore=("gate",), group_size=16)
    rows = {row.module: row for row in report.rows}
    assert rows[lonely].fallback == "no token reaches it"
    assert rows[lonely.replace("w1", "w2")].fallback == "no token reaches it"
    few = [row for row in report.rows if any("fewer than" in note for note in row.notes)]
    assert not rows["model.layers.0.block_sparse_moe.experts.0.w1"].fallback
    assert all("experts" in row.module for row in few)


def test_experts_with_few_tokens_share_those_of_all_and_say_so(tmp_path: Path) -> None:
    """Every token goes to two of the experts: all of their inputs together are the router's."""
    model, file = moe_folder(tmp_path / "moe"), tmp_path / "stats.safetensors"
    tensors, random = load_file(model / "model.safetensors"), np.random.default_rng(6)
    for name in ("model.embed_tokens", "model.layers.1.block_sparse_moe.gate"):
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = random.standard_normal(weight.shape).astype(np.float32)
    save_file(tensors, model / "model.safetensors")
    np.save(model / "tokens.npy", np.load(model / "tokens.npy")[:4])
    settings = TokenSettings(model / "tokens.npy")
    every = {"heldout_every": 0, "min_expert_tokens": 32}
    sites = api.calibrate(model, output=file, tokens=settings, **every)["sites"]
    base = "model.layers.1.block_sparse_moe."
    shared = {site: own for site, own in sites.items() if "own_tokens" in own}
    few = [site for site in shared if site.startswith(base) and site.endswith("w1")]
    assert few
    assert not any("own_tokens" in own for site, own in sites.items() if "experts" not in site)
    found, router = open_calibration(file), open_calibration(file).load(f"{base}gate")
    for site in few:
        assert 0 < shared[site]["own_tokens"] < 32
        assert shared[site]["n_tokens"] == 2 * router.n_tokens
        np.testing.assert_allclose(found.load(site).hessian, router.hessian, rtol=1e-5, atol=1e-6)
    report = api.gptq(model, calibration=file, output=tmp_path / "out", bits=8, group_size=16)
    rows = {row.module: row for row in report.rows}
    said = [note for note in rows[few[0]].notes if "shares the statistics of all experts" in note]
    assert said[0].startswith(f"{shared[few[0]]['own_tokens']} tokens reach it, too few")


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SAMPLE, model, ignore=shutil.ignore_patterns("activations"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(InputError, match=r"'mamba'.*known are .*llama.*\n.*--activations"):
        api.gptq(model, tokens=model / "calibration_tokens.npy", output=tmp_path / "out")
    (model / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json.*\n.*--activations"):
        api.calibrate(model, tokens=TokenSettings(model / "calibration_tokens.npy"))


def test_tokens_exclude_other_statistics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude"):
        api.gptq(SAMPLE, activations=[SAMPLE / "activations"], output=tmp_path / "out", **TOKENS)


@pytest.mark.slow(12)
@pytest.mark.parametrize(("bits", "part"), [(3, 0.80), (2, 0.50)])
def test_perplexity_rises_less_than_after_the_fields_algorithm(
    tmp_path: Path, bits: int, part: float
) -> None:
    """The project's target on its sample: asymmetric, groups of 128, all tokens."""
    calibration, grid = SAMPLE / "calibration_tokens.npy", {"bits": bits, "sym": False}
    paper: dict[str, Any] = {"refine": 0, "sweeps": 0, "mse": False, "drift": 0.0}
    rises = []
    for name, settings in (("ours", {}), ("field", paper)):
        out = tmp_path / name
        api.gptq(SAMPLE, tokens=calibration, output=out, **grid, **settings)
        report = api.evaluate(SAMPLE, out, tokens=TokenSettings(SAMPLE / "eval_tokens.npy"))
        assert report.quality is not None
        rises.append(report.quality["increase"]["quantized"]["perplexity"])
    assert rises[0] <= part * rises[1]
