"""Gates that bad calibration would pass: they fail with the reason, and a warning says it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import SAMPLE, SITES, ptq, random_inputs, small_activations
from tests.cli.test_junit import cases, read

TOKENS = np.load(SAMPLE / "calibration_tokens.npy")[:16, :64]
FAST = ("--parallel-layers", "--refine", "0", "--sweeps", "0")


@pytest.fixture(scope="module")
def plain(sample, tmp_path_factory) -> Path:
    """The sample without activations beside it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(sample, folder, ignore=shutil.ignore_patterns("activations"))
    return folder


def saved(name: str, values: np.ndarray) -> str:
    np.save(name, values)
    return name


def padded() -> np.ndarray:
    tokens = TOKENS.copy()
    tokens[:, 5:] = 0
    return tokens


WEAK_TOKENS = {
    "padding without a mask": (padded(), "token 0 makes up 92 %"),
    "one token": (TOKENS[:1, :1], "token 327 makes up 100 %"),
    "two tokens": (TOKENS[:1, :2], "no inputs are held out"),
    "the same rows": (np.repeat(TOKENS[:2], 8, 0), "14 of 16 sequences repeat an earlier one"),
    "the same text": (np.resize(TOKENS[0, :37], (16, 64)), "passages of 8 tokens repeat"),
}


@pytest.mark.parametrize("name", WEAK_TOKENS)
def test_weak_tokens_fail_a_gate_and_are_warned_of(name, plain):
    tokens, words = WEAK_TOKENS[name]
    gptq = ("gptq", plain, *FAST, "--tokens", saved("t.npy", tokens), "-o", "out")
    outcome = ptq(*gptq, "--min-gain", "1.1", "--json")
    assert outcome.code == 3
    assert any(words in warning for warning in outcome.warnings)
    assert "measured on weak calibration" in outcome.errors[0]
    assert words in outcome.errors[0]
    assert "--allow-weak-calibration" in outcome.errors[0]
    assert any(words in reason for reason in outcome.document["weak"])
    again = ptq(*gptq, "--max-rel-err", "1", "--junit", "j.xml")  # finished: the report is read
    assert again.code == 3
    assert words in cases(read("j.xml"), "gates")["--max-rel-err 1"].get("message")
    assert ptq(*gptq, "--min-gain", "1.1", "--allow-weak-calibration").code == 0
    assert ptq(*gptq, "--max-fallbacks", "28").code == 0  # which no input changes


def good_tokens() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    mask = np.zeros(TOKENS.shape, np.uint8)
    mask[:, :20] = 1
    first, common = TOKENS.copy(), TOKENS.copy()
    first[:, 0] = 1
    common[:, ::3] = 5
    hidden = TOKENS.copy()
    hidden[mask == 0] = 0
    return {
        "as they are": (TOKENS, None),
        "padding and a mask": (hidden, mask),
        "one at the beginning of each row": (first, None),
        "a third is a newline": (common, None),
    }


@pytest.mark.parametrize("name", good_tokens())
def test_good_tokens_pass_without_a_word(name, plain):
    tokens, mask = good_tokens()[name]
    words = [] if mask is None else ["--mask", saved("mask.npy", mask)]
    gptq = ("gptq", plain, *FAST, "--tokens", saved("t.npy", tokens), *words, "-o", "out")
    outcome = ptq(*gptq, "--min-gain", "1.05")
    assert outcome.code == 0, outcome.err
    assert not [line for line in outcome.warnings if "fewer than its" not in line]


