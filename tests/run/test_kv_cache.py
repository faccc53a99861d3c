"""`--kv-cache fp8`: scales from what the forward of the rounded model caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ptq_cli.calibration.from_tokens import model_architecture
from ptq_cli.commands import api
from ptq_cli.core.progress import Progress
from ptq_cli.evaluation.kv_cache import stored_caches
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, forward_block
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq
from tests.run.test_in_sequence import held_in, same_bytes
from tests.run.tiny_llama import tiny_llama
from tests.stopping import STAGED, killed

ATTENTION = "model.layers.{}.self_attn"
WORDS = ["--bits", "4", "--group-size", "16", "--format", "compressed-tensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "model")


def quantize(command: str, model: Path, out: Path, *options: object) -> dict[str, Any]:
    """The report of a run that rounds the cache, too."""
    words = [command, model, "--tokens", model / "tokens.npy", *WORDS, *options, "-o", out]
    outcome = ptq(*words, "--json")
    assert outcome.code == 0, outcome.err
    document: dict[str, Any] = outcome.document
    return document


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders and reports, by the setting."""
    folder = tmp_path_factory.mktemp("made")
    return {
        kind: (folder / kind, quantize("gptq", model, folder / kind, "--kv-cache", kind))
        for kind in ("fp8", "fp8-head")
    }


def slow_keys(inputs: Any, weight: Any, positions: Any) -> Any:
    """Keys [n, 2, 8] by the formula: pairs (d, d + 4) turn by `position · 100^(−d / 4)`."""
    heads = (inputs.astype(np.float64) @ weight.T).reshape(-1, 2, 8)
    keys = heads.copy()
    for row, position in enumerate(positions):
        for pair in range(4):
            turn = np.exp(1j * position * 100.0 ** (-pair / 4))
            turned = (heads[row, :, pair] + 1j * heads[row, :, pair + 4]) * turn
            keys[row, :, pair], keys[row, :, pair + 4] = turned.real, turned.imag
    return keys


def seen(model: Path, folder: Path | None) -> dict[int, list[tuple[Any, Any, Any, Any]]]:
    """Of each block: the inputs of its attention, and what it caches before that is rounded; all
    tokens at once. folder: of the rounded model, else it is the float one"""
    checkpoint, ids = open_checkpoint(model), np.load(model / "tokens.npy")
    arch, packing = model_architecture(checkpoint), pack(ids.shape)
    read, caches, found = checkpoint.read, {}, {}
    if folder is not None:
        quantized = open_quantized(folder)
        read = quantized_tensors(checkpoint, quantized)
        caches = stored_caches([attention.module for attention in arch.attentions], quantized)
    hidden = embed(arch, read, ids, packing)
    for block in range(len(arch.blocks)):
        inputs: dict[str, Any] = {}
        kept: list[Any] = []

        def cache(keys: Any, values: Any, block: int = block, kept: list[Any] = kept) -> None:
            kept += [keys.copy(), values.copy()]
            if block in caches:
                caches[block](keys, values)

        hidden = forward_block(arch, block, read, hidden, packing, inputs.__setitem__, cache)
        found[block] = [inputs[arch.attentions[block].qkv[0].name], *kept]
    return found


@pytest.mark.parametrize("kind", ["fp8", "fp8-head"])
def test_scales_are_the_reach_of_what_the_rounded_model_caches(
    model: Path, made: dict[str, Any], kind: str
) -> None:
    folder, report = made[kind]
    quantized = open_quantized(folder)
    tensors = load_file(folder / "model.safetensors")
    positions, held = np.tile(np.arange(12), 16), held_in([12] * 16)
    for block, (inputs, keys, values) in seen(model, folder).items():
        name, row = ATTENTION.format(block), report["kv_cache"][block]
        weight = quantized.load(f"{name}.k_proj").dequantized()
        np.testing.assert_allclose(keys, slow_keys(inputs, weight, positions), atol=1e-4)
        np.testing.assert_allclose(
            values.reshape(len(values), -1),
            inputs @ quantized.load(f"{name}.v_proj").dequantized().T,
            atol=1e-4,
        )
        assert row["module"] == name
        for what, cached in (("keys", keys), ("values", values)):
            reach, unseen = (np.abs(cached[own]).max(axis=(0, 2)) for own in (~held, held))
            scales = reach / 448 if kind == "fp8-head" else reach.max(keepdims=True) / 448
            stored = tensors[f"{name}.{what[0]}_scale"]
            assert stored.dtype == np.float32
            assert stored.shape == ((2, 1, 1) if kind == "fp8-head" else (1,))
            np.testing.assert_allclose(stored.ravel(), scales, rtol=1e-5)
            assert row[what]["absmax"] == pytest.approx(reach.max(), rel=1e-5)
            assert row[what]["used"] == pytest.approx((reach / scales / 448).min(), rel=1e-5)
            most = (unseen / scales / 448).max()
            assert row[what]["heldout_used"] == pytest.approx(most, rel=1e-5)


def test_without_feedback_it_is_the_float_model(model: Path, tmp_path: Path) -> None:
    quantize("rtn", model, tmp_path / "out", "--parallel-layers", "--kv-cache", "fp8")
    tensors, held = load_file(tmp_path / "out" / "model.safetensors"), held_in([12] * 16)
    for block, (_, keys, values) in seen(model, None).items():
        for letter, cached in (("k", keys), ("v", values)):
            wanted = np.abs(cached[~held]).max() / 448
            stored = tensors[f"{ATTENTION.format(block)}.{letter}_scale"]
            np.testing.assert_allclose(stored, [wanted], rtol=1e-5)


