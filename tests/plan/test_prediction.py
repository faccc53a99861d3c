"""What a recipe keeps of a prediction, and what it may say of one."""

from __future__ import annotations

import tomllib
from itertools import pairwise

import pytest

from ptq_cli.core.settings import make_settings
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.prediction import MOST_POINTS, Prediction, prediction_of, thinned
from ptq_cli.plan.recipe import recipe_text

SAID = {
    "predicted_kl": 0.0147,
    "bits_per_weight": 4.0,
    "bytes": 1462256,
    "curve": [[2.375, 0.258], [4.0, 0.0147], [6.375, 0.0007]],
    "uniform": {"W2A16": [2.375, 0.258], "W6A16": [6.375, 0.0007]},
}


def test_it_is_read_back_from_a_recipe():
    text = recipe_text({"bits": 4, "allocation": SAID, "layers": [{"match": "a"}]}, "gptq", [])
    assert tomllib.loads(text)["allocation"] == SAID
    assert prediction_of(tomllib.loads(text)) == Prediction(
        "predicted_kl", 0.0147, 4.0, ((2.375, 0.258), (4.0, 0.0147), (6.375, 0.0007)),
        {"W2A16": (2.375, 0.258), "W6A16": (6.375, 0.0007)},
    )  # fmt: skip


def test_a_long_curve_is_thinned_and_has_lines_that_can_be_read():
    points = [(2 + i / 1000, 1 / (i + 3)) for i in range(1237)]
    kept = thinned(points)
    assert len(kept) == MOST_POINTS
    assert kept[0] == [2.0, 0.3333]
    assert kept[-1] == [3.236, 0.0008071]
    steps = [b[0] - a[0] for a, b in pairwise(kept)]
    assert max(steps) < 1.1 * min(steps)
    text = recipe_text({"allocation": {"curve": kept}}, "gptq", [])
    assert max(map(len, text.splitlines())) <= 100
    assert tomllib.loads(text)["allocation"]["curve"] == kept


@pytest.mark.parametrize("count", [0, 1, 2, MOST_POINTS, MOST_POINTS + 1])
def test_a_short_curve_is_kept(count):
    kept = thinned([(2.0 + i, 0.5) for i in range(count)])
    assert len(kept) == min(count, MOST_POINTS)
    assert [bits for bits, _ in kept][-1:] == [1.0 + count][:count]


WRONG = [
    ("predicted_kl", "0.0147", "'0.0147': not a number, 0 or more"),
    ("predicted_kl", float("nan"), "nan: not a number, 0 or more"),
    ("predicted_rel_err", -1, "-1: not a number, 0 or more"),
    ("bits_per_weight", True, "True: not a number, 0 or more"),
    ("bits_per_weight", 10**400, f"1{'0' * 58}…: not a number, 0 or more"),
    ("bytes", None, "None: not a number, 0 or more"),
    ("curve", {"a": 1}, "{'a': 1}: not a list of [bits, cost]"),
    ("curve", [[1, 2], [3]], "[[1, 2], [3]]: not a list of [bits, cost]"),
    ("curve", [[1, "x"]], "[[1, 'x']]: not a list of [bits, cost]"),
    ("uniform", [[1, 2]], "[[1, 2]]: not a table of [bits, cost]"),
    ("uniform", {"W4A16": 3}, "{'W4A16': 3}: not a table of [bits, cost]"),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_what_is_no_prediction_is_refused_in_a_recipe_and_not_shown_of_a_report(key, value, words):
    settings = {"allocation": {**SAID, key: value}}
    with pytest.raises(InputError) as caught:
        make_settings(GridSettings, {}, settings)
    assert caught.value.message == f"allocation: {key} = {words}"
    assert prediction_of(settings) is None


@pytest.mark.parametrize("missing", ["predicted_kl", "bits_per_weight"])
def test_without_a_part_there_is_nothing_to_show(missing):
    said = {key: value for key, value in SAID.items() if key != missing}
    assert make_settings(GridSettings, {}, {"allocation": said}).allocation == said
    assert prediction_of({"allocation": said}) is None


@pytest.mark.parametrize("settings", [{}, {"allocation": {}}, {"allocation": [1]}])
def test_a_run_without_a_budget_predicts_nothing(settings):
    assert prediction_of(settings) is None


def test_curve_and_choices_may_be_deleted_from_a_recipe():
    found = prediction_of({"allocation": {"predicted_rel_err": 2, "bits_per_weight": 3}})
    assert found == Prediction("predicted_rel_err", 2.0, 3.0, (), {})
    assert not found.is_kl
