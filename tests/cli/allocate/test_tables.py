"""What is measured for a budget is kept in a table, and is taken for nothing that it is not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.errors import FileError
from ptq_cli.run import measure_choices
from ptq_cli.run.quantize_unit import quantize_unit
from ptq_cli.storage.choices import ChoiceTable
from tests.builders import ptq
from tests.cli.allocate.words import (
    BUDGET,
    CHOICES,
    QUICK,
    TOKENS,
    WIDTHS,
    done,
    noting,
    recipe_of,
    table,
)
from tests.stopping import killed

SAVED = "ptq_cli.storage.choices:ChoiceTable.save"


WAVES = ("--max-memory", "1KB")  # trials are taken to the end block by block


@pytest.mark.slow(2)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model, monkeypatch):
    run = ("allocate", model, *TOKENS(model), *BUDGET, "--include", "lm_head", *QUICK)
    done(*run, "-o", "whole.toml", "--table", "whole.json")
    killed(SAVED, 2, *run, *WAVES, "-o", "r.toml")
    assert not Path("r.toml").exists()
    first = {name for name in table("whole.json")["errors"] if ".0." in name}
    assert table()["errors"].keys() == first
    rounded = []
    monkeypatch.setattr(measure_choices, "quantize_unit", noting(rounded, quantize_unit))
    done(*run, "-o", "r.toml")
    assert rounded
    assert not first.intersection(rounded)
    assert Path("r.toml").read_bytes() == Path("whole.toml").read_bytes()
    assert table() == table("whole.json")


def test_an_error_on_the_way_loses_no_wave(model, quick, monkeypatch):
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, *WAVES, "-o", "r.toml")
    save, calls = ChoiceTable.save, []

    def full(self):
        calls.append(self)
        if len(calls) == 2:
            raise FileError("no space left")
        save(self)

    monkeypatch.setattr(ChoiceTable, "save", full)
    assert ptq(*run).errors == ["ptq: error: no space left"]
    assert len(table()["errors"]) == 7
    done(*run)
    assert table() == table(quick / "t.json")


def test_what_is_measured_is_saved_in_waves_however_much_memory_there_is(model, quick, monkeypatch):
    monkeypatch.setattr(measure_choices, "WAVE", 8)
    save, tried = ChoiceTable.save, []

    def noted(self):
        tried.append(len(self.divergences))
        save(self)

    monkeypatch.setattr(ChoiceTable, "save", noted)
    done("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "-o", "r.toml")
    assert tried == [4, 8, 8]
    assert recipe_of() == recipe_of(quick / "r.toml")


def test_waves_give_the_numbers_of_one(model):
    run = ("allocate", model, *TOKENS(model), *BUDGET, "-g", 16, "--choices", "W2A16,W6A16",
           "--method", "rtn", "--include", "lm_head", "--include", "embed")  # fmt: skip
    done(*run, "-o", "a.toml", "--table", "a.json")
    done(*run, "-o", "b.toml", "--table", "b.json", *WAVES)
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.toml").read_bytes() == Path("b.toml").read_bytes()


def test_another_target_measures_nothing(measured, quick, monkeypatch):
    monkeypatch.setattr(measure_choices, "quantize_unit", None)
    monkeypatch.setattr(measure_choices, "Trials", None)
    size = recipe_of(quick / "r.toml")["allocation"]["bytes"]
    run = ("allocate", measured, *TOKENS(measured), "-g", 16, "--method", "rtn")
    for target in (("--target-bpw", 5), ("--target-size", size), ("--target-bpw", 4.6)):
        done(*run, *WIDTHS[2:], *target, "-o", "r.toml", "--force")
    done(*run, "--choices", "W2A16,W4A16", "--target-bpw", 4, "-o", "s.toml")
    done("rtn", measured, *TOKENS(measured), *WIDTHS, "--target-bpw", 5, "-o", "out")


@pytest.mark.parametrize(
    "other",
    [("--asym",), ("-g", 32), ("--nsamples", 8), ("--trial-tokens", 24), ("--no-mse",),
     ("--format", "compressed-tensors"), ("--keep", "o_proj=W4A16")],
)  # fmt: skip
def test_other_settings_take_no_numbers_of_these(measured, other, monkeypatch):
    run = ("allocate", measured, *TOKENS(measured), "-g", 16, "--choices", "W2A16,W4A16",
           *BUDGET, "--method", "rtn", *other, "-o", "r.toml")  # fmt: skip
    rounded = []
    monkeypatch.setattr(measure_choices, "quantize_unit", noting(rounded, quantize_unit))
    done(*run)
    assert len(set(rounded)) == 14
    assert len(json.loads(Path("m.choices.json").read_text())["tables"]) == 2


def test_another_model_takes_no_numbers_of_this(measured):
    tensors = load_file(measured / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, measured / "model.safetensors")
    done("allocate", measured, *TOKENS(measured), *BUDGET, *QUICK, "-o", "r.toml")
    one, other = json.loads(Path("m.choices.json").read_text())["tables"].values()
    assert one != other


def test_two_runs_at_once_keep_what_both_measure(tmp_path):
    path = tmp_path / "t.json"
    one, other = ChoiceTable(path, {"a": 1}), ChoiceTable(path, {"a": 2})
    same = ChoiceTable(path, {"a": 1})
    one.add_divergence("g", "W2A16", 0.5)
    one.save()
    other.add_divergence("g", "W2A16", 0.75)
    other.save()
    same.add_divergence("g", "W4A16", 0.25)
    same.add_divergence("h", "W4A16", 0.125)
    same.save()
    one.save()
    assert ChoiceTable(path, {"a": 1}).divergences == {
        "g": {"W2A16": 0.5, "W4A16": 0.25}, "h": {"W4A16": 0.125}
    }  # fmt: skip
    assert ChoiceTable(path, {"a": 2}).divergences == {"g": {"W2A16": 0.75}}


def no_space(*paths):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_table_is_whole_or_as_it_was(tmp_path, monkeypatch):
    table = ChoiceTable(tmp_path / "t.json", {})
    table.add_divergence("g", "W2A16", 0.5)
    table.save()
    before = table.path.read_bytes()
    monkeypatch.setattr(os, "replace", no_space)
    table.add_divergence("g", "W4A16", 0.5)
    with pytest.raises(FileError, match="No space left") as found:
        table.save()
    assert "--table" in found.value.hint
    assert table.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize("fmt", ["ptq", "gguf"])
def test_the_order_of_the_choices_says_nothing(llama, errors, fmt):
    word, choices, *more = CHOICES[fmt]
    back = ",".join(reversed(choices.split(",")))
    for given, output in (choices, "a.toml"), (back, "b.toml"):
        run = ("--format", fmt, word, given, *more, "--method", "rtn", "--target-bpw", 5.8)
        done("allocate", llama, *run, "--table", errors(fmt), "-o", output)
    assert Path("a.toml").read_bytes() == Path("b.toml").read_bytes()