@pytest.mark.parametrize("command", ["awq", "smoothquant"])
def test_a_smoothed_model_has_the_scales_of_what_it_caches(
    model: Path, tmp_path: Path, command: str
) -> None:
    """Smoothing divides values by factors that o_proj takes back."""
    own = ["--no-compare"] if command == "awq" else ["--group-size", "-1", "--bits", "8"]
    quantize(command, model, tmp_path / "out", *own, "--kv-cache", "fp8-head")
    tensors, held = load_file(tmp_path / "out" / "model.safetensors"), held_in([12] * 16)
    for block, (_, keys, values) in seen(model, tmp_path / "out").items():
        for letter, cached in (("k", keys), ("v", values)):
            reach = np.abs(cached[~held]).max(axis=(0, 2))
            stored = tensors[f"{ATTENTION.format(block)}.{letter}_scale"].ravel()
            np.testing.assert_allclose(stored, reach / 448, rtol=1e-4)


def test_the_scales_are_declared_and_nothing_else_changes(
    model: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    quantize("gptq", model, tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert plain["kv_cache_scheme"] is None
    for kind, strategy in (("fp8", "tensor"), ("fp8-head", "attn_head")):
        folder, report = made[kind]
        declared = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert declared == plain | {
            "kv_cache_scheme": {
                "num_bits": 8, "type": "float", "symmetric": True, "dynamic": False,
                "strategy": strategy,
            }
        }  # fmt: skip
        found = open_quantized(folder).kv_cache
        assert found is not None
        assert found.modules == (ATTENTION.format(0), ATTENTION.format(1))
        assert not {entry["tensor"] for entry in report["left_alone"]} & {
            spec.name for spec in found.specs()
        }
        assert report["totals"]["bytes_after"] == sum(
            tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
        )
    first, second = (
        load_file(made["fp8"][0] / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    before = f"{ATTENTION.format(0)}.k_proj.weight_packed"  # the cache comes after it
    np.testing.assert_array_equal(first[before], second[before])


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bytes(
    model: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    for after in (3, 4, 10):  # before and after the scales of a block
        out = tmp_path / f"{after}"

        def stop(progress: Progress, after: int = after) -> None:
            if progress.done == after:
                raise KeyboardInterrupt

        named: dict[str, Any] = {
            "output": out, "tokens": model / "tokens.npy", "bits": 4, "group_size": 16,
            "format": "compressed-tensors", "kv_cache": "fp8",
        }  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            api.gptq(model, listen=stop, **named)
        api.gptq(model, **named)
        assert same_bytes(out, made["fp8"][0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 6, 8])  # before, at and after the scales of a block
def test_a_killed_run_ends_with_the_same_bytes(
    model: Path, made: dict[str, Any], tmp_path: Path, number: int
) -> None:
    words = ["gptq", model, "--tokens", model / "tokens.npy", *WORDS, "--kv-cache", "fp8"]
    killed(STAGED, number, *words, "-o", tmp_path / "out")
    assert ptq(*words, "-o", tmp_path / "out").code == 0
    assert same_bytes(tmp_path / "out", made["fp8"][0])


def test_pack_keeps_the_scales(model: Path, tmp_path: Path) -> None:
    native, packed = tmp_path / "native", tmp_path / "packed"
    quantize("rtn", model, native, "--format", "ptq", "--kv-cache", "fp8-head",
             "--scale-dtype", "float32")  # fmt: skip
    assert ptq("pack", native, "--format", "compressed-tensors", "-o", packed).code == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (native, packed))
    for spec in open_quantized(packed).kv_cache.specs():  # type: ignore[union-attr]
        np.testing.assert_array_equal(ours[spec.name], theirs[spec.name])
    declared = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert declared["kv_cache_scheme"]["strategy"] == "attn_head"
    back = tmp_path / "back"
    assert ptq("pack", packed, "-o", back).code == 0
    assert open_quantized(back).kv_cache == open_quantized(native).kv_cache
    outcome = ptq("pack", native, "--format", "gptq", "-o", tmp_path / "gptq")
    assert outcome.code == 1
    (error,) = outcome.errors
    assert "gptq has no scales for a key-value cache in FP8; --format ptq or" in error
    assert not (tmp_path / "gptq").exists()


def test_evaluation_runs_the_rounded_cache(model: Path, made: dict[str, Any]) -> None:
    outcome = ptq("eval", model, made["fp8"][0], "--tokens", model / "tokens.npy", "--json")
    assert outcome.code == 0
    report = outcome.document
    assert report["settings"]["kv_cache"] == "fp8"
    assert not report["warnings"] or "differ" not in " ".join(report["warnings"])
    from ptq_cli.models.forward.stages import finish, logits

    folder, ids = made["fp8"][0], np.load(model / "tokens.npy")
    checkpoint, quantized = open_checkpoint(model), open_quantized(folder)
    arch, packing = model_architecture(checkpoint), pack(ids.shape)
    read = quantized_tensors(checkpoint, quantized)
    caches = stored_caches([attention.module for attention in arch.attentions], quantized)
    perplexity = []
    for own in (caches, {}):
        hidden = embed(arch, read, ids, packing)
        for block in range(2):
            hidden = forward_block(arch, block, read, hidden, packing, cache=own.get(block))
        scores = logits(arch, read, finish(arch, read, hidden)).astype(np.float64)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        scores = scores.reshape(*ids.shape, -1)[:, :-1]
        nll = -np.take_along_axis(scores, ids[:, 1:, None], axis=2)
        perplexity.append(float(np.exp(nll.mean())))
    found = report["quality"]["perplexity"]["quantized"]
    assert found == pytest.approx(perplexity[0], rel=1e-5)
    assert abs(perplexity[1] / perplexity[0] - 1) > 1e-4  # the cache matters
