"""Names are data: shown escaped, never interpreted, and they choose no path."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import OUTPUT, ptq, random_weight, write_model
from tests.refusals import refused

WEIRD = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "bidi": "a\u202egnp.exe",
    "newline": "two\nptq: error: lines\r",
    "null": "nul\0l",
    "markup": "[red]",
    "closing": "[/x]",
    "smile": ":smile:",
    "percent": "%s%d{0}",
    "up": "../../x",
    "root": "/etc/x",
    "empty": "",
    "dots": "...",
    "long": "x" * 10_000,
    "metadata": "__metadata__",
    "unicode": "héllo wörld 模型",
    "upper": "TWIN",
    "lower": "twin",
    "backslash": "a\\b",
    "quote": "a\"b'c",
    "regex": "a(b|c)*[",
    "config": "config.json",
}


@pytest.mark.parametrize("command", ["pack", "gptq"])
def test_weird_names_are_data(command, tmp_path):
    """They are shown escaped, never interpreted, and choose no path."""
    Path("in").mkdir()
    os.chdir("in")
    weights = {
        f"{name}.weight": random_weight(4, 8, seed=i) for i, name in enumerate(WEIRD.values())
    }
    write_model(Path("model.safetensors"), weights)
    outcome = ptq(command, "model.safetensors", "-o", "out", "--top", 0)
    assert outcome.code == 0, outcome.err
    for text in (outcome.out, outcome.err):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\0" not in text
        assert "\r" not in text
    for shown in (
        "[red]",
        "[/x]",
        ":smile:",
        "%s%d{0}",
        "../../x",
        "\\x1b[31mred",
        "\\u202e",
        "TWIN",
    ):
        assert shown in outcome.out
    assert sorted(os.listdir()) == ["model.safetensors", "out"]
    assert os.listdir(tmp_path) == ["in"]
    assert sorted(os.listdir("out")) == OUTPUT
    rows = {row["module"] for row in json.loads(Path("out/report.json").read_text())["layers"]}
    assert rows == set(WEIRD.values())
    for name in WEIRD.values():
        original = weights[f"{name}.weight"].astype(np.float32)
        assert np.abs(ptq_cli.load_weight("out", name) - original).max() < 0.01
    assert ptq("eval", "model.safetensors", "out", "--report", "r.csv").code == 0


def test_an_error_shows_a_long_or_hostile_name_safely(job):
    for name in ("\x1b[31m\nx", "y" * 10_000):
        weight = random_weight(4, 8)
        weight[0, 0] = np.nan
        write_model(Path("bad.safetensors"), {f"{name}.weight": weight})
        outcome = refused("pack", "bad.safetensors", words=("bad.safetensors", "[0, 0]"))
        assert "\x1b" not in outcome.err
        assert len(outcome.errors[0]) < 700
