"""ptq awq and smoothquant of a mixture of experts, from tokens and from activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptq_cli
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folded import folded_checkpoint, read_folds
from ptq_cli.storage.tokens import TokenSettings
from tests.builders import ptq, write_model
from tests.run.test_in_sequence import moe_folder

MOE = "model.layers.{}.block_sparse_moe."
LONELY = MOE.format(0) + "experts.3."  # no token is routed to it
WORDS = {
    "awq": ("--bits", 3, "--group-size", 16, "--no-compare"),
    "smoothquant": ("--bits", 8, "--group-size", 16, "--activation-scheme", "none"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("mixture") / "model")


def activations(model: Path, target: Path, routers: bool) -> Path:
    """Random inputs of every site, experts' their own, with a loud channel."""
    rng = np.random.default_rng(1)
    target.mkdir()
    for name, stored in open_checkpoint(model).tensors.items():
        module = name.removesuffix(".weight")
        own = ("q_proj", "o_proj", "w1", "w2", *(("gate",) if routers else ()))
        if module.endswith(own):
            inputs = rng.standard_normal((160, stored.spec.shape[1])).astype(np.float32)
            inputs[:, 3] *= 20
            np.save(target / f"{module}.npy", inputs)
    return target


def folded_sites(report: dict[str, Any]) -> list[str]:
    return [site["site"] for site in report["sites"] if site["fed_by"]]


def check_written(model: Path, out: Path, report: dict[str, Any]) -> None:
    """What is dense is the original behind its folds, byte for byte, routers included."""
    folds = read_folds(out)
    assert [site.name for site, _ in folds] == folded_sites(report)
    behind, written = folded_checkpoint(open_checkpoint(model), folds), open_checkpoint(out)
    dense = behind.tensors.keys() & written.tensors.keys()
    for number in (0, 1):
        router = f"{MOE.format(number)}gate.weight"
        assert router in dense
        same = np.array_equal(written.read(router), open_checkpoint(model).read(router))
        assert same == (router.removesuffix(".weight") not in folded_sites(report))
    assert all(np.array_equal(behind.read(name), written.read(name)) for name in dense)


@pytest.mark.parametrize("command", WORDS)
def test_from_tokens(tmp_path: Path, model: Path, command: str) -> None:
    out = tmp_path / "out"
    words = ("--tokens", model / "tokens.npy", "--min-expert-tokens", 0, "-o", out, "--json")
    outcome = ptq(command, model, *WORDS[command], *words)
    assert outcome.code == 0, outcome.err
    report = outcome.document
    assert len(report["sites"]) == 14
    assert folded_sites(report)
    rows = {row["module"]: row for row in report["layers"]}
    assert not any(name.endswith("gate") for name in rows)
    assert rows[LONELY + "w1"]["fallback"] == "no token reaches it"
    reasons = {site["site"]: site["reason"] for site in report["sites"]}
    assert reasons[LONELY + "w2"] == "no statistics of its inputs"
    check_written(model, out, report)
    seen = ptq_cli.evaluate(model, out, tokens=TokenSettings(model / "tokens.npy"))
    assert seen.quality is not None
    assert not any("differ" in warning for warning in seen.warnings)


@pytest.mark.parametrize("routers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", WORDS)
def test_from_activations(tmp_path: Path, model: Path, command: str, routers: bool) -> None:
    """Without the router's own inputs, a site's are those of all its experts."""
    inputs, out = activations(model, tmp_path / "activations", routers), tmp_path / "out"
    outcome = ptq(
        command, model, *WORDS[command], "--bits", 8, "--activations", inputs, "-o", out, "--json"
    )
    assert outcome.code == 0, outcome.err
    report = outcome.document
    assert {MOE.format(number) + "gate" for number in (0, 1)} <= {*folded_sites(report)}
    check_written(model, out, report)


def test_each_expert_is_judged_on_its_own_tokens(tmp_path: Path, model: Path) -> None:
    """The baseline in the report is plain rounding on the expert's own held-out inputs."""
    inputs, out = activations(model, tmp_path / "activations", True), tmp_path / "out"
    words = ("--activations", inputs, "--json")
    report = ptq("awq", model, *WORDS["awq"], *words, "-o", out).document
    plain = ptq("rtn", model, *WORDS["awq"][:4], *words, "-o", tmp_path / "rtn").document
    wanted = {row["module"]: row["rtn_heldout_rel_err"] for row in plain["layers"]}
    for row in report["layers"]:
        assert row["rtn_heldout_rel_err"] == pytest.approx(wanted[row["module"]], rel=1e-5)


def test_float_weights_of_a_mixture_are_smoothed(tmp_path: Path, model: Path) -> None:
    tokens = TokenSettings(model / "tokens.npy")
    report = ptq_cli.smoothquant(
        model, bits=16, activation_scheme="none", tokens=tokens, output=tmp_path / "out",
        min_expert_tokens=0,
    )  # fmt: skip
    left = [site for site in report.sites if not site["fed_by"]]
    assert {site["reason"] for site in left} == {"no statistics of its inputs"}
    assert all(site["site"].endswith("w2") for site in left)
    assert max(site["function_change"] or 0 for site in report.sites) < 1e-6


def test_experts_that_stay_one_tensor_are_not_folded(tmp_path: Path) -> None:
    """The norm before them stays too; the rest of the block is smoothed."""
    rng, base = np.random.default_rng(6), "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        **{f"{base}self_attn.{n}_proj.weight": (32, 32) for n in "qkvo"},
        **{f"{base}{n}_layernorm.weight": (32,) for n in ("input", "post_attention")},
        f"{base}mlp.router.weight": (2, 32), f"{base}mlp.router.bias": (2,),
        f"{base}mlp.experts.gate_up_proj": (2, 32, 96), f"{base}mlp.experts.down_proj": (2, 48, 32),
        f"{base}mlp.experts.gate_up_proj_bias": (2, 96),
        f"{base}mlp.experts.down_proj_bias": (2, 32),
        f"{base}self_attn.sinks": (4,),
    }  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    tensors = {n: rng.uniform(0.5, 1.5, shape).astype(np.float32) for n, shape in shapes.items()}
    write_model(model / "model.safetensors", tensors)
    config = {"model_type": "gpt_oss", "num_attention_heads": 4, "num_local_experts": 2}
    (model / "config.json").write_text(json.dumps(config))
    inputs = tmp_path / "activations"
    inputs.mkdir()
    names = [f"{base}self_attn.q_proj", f"{base}self_attn.o_proj", f"{base}mlp.router"]
    names += [f"{base}mlp.experts.{e}.{n}_proj" for e in (0, 1) for n in ("gate", "down")]
    for name in names:
        width = 48 if name.endswith("down_proj") else 32
        np.save(inputs / f"{name}.npy", rng.standard_normal((90, width)).astype(np.float32))
    words = ("--bits", 16, "--activation-scheme", "none", "--activations", inputs, "--json")
    outcome = ptq("smoothquant", model, *words, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert folded_sites(outcome.document) == [f"{base}self_attn.q_proj", f"{base}self_attn.o_proj"]
    reasons = {site["site"]: site["reason"] for site in outcome.document["sites"]}
    assert "one tensor of all experts" in reasons[f"{base}mlp.router"]
    written = open_checkpoint(tmp_path / "out")
    assert written.tensors.keys() == tensors.keys()
    for name in (
        "post_attention_layernorm.weight",
        "mlp.router.weight",
        "mlp.experts.gate_up_proj",
    ):
        np.testing.assert_array_equal(written.read(base + name), tensors[base + name])
