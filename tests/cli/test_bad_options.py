"""Options that are wrong, or contradict one another or the model."""

from __future__ import annotations

import os

import pytest

from tests.builders import ptq
from tests.refusals import refused


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "1"], ["--bits", "9"], ["--bits", "4.5"], ["--bits", ""], ["--bits"],
        ["--group-size", "-2"], ["--group-size", "x"], ["--damp-percent", "-1"],
        ["--damp-percent", "99"], ["--act-order", "wild"], ["--refine", "-1"], ["--sweeps", "101"],
        ["--scale-dtype", "int8"], ["--format", "zip"], ["--nonsense"], ["--max-fallbacks", "-1"],
        ["--min-gain", "much"], ["another-argument"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(options, job):
    before = os.listdir()
    outcome = ptq("gptq", job, *options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "Error: " in outcome.err
    assert os.listdir() == before


@pytest.mark.parametrize("arguments", [["gptq"], ["nonsense"], ["eval", "a"], ["--nonsense"]])
def test_wrong_commands_are_exit_code_2(arguments):
    assert ptq(*arguments).code == 2


@pytest.mark.parametrize(
    "options",
    [["--damp-percent", "nan"], ["--narrow-range", "--asym"], ["--ignore", "("],
     ["--ignore", "a{99999999999}"], ["--ignore", "(" * 5000 + ")" * 5000],
     ["--ignore", "no_such_name"], ["--include", "no_such_name"], ["--include", "bias"],
     ["--ignore", "."]],
    ids=lambda options: options[-1][:20],
)  # fmt: skip
def test_settings_that_contradict_themselves_or_the_model(options, job):
    word = options[-1][:20] if options[0] in ("--ignore", "--include") else ""
    words = (word,) if options[-1] != "." else ("nothing", "left to quantize")[1:]
    refused("gptq", job, "--activations", "acts", *options, words=words)
