"""`--effort`: how long gptq tries, where passes are not given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq


def rounded(job: Path, *options: object) -> tuple[dict[str, object], np.ndarray]:
    """The settings in the report, and all codes."""
    words = ("--activations", "acts", "--json", "--force", "-o", "out")
    made = ptq("gptq", job, *options, *words)
    assert made.code == 0
    folder = open_quantized(Path("out"))
    codes = [folder.load(module).codes.ravel() for module in sorted(folder.layers)]
    return made.document["settings"], np.concatenate(codes)


@pytest.mark.parametrize(("effort", "sweeps"), [("fast", 0), ("default", 2), ("best", 10)])
def test_an_effort_is_short_for_passes(effort, sweeps, job):
    by_name = rounded(job, "--effort", effort)
    stated = rounded(job, "--sweeps", sweeps)
    assert (by_name[0]["effort"], by_name[0]["sweeps"]) == (effort, sweeps)
    assert by_name[0]["refine"] == stated[0]["refine"] == 2
    assert np.array_equal(by_name[1], stated[1])


def test_passes_that_are_given_go_before(job):
    given = rounded(job, "--effort", "best", "--sweeps", 1, "--refine", 0)
    assert (given[0]["sweeps"], given[0]["refine"]) == (1, 0)
    assert np.array_equal(given[1], rounded(job, "--sweeps", 1, "--refine", 0)[1])


def test_a_recipe_states_it_too_and_the_command_line_goes_before(job):
    Path("recipe.toml").write_text('effort = "fast"\n')
    recipe = ("--config", "recipe.toml")
    assert rounded(job, *recipe)[0]["sweeps"] == 0
    assert rounded(job, *recipe, "--effort", "best")[0]["sweeps"] == 10
    assert rounded(job, *recipe, "--sweeps", 3)[0]["sweeps"] == 3


def test_an_unknown_effort_names_those_there_are(job):
    assert ptq("gptq", job, "--effort", "most", "-o", "out").code == 2
    Path("recipe.toml").write_text('effort = "most"\n')
    outcome = ptq("gptq", job, "--config", "recipe.toml", "-o", "out")
    assert outcome.code == 1
    assert "effort = 'most'" in outcome.errors[0]
    assert "fast, default, best" in outcome.errors[0]
    assert not Path("out").exists()
