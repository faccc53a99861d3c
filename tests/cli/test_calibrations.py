"""Statistics: where a command finds them, merged ones, activations in several files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import half_sample, ptq, read_model

# ---- where calibration comes from ----


def test_calibration_is_found_in_order(tmp_path):
    """The file beside the model, then activations/ beside it, then none, loudly."""
    sample = half_sample(tmp_path / "m", blocks=1)
    assert ptq("calibrate", sample, "--heldout-every", 0).code == 0

    def totals(*options):
        outcome = ptq("gptq", sample, "--json", "--force", "-o", "out", *options)
        assert outcome.code == 0
        return outcome.document, outcome.warnings

    assert totals()[0]["layers"][0]["tokens"] == 1024  # the file: nothing was held out
    (sample / "model.calibration.safetensors").unlink()
    assert totals()[0]["layers"][0]["tokens"] == 896  # the folder
    (sample / "activations").rename(tmp_path / "elsewhere")
    document, warnings = totals()
    assert len(warnings) == 1
    assert "NO CALIBRATION" in warnings[0]
    assert document["totals"]["calibrated"] is False
    assert document["warnings"]
    for row in document["layers"]:
        assert (row["method"], row["fallback"]) == ("rtn", "no calibration")
        assert row["calibrated"] is False
    assert document["totals"]["fallbacks"] == 7
    assert totals("--activations", "elsewhere")[0]["totals"]["calibrated"] is True


def test_require_calibration_makes_its_absence_an_error(job):
    outcome = ptq("gptq", job, "--require-calibration")
    assert outcome.code == 1
    assert "no calibration found" in outcome.errors[0]
    assert not list(Path().glob("model-gptq*"))


def test_strict_makes_the_warning_an_error_before_any_work(job):
    outcome = ptq("gptq", job, "--strict")
    assert outcome.code == 1
    assert "NO CALIBRATION" in outcome.errors[0]
    assert not list(Path().glob("model-gptq*"))


def test_linears_left_out_with_ignore_need_no_activations(job):
    Path("acts/layers.0.down_proj.npy").unlink()
    arguments = ["gptq", job, "--activations", "acts", "-o", "out"]
    assert ptq(*arguments).code == 1
    assert ptq(*arguments, "--ignore", "down_proj").code == 0


def test_fallback_rtn_allows_a_linear_without_activations_and_names_it(job):
    Path("acts/layers.0.down_proj.npy").unlink()
    arguments = ["gptq", job, "--activations", "acts", "--json", "--fallback", "rtn"]
    document = ptq(*arguments).document
    fallbacks = {row["module"]: row["fallback"] for row in document["layers"] if row["fallback"]}
    assert fallbacks == {"layers.0.down_proj": "no statistics for it"}
    assert any("layers.0.down_proj" in warning for warning in document["warnings"])
    assert document["totals"]["calibrated"] is False


# ---- merged calibrations ----


def halves(one_block, folder, cut):
    for source in (one_block / "activations").iterdir():
        inputs = np.load(source)
        for half, part in (("first", inputs[:cut]), ("second", inputs[cut:])):
            (folder / half).mkdir(exist_ok=True)
            np.save(folder / half / source.name, part)


@pytest.mark.parametrize("cut", [512, 200, 301])
def test_two_halves_merged_equal_the_whole(one_block, tmp_path, cut):
    halves(one_block, tmp_path, cut)
    assert ptq("calibrate", one_block, "-o", "whole.safetensors").code == 0
    for half in ("first", "second"):
        made = ptq("calibrate", one_block, "--activations", half, "-o", f"{half}.safetensors")
        assert made.code == 0
    parts = ["--merge", "first.safetensors", "--merge", "second.safetensors"]
    assert ptq("calibrate", one_block, *parts, "-o", "merged.safetensors").code == 0
    whole, merged = (open_checkpoint(Path(f"{n}.safetensors")) for n in ("whole", "merged"))
    ours, theirs = (json.loads(c.metadata["ptq"])["sites"] for c in (merged, whole))
    assert list(ours) == list(theirs)
    aligned = cut % 8 == 0
    for site, entry in theirs.items():
        hessian = whole.read(f"{site}.hessian")
        off = np.abs(merged.read(f"{site}.hessian") - hessian).max() / np.abs(hessian).max()
        assert off <= (1e-6 if aligned else 0.5)
        assert ours[site]["n_seen"] == entry["n_seen"] == 1024
        if not aligned:  # other tokens are held out, so statistics differ a little
            continue
        assert ours[site]["n_tokens"] == entry["n_tokens"]
        for key in ("min", "max"):
            assert ours[site][key] == entry[key]
        for key in ("mean", "std"):
            assert ours[site][key] == pytest.approx(entry[key], abs=1e-6 * entry["std"])
        assert ours[site]["p99"] == pytest.approx(entry["p99"], rel=2.0**-7)
        for part in ("absmax", "histogram", "heldout"):
            assert np.array_equal(merged.read(f"{site}.{part}"), whole.read(f"{site}.{part}"))
        np.testing.assert_allclose(
            merged.read(f"{site}.absmean"), whole.read(f"{site}.absmean"), rtol=1e-6
        )


def test_the_percentile_is_within_its_bound_of_the_exact_one(one_block):
    document = ptq("calibrate", one_block, "-o", "s.safetensors", "--heldout-every", 0, "--json")
    for site, entry in document.document["sites"].items():
        inputs = np.abs(np.load(one_block / "activations" / f"{site}.npy").astype(np.float64))
        exact = np.sort(inputs.ravel())[int(np.ceil(0.99 * inputs.size)) - 1]
        assert entry["p99"] == pytest.approx(exact, rel=2.0**-8)
        assert entry["n_tokens"] == entry["n_seen"] == 1024


# ---- activations in several files ----


def test_a_folder_of_shards_of_activations_is_one_file(job):
    inputs = np.load("acts/layers.0.q_proj.npy")
    Path("acts/layers.0.q_proj.npy").unlink()
    Path("acts/layers.0.q_proj").mkdir()
    for i, start in enumerate(range(0, 96, 32)):
        np.save(f"acts/layers.0.q_proj/{i:03d}.npy", inputs[start : start + 32])
    assert ptq("calibrate", job, "--activations", "acts", "-o", "shards.safetensors").code == 0
    np.save("acts/layers.0.q_proj.npy", inputs)
    for i in range(3):
        Path(f"acts/layers.0.q_proj/{i:03d}.npy").unlink()
    assert ptq("calibrate", job, "--activations", "acts", "-o", "whole.safetensors").code == 0
    ours, whole = (read_model(Path(f"{n}.safetensors")) for n in ("shards", "whole"))
    assert ours.keys() == whole.keys()
    for name in whole:
        if not name.endswith(("hessian", "absmean")):  # sums of other chunks: the last bits
            assert ours[name] == whole[name], name
    for part in ("hessian", "absmean"):
        name = f"layers.0.q_proj.{part}"
        a, b = (np.frombuffer(content[name][2], np.float32) for content in (ours, whole))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
