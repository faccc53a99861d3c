"""Budgets that cannot be: one line, before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.commands import allocate
from ptq_cli.run import measure_choices
from tests.builders import ptq
from tests.cli.allocate.words import BUDGET, CHOICES, QUICK, TOKENS, done, refuse

NEVER = {
    "smallest": (("--target-bpw", 1), ("--target-bpw 1", "smallest", "3.500")),
    "largest": (("--target-bpw", 99), ("--target-bpw 99", "largest", "7.500", "larger --choices")),
    "small size": (("--target-size", "1KB"), ("1000 bytes", "smallest", "KiB")),
    "large size": (("--target-size", "1GB"), ("1000000000 bytes", "largest", "KiB")),
    "nan": (("--target-bpw", "nan"), ("nan",)),
    "infinity": (("--target-bpw", "inf"), ("inf",)),
    "no size": (("--target-size", 0), ("not a size",)),
    "negative size": (("--target-size", -5), ("not a size",)),
    "nan size": (("--target-size", "nan"), ("not a size",)),
    "both": (("--target-size", "30KB", "--target-bpw", 4), ("exclude each other",)),
    "one choice": (("--choices", "W4A16"), ("nothing to choose",)),
    "one choice twice": (("--choices", "W4A16", "--choices", "w4a16"), ("nothing to choose",)),
    "no choice": (("--choices", "W9A16,W4A16"), ("W9A16", "W2A16 … W8A16", "NVFP4", "Q4_K")),
    "a mix": (("--choices", "Q4_K_M,Q4_K_S"), ("no choice 'Q4_K_M'",)),
    "types and widths": (("--choices", "Q4_0,W4A16"), ("Q4_0,W4A16", "one file")),
    "types to keep": (("--keep", "q_proj=Q4_0"), ("--keep q_proj=Q4_0", "one file")),
    "huge size": (("--target-size", f"{10**400}GB"), ("not a size",)),
    "keeps what is dense": (("--keep", "lm_head=W6A16"), ("--keep lm_head=W6A16", "stays as it")),
    "keeps all": (("--keep", ".=W4A16"), ("nothing to share out", "--keep")),
    "nothing to keep": (("--keep", "q_proj"), ("not REGEX=CHOICE",)),
    "no pattern": (("--keep", "(=W4A16"), ("not a regular expression",)),
    "keeps nothing": (("--keep", "nosuch=W4A16"), ("nosuch", "matches no tensor")),
    "fused": (("--keep", "q_proj=W4A16"), ("0.self_attn.q_proj", "k_proj", "one matrix")),
    "format": (("--format", "awq"), ("--choices W2A16", "awq holds 4 bits, not 2", "down")),
    "group": (("--format", "mlx"), ("mlx has groups of 32, 64, 128, not 16", "layers.{0-1}")),
    "folder": (("-o", "nowhere/r.toml"), ("nowhere", "no such folder")),
    "table": (("--table", "nowhere/t.json"), ("nowhere", "no such folder")),
    "table is a folder": (("--table", "m"), ("m", "not a regular file")),
    "suffix": (("-o", "r.txt"), ("r.txt", ".toml")),
    "strict": (("--strict", "--nsamples", 2), ("(--strict)",)),
    "no tensor": (("--ignore", "_proj"), ("",)),
    "idle setting": (("--method", "awq", "--sweeps", 3), ("sweeps", "--then gptq")),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_a_mistake_is_a_line_before_anything_is_measured(model, case, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    options, words = NEVER[case]
    target = () if any("--target" in str(word) for word in options) else ("--target-bpw", 4.6)
    output = () if "-o" in options else ("-o", "r.toml")
    refuse("allocate", model, *TOKENS(model), "-g", 16, *target, *options, *output, words=words)


def test_a_recipe_that_says_all_leaves_nothing_to_share_out(model, quick):
    again = ("--config", quick / "r.toml", "--target-bpw", 5, *QUICK[2:], "-o", "s.toml")
    refuse("allocate", model, *TOKENS(model), *again, words=("nothing to share out", "[[layers]]"))


@pytest.mark.parametrize("kind", ["folder", "file", "output"])
def test_an_output_that_is_there_is_refused_before_anything_is_measured(model, kind, monkeypatch):
    output = Path("x.gguf" if kind == "file" else "out")
    run = ("rtn", model, "-o", output)
    if kind == "folder":
        (output / "of").mkdir(parents=True)
    elif kind == "file":
        output.write_text("mine")
    else:
        done(*run, "-g", 16)
    choices = CHOICES["gguf"] if kind == "file" else ("-g", 16)
    form = ("--format", "gguf") if kind == "file" else ()
    monkeypatch.setattr(allocate, "measure_choices", None)
    refuse(*run, *form, *choices, "--target-bpw", 5, words=(f"{output}: exists already",))


def test_a_place_for_the_table_that_cannot_be_written_is_named_first(model, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    Path("kept").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "kept")
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "-o", "r.toml")
    error = refuse(*run, "--table", "kept/t.json", words=("kept: not writable",))
    assert "choose another place with --table" in error


@pytest.mark.parametrize(
    ("options", "word"),
    [((), "--target-bpw or --target-size"), (("--target-bpw", 0), "x>0"),
     (("--target-bpw", -3), "x>0"), (("--target-bpw", "four"), "four")],
)  # fmt: skip
def test_no_target_is_a_mistake_of_usage(model, options, word):
    outcome = ptq("allocate", model, *TOKENS(model), *options)
    assert outcome.code == 2
    assert word in outcome.err
    assert not Path("m.choices.json").exists()


@pytest.mark.parametrize(
    "options",
    [("--choices", "W4A16"), ("--keep", "q=W4A16"), ("--fast",), ("--trial-tokens", 3),
     ("--table", "t.json")],
)  # fmt: skip
def test_what_goes_with_a_target_does_nothing_without(model, options):
    words = (options[0], "does nothing without --target-bpw or --target-size")
    refuse("gptq", model, "-g", 16, "-o", "out", *options, words=words)


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--bits", 4), "--bits"), (("--scheme", "W4A16"), "--scheme"),
     (("--format", "gguf", "--tensor-type", "a=Q4_0"), "--tensor-type"),
     (("-o", "nowhere/out"), "no such folder"), (("-o", "x.gguf"), "--format gguf"),
     (("--runtime", "vllm", "--strict"), "")],
)  # fmt: skip
def test_what_does_not_go_with_a_target(model, options, word, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    output = () if "-o" in options else ("-o", "out")
    refuse("gptq", model, *TOKENS(model), "-g", 16, "--target-bpw", 4.6, *output, *options,
           words=(word,))  # fmt: skip


def test_another_recipe_is_not_replaced_unasked(measured, monkeypatch):
    run = ("allocate", measured, *TOKENS(measured), *QUICK, "-o", "r.toml")
    done(*run, "--target-bpw", 4.6)
    done(*run, "--target-bpw", 4.6)
    refuse(*run, "--target-bpw", 5, words=("r.toml exists already", "--force"))
    monkeypatch.setattr(allocate, "measure_choices", None)
    refuse(*run, "--target-bpw", 5, "--asym", words=("r.toml exists already", "--force"))


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1}', '[]', '{"format": "ptq choices 1", "tables": {"a": {"errors": 3}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"errors": {"m": {"W2A16": {"rel_err": -1}}}}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"divergences": {"m": {"W2A16": "x"}}}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"divergences": {"m": {"W2A16": NaN}}}}}',
     '{"format": "ptq choices 2", "tables": {}}', "\udcff", '{"a": ' * 2000],
)  # fmt: skip
def test_a_torn_or_foreign_table(model, text):
    Path("t.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "-o", "r.toml")
    refuse(*run, "--table", "t.json", words=("t.json",))


def test_no_token_to_try_on(model):
    np.save("mask.npy", np.zeros((16, 12), np.uint8))
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "-o", "r.toml")
    refuse(*run, "--mask", "mask.npy", words=("mask",))
    refuse("awq", model, "--target-bpw", 4.6, "-g", 16, "-o", "out", words=("no calibration",))


@pytest.mark.parametrize("tokens", [True, False])
def test_a_weight_that_is_not_finite_is_named(model, tokens):
    """No scale fits it, but no other dtype of scales would help."""
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors")
    run = ("allocate", model, *(TOKENS(model) if tokens else ()), *BUDGET, *QUICK, "-o", "r.toml")
    (error,) = ptq(*run).errors  # (without tokens, what is finished is kept)
    assert f"tensor '{name}' [64, 32]: NaN or inf at index [3, 5]" in error
    assert "mend the checkpoint" in error
    assert "scale" not in error
    assert not Path("r.toml").exists()


def test_a_disk_for_scratch_files_that_is_full(model, monkeypatch):
    monkeypatch.setattr(measure_choices, "free_space", lambda folder: 1)
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "-o", "r.toml")
    refuse(*run, words=("MB are needed", "0.0 MB free", "TMPDIR"))