def test_the_sample_is_no_weak_calibration(one_block):
    outcome = ptq("gptq", one_block, "-o", "out", "--strict", "--min-gain", "1.5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "weak" not in json.loads(Path("out/report.json").read_text())


# ---- activations, and statistics of them ----


def acts(change: str) -> str:
    """Activations of `small_model`, spoiled."""
    inputs = {site: random_inputs(400, width) for site, width in SITES.items()}
    if change == "the same rows":
        inputs = {site: np.tile(rows[:6], (60, 1)) for site, rows in inputs.items()}
    if change == "one row":
        inputs["layers.0.q_proj"][:250] = inputs["layers.0.q_proj"][0]
    if change == "zeros":
        inputs["layers.0.down_proj"][:] = 0
    if change == "few":
        inputs = {site: rows[:48] for site, rows in inputs.items()}
    return str(small_activations(Path("acts"), **inputs))


WEAK_INPUTS = {
    "the same rows": "98 % of the inputs repeat earlier ones: all",
    "one row": "one input makes up 62 % of all: layers.0.",
    "zeros": "every input is zero: layers.0.down_proj",
    "few": "only 6 inputs are held out, at least 10 are needed: all",
}


@pytest.mark.parametrize("change", WEAK_INPUTS)
def test_weak_activations(change, job):
    folder, words = acts(change), WEAK_INPUTS[change]
    gptq = ("gptq", job, "--group-size", "4", "--bits", "3", "-o", "out", "--force")
    direct = ptq(*gptq, "--activations", folder, "--max-rel-err", "9")
    assert direct.code == 3
    made = ptq("calibrate", job, "--activations", folder, "-o", "stats.safetensors")
    assert made.code == 0
    through = ptq(*gptq, "--calibration", "stats.safetensors", "--max-rel-err", "9")
    assert through.code == 3
    for outcome in (direct, through):
        assert words in outcome.errors[0]
    for outcome in (direct, through, made):
        assert any(words in warning for warning in outcome.warnings)
    ptq("pack", job, "--group-size", "4", "-o", "packed")
    measured = ("eval", job, "packed", "--activations", folder)
    assert words in ptq(*measured, "--max-rel-err", "9").errors[0]
    assert ptq(*measured, "--max-rel-err", "9", "--allow-weak-calibration").code == 0


def test_channels_that_are_always_zero_are_warned_of_and_pass(job):
    inputs = random_inputs(400, 40)
    inputs[:, 3:6] = 0
    small_activations(Path("acts"), 400, **{"layers.0.down_proj": inputs})
    words = "1 {} have inputs that are always zero, up to 3 of 40: layers.0.down_proj"
    made = ptq("calibrate", job, "--activations", "acts", "-o", "stats.safetensors")
    assert made.warnings == ["ptq: warning: " + words.format("sites")]
    ptq("pack", job, "-o", "packed")
    outcome = ptq("eval", job, "packed", "--activations", "acts", "--max-rel-err", "9")
    assert outcome.code == 0
    assert outcome.warnings == ["ptq: warning: " + words.format("layers")]


def test_nothing_held_out_is_no_gain(job):
    acts("")
    for name, every in (("none", 0), ("some", 8)):
        made = ptq(
            *("calibrate", job, "--activations", "acts", "--heldout-every", every),
            *("-o", f"{name}.safetensors"),
        )
        assert bool(made.warnings) == (name == "none")
    gptq = ("gptq", job, "--group-size", "4", "--bits", "3", "--min-gain", "1.01")
    missed = ptq(*gptq, "--calibration", "none.safetensors", "-o", "none")
    assert missed.code == 3
    assert "no inputs are held out, errors are on those calibrated on: all" in missed.errors[0]
    assert ptq(*gptq, "--calibration", "some.safetensors", "-o", "some").code == 0


def test_what_is_wrong_stays_with_the_statistics_and_what_they_are_merged_to(plain):
    tokens = saved("t.npy", padded())
    for name, words in (("bad", [tokens]), ("good", [saved("g.npy", TOKENS)])):
        calibrate = ("calibrate", plain, "--tokens", *words, "-o", f"{name}.safetensors")
        assert ptq(*calibrate).code == 0
    merged = ("--merge", "bad.safetensors", "--merge", "good.safetensors")
    ptq("calibrate", plain, *merged, "-o", "both.safetensors")
    ptq("calibrate", plain, *2 * merged[2:], "-o", "twice.safetensors")
    for name, words in (("both", "token 0 makes up 92 %"), ("twice", "merged more than once")):
        gptq = ("rtn", plain, "--calibration", f"{name}.safetensors", "-o", name)
        outcome = ptq(*gptq, "--max-rel-err", "9")
        assert outcome.code == 3
        assert words in outcome.errors[0]
        assert ptq(*gptq, "--strict", "--dry-run").code == 1


def test_gates_on_predictions_of_weak_tokens(made, sample):
    packed = made("pack")
    tokens = saved("t.npy", padded())
    gates = ("--max-kl", "9", "--max-rel-err", "9")
    outcome = ptq("eval", sample, packed, "--tokens", tokens, *gates, "--junit", "j.xml", "--json")
    assert outcome.code == 3
    found = cases(read("j.xml"), "gates")
    assert "token 0 makes up 92 %" in found["--max-kl 9"].get("message")
    assert found["--max-rel-err 9"] is None  # measured on the statistics beside the model
    assert outcome.document["quality"]["weak"]


def test_a_difference_of_weak_reports(job):
    acts("few")
    ptq("rtn", job, "--activations", "acts", "-o", "few")
    acts("")
    ptq("rtn", job, "--activations", "acts", "-o", "good")
    outcome = ptq("diff", "good", "few", "--tolerance", "99")
    assert outcome.code == 3
    assert "after: only 6 inputs are held out" in outcome.errors[0]
    assert ptq("diff", "good", "few", "--tolerance", "99", "--allow-weak-calibration").code == 0
    assert ptq("diff", "few", "few").code == 0
    assert ptq("diff", "good", "few", "--tolerance", "99", "--json").document["weak"]


def test_strict_and_idle(job):
    acts("few")
    gptq = ("gptq", job, "--group-size", "4", "--activations", "acts", "-o", "out")
    outcome = ptq(*gptq, "--strict")
    assert outcome.code == 1
    assert outcome.errors[0].endswith("(--strict)")
    assert ptq(*gptq, "--strict").code == 1  # finished, and as the first run did
    idle = ptq(*gptq, "--allow-weak-calibration")
    assert idle.code == 2
    assert "does nothing without a gate" in idle.err


def test_the_api_says_so(job):
    report = ptq_cli.gptq(job, activations=acts("few"), output="out")
    assert report.weak == ("only 6 inputs are held out, at least 10 are needed: all layers",)
    assert report.weak[0] in report.warnings
