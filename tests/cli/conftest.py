"""Fixtures of the command-line tests: each test stands in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests import builders
from tests.builders import ROOT


@pytest.fixture(autouse=True)
def _here(here):
    pass


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A copy of sample_data, half as deep."""
    return builders.half_sample(tmp_path_factory.mktemp("sample") / "sample_data")


@pytest.fixture(scope="session")
def one_block(tmp_path_factory) -> Path:
    """A copy of sample_data, a quarter as deep."""
    return builders.half_sample(tmp_path_factory.mktemp("block") / "sample_data", blocks=1)


@pytest.fixture(scope="session")
def whole_sample(tmp_path_factory) -> Path:
    """A copy of sample_data."""
    return builders.copy_sample(tmp_path_factory.mktemp("whole") / "sample_data")


@pytest.fixture(scope="session")
def made(sample, tmp_path_factory):
    """What a command makes of the sample, each made once: `made("rtn", "--format", "gptq")` is a
    folder, not to be changed."""
    folders: dict[tuple[object, ...], Path] = {}

    def make(command: str, *options: object) -> Path:
        words = (command, *options)
        if words not in folders:
            folder = tmp_path_factory.mktemp("made") / "out"
            outcome = builders.ptq(command, sample, *options, "-o", folder)
            assert outcome.code == 0, outcome.err
            folders[words] = folder
        return folders[words]

    return make


@pytest.fixture(scope="session")
def check_report():
    """Hold a report against the schema in the package, and its totals against its rows."""
    schema = json.loads((ROOT / "ptq_cli" / "report" / "report.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)

    def check(document):
        validator.validate(document)
        check_totals(document)
        return document

    return check


def check_totals(document):
    """The totals, computed anew from the rows."""
    rows, totals = document["layers"], document["totals"]
    errors = [first(row["heldout_rel_err"], row["rel_err"]) for row in rows]
    rtn = [first(row["rtn_heldout_rel_err"], row["rtn_rel_err"]) for row in rows]
    mean, rtn_mean = sum(errors) / len(rows), sum(rtn) / len(rows)
    assert totals["layers"] == len(rows)
    assert totals["left_alone"] == len(document["left_alone"])
    assert totals["mean_rel_err"] == pytest.approx(mean)
    assert totals["worst_rel_err"] == max(errors)
    assert totals["worst_layer"] == rows[errors.index(max(errors))]["module"]
    assert totals["rtn_mean_rel_err"] == pytest.approx(rtn_mean)
    assert totals["gain_vs_rtn"] == (pytest.approx(rtn_mean / mean) if mean else None)
    assert totals["fallbacks"] == sum(row["fallback"] is not None for row in rows)
    assert totals["compression_ratio"] == pytest.approx(
        totals["bytes_before"] / totals["bytes_after"]
    )
    weights = sum(row["bytes"] * 8 / row["bits_per_weight"] for row in rows)
    stored = sum(row["bytes"] * 8 for row in rows)
    assert totals["bits_per_weight"] == pytest.approx(stored / weights)


def first(value, other):
    return other if value is None else value
