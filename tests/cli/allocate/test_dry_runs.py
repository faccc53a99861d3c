"""`--dry-run` of a budget: what is to be measured or would be decided; and where it is written."""

from __future__ import annotations

import os
from pathlib import Path

from tests.builders import ptq, tree
from tests.cli.allocate.words import BUDGET, QUICK, TOKENS, WIDTHS, done, recipe_of, refuse


def test_a_dry_run_says_what_is_to_be_measured(model):
    run = ("allocate", model, *TOKENS(model), *BUDGET, *QUICK, "--dry-run")
    outcome = done(*run)
    assert "to measure: 14 layers at 3 choices, 16 trials on 192 tokens" in outcome.out
    assert "W4A16" in outcome.out
    document = done(*run, "--trial-tokens", 30, "--json").document
    assert document["to_measure"] == 14
    assert document["trial_tokens"] == 24  # two of the sequences
    assert document["allocation"] is None
    done("rtn", model, *TOKENS(model), *BUDGET, *WIDTHS, "--dry-run", "-o", "out")
    assert [path.name for path in Path().iterdir()] == ["m"]


def test_a_dry_run_shows_what_would_be_decided(measured):
    before = tree(Path())
    run = (measured, *TOKENS(measured), "--target-bpw", 5, *WIDTHS, "--dry-run")
    outcome = done("allocate", *run, "--method", "rtn")
    assert "measured already" in outcome.out
    assert "allocated" in outcome.out
    document = done("allocate", *run, "--method", "rtn", "--json").document
    assert document["to_measure"] == 0
    assert document["allocation"]["bits_per_weight"] <= 5
    planned = ptq("rtn", *run, "-o", "out", "--json").document
    assert {row["bits"] for row in planned["layers"]} > {2}
    assert tree(Path()) == before


def test_a_recipe_needs_room_where_it_goes_and_nowhere_else(measured, monkeypatch):
    Path("elsewhere").mkdir()
    Path("m.choices.json").rename("elsewhere/t.json")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path())
    run = ("allocate", measured, *TOKENS(measured), *BUDGET, *QUICK, "--table", "elsewhere/t.json")
    done(*run, "-o", "elsewhere/r.toml")
    assert recipe_of("elsewhere/r.toml")["layers"]
    refuse(*run, "-o", "r.toml", words=("not writable",))
