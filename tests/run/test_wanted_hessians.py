"""Hessians are summed where something reads more than their diagonal, and nowhere else."""

from __future__ import annotations

import pytest

from ptq_cli.numerics import statistics
from tests.builders import ptq, small_job
from tests.run.tiny_llama import tiny_llama

SUMMED = "a whole Hessian was summed"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("wanted") / "model")


@pytest.fixture(autouse=True)
def noticed(monkeypatch):
    def mirror(matrix):
        raise AssertionError(SUMMED)

    monkeypatch.setattr(statistics, "_mirror", mirror)


def from_tokens(model, *words):
    tokens = ("--tokens", model / "tokens.npy", "--group-size", 16)
    return ptq(*words, model, *tokens, "-o", model.parent / "-".join(words))


@pytest.mark.parametrize(
    "words",
    [(name, *more) for name in ("rtn", "smoothquant") for more in ((), ("--parallel-layers",))],
    ids=" ".join,
)
def test_nothing_reads_them(model, words):
    outcome = from_tokens(model, *words)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "words",
    [("gptq",), ("awq", "--no-compare"), ("smoothquant", "--then", "gptq")],
    ids=" ".join,
)
def test_something_reads_them(model, words):
    assert SUMMED in from_tokens(model, *words).err


@pytest.mark.parametrize(("method", "summed"), [("rtn", False), ("gptq", True)])
def test_of_activations(tmp_path, method, summed):
    model, activations = small_job(tmp_path)
    outcome = ptq(method, model, "--activations", activations, "-o", tmp_path / "out")
    assert (SUMMED in outcome.err, outcome.code == 0) == (summed, not summed), outcome.err


def test_a_file_of_statistics_has_them(model):
    tokens = ("--tokens", model / "tokens.npy")
    assert SUMMED in ptq("calibrate", model, *tokens, "-o", model.parent / "c.safetensors").err
