"""Which tokens an expert is calibrated on: its own, or, where too few reach it, those of all beside
it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.calibration.stream import Held
from ptq_cli.models.forward.layers import Linear, apply_linear
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import ptq
from tests.run.test_in_sequence import SAMPLE, moe_folder, observed

MOE = "model.layers.0.block_sparse_moe.experts."
LONELY = MOE + "3."  # no token is routed to it
FAST = ("--bits", 8, "--group-size", 16, "--refine", 0, "--sweeps", 0, "--no-mse", "--drift", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, of which the third in the first block is seldom chosen, and the
    last one never: the channels of inputs have a positive mean, their rows of the router a negative
    one."""
    folder = moe_folder(tmp_path_factory.mktemp("mixture") / "model")
    tensors, random = load_file(folder / "model.safetensors"), np.random.default_rng(7)
    embedding = 1.0 + random.standard_normal((40, 32))
    router = random.standard_normal((4, 32))
    router += [[0], [0], [-1.3], [-8]] - router.mean(axis=1, keepdims=True)
    tensors["model.embed_tokens.weight"] = embedding.astype(np.float32)
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = router.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def counts(model: Path) -> dict[str, int]:
    """How many tokens reach each expert's sites in the first block."""
    ids = np.load(model / "tokens.npy")
    seen = observed(open_checkpoint(model).read, ids, model=model)
    return {site: len(inputs) for site, inputs in seen.items() if site.startswith(MOE)}


def calibrated(model: Path, file: Path, *words: Any) -> dict[str, Any]:
    """What a statistics file says of each site, no token held out."""
    tokens = ("--tokens", model / "tokens.npy", "--heldout-every", 0)
    outcome = ptq("calibrate", model, *tokens, *words, "-o", file, "--json")
    assert outcome.code == 0, outcome.err
    return {site: own for site, own in outcome.document["sites"].items() if site.startswith(MOE)}


def rows_of(model: Path, *words: Any) -> dict[str, Any]:
    """The rows of experts of the first block."""
    words = ("--tokens", model / "tokens.npy", *words, "--json")
    outcome = ptq("gptq", model, *FAST, *words)
    assert outcome.code == 0, outcome.err
    return {x["module"]: x for x in outcome.document["layers"] if x["module"].startswith(MOE)}


@pytest.mark.parametrize("minimum", [None, 150, 0])
def test_an_expert_with_too_few_tokens_shares_those_of_all(
    tmp_path: Path, model: Path, counts: dict[str, int], minimum: int | None
) -> None:
    """Of 192 tokens each goes to two experts. Four go to the third one: an eighth of the columns of
    w1, but fewer than that of w2."""
    assert (counts[MOE + "2.w1"], counts[LONELY + "w1"]) == (4, 0)
    assert min(counts[f"{MOE}{expert}.w1"] for expert in (0, 1)) > 150
    words = () if minimum is None else ("--min-expert-tokens", minimum)
    sites = calibrated(model, tmp_path / "stats.safetensors", *words)
    for site, own in counts.items():
        needed = {None: 4 if "w1" in site else 6, 150: 150, 0: 0}[minimum]
        if own < needed:
            assert sites[site]["own_tokens"] == own
            assert sites[site]["n_tokens"] == 2 * 16 * 12
        elif own:
            assert sites[site]["n_tokens"] == own
            assert "own_tokens" not in sites[site]
        else:
            assert site not in sites


def test_what_is_shared_is_what_all_experts_see(tmp_path: Path, model: Path) -> None:
    """Of the linears before the activation, and of those behind it."""
    file, ids = tmp_path / "stats.safetensors", np.load(model / "tokens.npy")
    calibrated(model, file)
    seen, statistics = (
        observed(open_checkpoint(model).read, ids, model=model),
        open_calibration(file),
    )
    for name in ("w1", "w2"):
        inputs = np.concatenate([seen[f"{MOE}{expert}.{name}"] for expert in range(4)])
        found = statistics.load(LONELY + name)
        wanted = inputs.T @ inputs / len(inputs)
        np.testing.assert_allclose(found.hessian, wanted, rtol=1e-4, atol=1e-5)


