"""Recipes that are no TOML, no recipe, or no file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from tests.builders import ptq
from tests.refusals import refused

RECIPES = {
    "bitz = 4": ("bitz", "bits"),
    "grp_size = 4": ("grp_size", "group_size"),
    "zzzzz = 4": ("zzzzz", "known:"),
    "bits = 9": ("bits", "9"),
    "bits = 'four'": ("bits", "four"),
    "bits = true": ("bits",),
    "bits = 4.0": ("bits",),
    "group_size = -7": ("group_size", "-7"),
    "damp_percent = nan": ("damp_percent",),
    "damp_percent = inf": ("damp_percent",),
    "damp_percent = 2020-01-01": ("damp_percent",),
    "sym = 1": ("sym",),
    "act_order = 'wild'": ("act_order", "static"),
    "ignore = 'x'": ("ignore",),
    "ignore = [1]": ("ignore",),
    "format = 'zip'": ("format",),
    "method = 'rtn'": ("ptq rtn", "ptq gptq"),
    "method = 5": ("5",),
    "layers = 5": ("layers",),
    "layers = [5]": ("layers",),
    "[[layers]]\nbits = 4": ("match",),
    "[[layers]]\nmatch = 5": ("match",),
    "[[layers]]\nmatch = '.'\nbits = 9": ("bits", "9"),
    "[[layers]]\nmatch = '.'\nbitz = 9": ("bitz", "bits"),
    "[[layers]]\nmatch = '.'\nskip = 1": ("skip",),
    "[[layers]]\nmatch = '('": ("match", "("),
    "bits = ": ("TOML",),
    "[" * 20_000: ("TOML",),
    "bits = 4\nbits = 3": ("TOML",),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.items(), ids=[k[:30] for k in RECIPES])
def test_recipes_that_are_none(text, words, job):
    Path("recipe.toml").write_text(text)
    outcome = refused("gptq", job, "--activations", "acts", "--config", "recipe.toml")
    assert "recipe.toml" in outcome.errors[0]
    for word in words:
        assert word in outcome.errors[0]


def test_a_layer_rule_that_matches_nothing(job):
    Path("recipe.toml").write_text("[[layers]]\nmatch = 'no_such_name'\nbits = 3\n")
    arguments = ["gptq", job, "--activations", "acts", "--config", "recipe.toml"]
    refused(*arguments, words=("[[layers]]", "no_such_name"))


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes", "fifo"])
def test_recipes_that_are_no_text_files(kind, job):
    path = Path("r.toml")
    if kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe\0")
    elif kind == "fifo":
        os.mkfifo(path)
    outcome = ptq("gptq", job, "--config", path)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "r.toml" in outcome.errors[0]


def test_the_recipes_of_this_test_are_as_broken_as_they_look():
    unreadable = 0
    for text in RECIPES:
        try:
            tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            unreadable += 1
    assert unreadable == 3
