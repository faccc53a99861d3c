"""What choices cost: what is tried, how much is kept meanwhile, and whether predictions hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.find import SourceSettings
from ptq_cli.commands.allocate import AllocateJob
from ptq_cli.commands.plan_allocation import prepare_allocation
from ptq_cli.core.layer import Layer
from ptq_cli.models.forward.linear import as_tensor
from ptq_cli.plan.allocation import Budget
from ptq_cli.run import measure_choices
from ptq_cli.run.quantize_unit import quantize_unit
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.tokens import TokenSettings
from tests.builders import SAMPLE
from tests.calibration.test_trials import tokens_of, whole_models
from tests.run.tiny_llama import tiny_llama

CHOICES = ("W2A16", "W3A16", "W4A16", "W6A16")


def job_of(
    model: Path,
    folder: Path,
    tokens: TokenSettings,
    method: str,
    choices: tuple[str, ...] = CHOICES,
    **settings: Any,
) -> AllocateJob:
    budget = Budget(bits_per_weight=5, choices=choices)
    source, table = SourceSettings(tokens=tokens), folder / "t.json"
    return prepare_allocation(method, model, settings, budget, {}, source, table=table)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> dict[Layer, Any]:
    """The layers as they are rounded on the way, decoded."""
    found: dict[Layer, Any] = {}

    def noting(unit: Any, statistics: Any, load: Any, rounding: Any, prepared: Any) -> Any:
        tensors, rows = quantize_unit(unit, statistics, load, rounding, prepared)
        for layer in unit.layers:
            own = {spec.name: tensors[spec.name] for spec in rounding.fmt.specs(layer)}
            values = as_tensor(layer, rounding.fmt.decode(layer, own))
            found[layer] = np.asarray(getattr(values, "values", values))
        return tensors, rows

    monkeypatch.setattr(measure_choices, "quantize_unit", noting)
    return found


def ranks(values: Any) -> Any:
    return np.argsort(np.argsort(values))


@pytest.mark.slow(8)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_predictions_rank_as_what_is_measured(
    tmp_path: Path, rounded: Mapping[Layer, Any], method: str
) -> None:
    """20 random allocations, on tokens that no layer was calibrated on."""
    tokens = TokenSettings(SAMPLE / "calibration_tokens.npy", nsamples=24, seq_len=96)
    job = job_of(SAMPLE, tmp_path, tokens, method, group_size=64)
    job.run(RunOptions())
    source = tokens_of(SAMPLE, path=SAMPLE / "eval_tokens.npy")
    random, costs = np.random.default_rng(5), job.costs()
    predicted, trials = [], {}
    for number in range(20):
        picks = {group.name: str(random.choice([*group.layers])) for group in job.work.groups}
        predicted.append(sum(costs[name][pick] for name, pick in picks.items()))
        layers = [x for g in job.work.groups for x in g.layers[picks[g.name]]]
        trials[number] = {x.tensor: lambda x=x: rounded[x] for x in layers}  # type: ignore[misc]
    ids = np.load(SAMPLE / "eval_tokens.npy")[:8, :128].astype(np.int64)
    measured = [*whole_models(source, trials, ids).values()]
    assert np.corrcoef(ranks(predicted), ranks(measured))[0, 1] >= 0.9


@pytest.mark.parametrize(
    ("method", "choices", "times"),
    [
        ("gptq", ("W2A16", "W4A16", "W6A16"), 1),
        ("gptq", ("Q4_0", "Q5_0", "Q8_0"), 1),
        ("gptq", ("NVFP4A16", "FP8_DYNAMIC"), 2),  # groups of 16, and rows
        ("awq", ("W2A16", "W4A16"), 1),
    ],
)
def test_a_site_is_factored_once_for_all_choices_that_group_its_columns_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    choices: tuple[str, ...],
    times: int,
) -> None:
    """And the numbers are those of every choice by itself."""
    model, prepare, sites = tiny_llama(tmp_path / "m", 64), measure_choices.prepare_unit, []

    def noting(unit: Any, *arguments: Any) -> Any:
        sites.append(unit.site)
        return prepare(unit, *arguments)

    monkeypatch.setattr(measure_choices, "prepare_unit", noting)
    group_size = {"group_size": 16} if choices[0].startswith("W") else {}
    arguments = (model, tmp_path, TokenSettings(model / "tokens.npy"), method, choices)
    job = job_of(*arguments, **group_size)
    job.run(RunOptions())
    assert len(sites) == times * len(set(sites))
    assert len(set(sites)) >= 8
    alone = job_of(*arguments, **group_size)
    alone.table.errors.clear()
    monkeypatch.setattr(measure_choices, "quantize_unit", lambda *own: quantize_unit(*own[:4]))
    alone.run(RunOptions())
    assert alone.table.errors == job.table.errors