def test_the_report_lists_every_experts_tokens(tmp_path: Path, model: Path) -> None:
    """Held-out tokens are in no count: two sequences of sixteen."""
    rows = rows_of(model, "--min-expert-tokens", 120, "-o", tmp_path / "out")
    assert len(rows) == 12
    for name in ("w1", "w2", "w3"):
        own = [rows[f"{MOE}{expert}.{name}"]["own_tokens"] for expert in range(4)]
        assert sum(own) == 2 * 14 * 12
        assert own[3] == 0 < min(own[:3]) < 120 < max(own)
        for expert, count in enumerate(own):
            row = rows[f"{MOE}{expert}.{name}"]
            alone = count >= 120
            assert row["calibrated_on"] == ("own" if alone else "site")
            assert row["tokens"] == (count if alone else sum(own))
            assert row["calibrated"]
            assert any("too few" in note for note in row["notes"]) == (not alone)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    said = {row["module"]: row.get("calibrated_on") for row in written["layers"]}
    assert said[LONELY + "w2"] == "site"
    assert said["model.layers.0.self_attn.q_proj"] is None
    again = ("--tokens", model / "tokens.npy", "--min-expert-tokens", 120, "-o", tmp_path / "out")
    line = ptq("gptq", model, *FAST, *again).out.split("tokens: ")[1].splitlines()[0]
    counted = Counter(said.values())
    assert line == f"{counted['own']}, of those of all experts beside them: {counted['site']}"


def test_without_sharing_an_expert_that_no_token_reaches_is_rounded_to_nearest(
    tmp_path: Path, model: Path
) -> None:
    rows = rows_of(model, "--min-expert-tokens", 0, "-o", tmp_path / "out")
    assert {row.get("calibrated_on") for row in rows.values()} == {"own", None}
    assert {x for x, row in rows.items() if row["fallback"] == "no token reaches it"} == {
        LONELY + name for name in ("w1", "w2", "w3")
    }


def test_static_scales_of_inputs_that_no_token_reaches_are_those_of_all(
    tmp_path: Path, model: Path
) -> None:
    words = ("--scheme", "FP8", "-o", tmp_path / "out")
    tokens = ("--tokens", model / "tokens.npy")
    assert ptq("rtn", model, *words, *tokens).code == 0
    outcome = ptq("rtn", model, *words, *tokens, "--min-expert-tokens", 0, "--force")
    assert outcome.code == 1
    assert "no token reaches it" in outcome.err


def test_another_number_is_another_run(tmp_path: Path, model: Path) -> None:
    rows_of(model, "-o", tmp_path / "out")
    words = ("--tokens", model / "tokens.npy", "-o", tmp_path / "out")
    assert "finished already" in ptq("gptq", model, *FAST, *words).err
    outcome = ptq("gptq", model, *FAST, *words, "--min-expert-tokens", 3)
    assert (outcome.code, "--force" in outcome.err) == (1, True)


def test_where_it_does_nothing_it_is_an_error(tmp_path: Path, model: Path) -> None:
    out, own = ("-o", tmp_path / "out"), ("--min-expert-tokens", 64)
    tokens = ("--tokens", model / "tokens.npy")
    outcome = ptq("gptq", model, *own, *out)
    assert outcome.code == 1
    assert "--min-expert-tokens needs --tokens, --text or --chat" in outcome.err
    outcome = ptq("gptq", SAMPLE, "--tokens", SAMPLE / "calibration_tokens.npy", *own, *out)
    assert outcome.code == 1
    assert "--min-expert-tokens 64 does nothing here" in outcome.err
    assert "has no experts" in outcome.err
    assert not (tmp_path / "out").exists()
    file = tmp_path / "stats.safetensors"
    calibrated(model, file)
    assert ptq("rtn", model, "--group-size", 16, *out).code == 0
    assert ptq("eval", model, tmp_path / "out", *tokens, *own).code == 0
    outcome = ptq("eval", model, tmp_path / "out", *tokens, *own, "--calibration", file)
    assert (outcome.code, f"statistics of {file}" in outcome.err) == (1, True)


def test_weights_of_experts_are_read_anew_and_others_once() -> None:
    expert, dense = Linear("mlp.experts.7.up_proj"), Linear("mlp.shared_expert.up_proj")
    reads: Counter[str] = Counter()

    def read(name: str) -> Any:
        reads[name] += 1
        return np.ones((2, 3), np.float16)

    rounded = {f"{x.name}.weight": lambda: 2 * np.ones((2, 3), np.float32) for x in (expert, dense)}
    inputs = np.ones((1, 3), np.float32)
    weights, other = Held(read), Held(read, instead=rounded)
    for _ in range(3):
        for linear in (expert, dense):
            assert apply_linear(linear, weights, inputs).tolist() == [[3, 3]]
            assert apply_linear(linear, other, inputs).tolist() == [[6, 6]]
    assert reads == {f"{expert.name}.weight": 3, f"{dense.name}.weight": 1}
