"""--tokens on the command line: calibrate, gptq, eval, and the torch capture's absence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptq_cli.calibration.from_torch import capture
from ptq_cli.cli.main import run
from ptq_cli.errors import InputError

SAMPLE = Path(__file__).parents[2] / "sample_data"
SMALL = ["--nsamples", "8", "--seq-len", "32"]
TOKENS = ["--tokens", str(SAMPLE / "calibration_tokens.npy"), *SMALL]
EVALUATION = ["--tokens", str(SAMPLE / "eval_tokens.npy"), *SMALL]


def ptq(capsys: Any, *words: str) -> tuple[int, str, str]:
    code = run(list(words))
    output = capsys.readouterr()
    return code, output.out, output.err


def test_from_tokens_to_a_gate(capsys: Any, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    out = str(tmp_path / "out")
    model = str(SAMPLE)
    code, text, _ = ptq(capsys, "gptq", model, "-b", "3", "--asym", *TOKENS, "-o", out, "--json")
    assert code == 0
    assert json.loads(text)["totals"]["calibrated"]
    arguments = ["eval", model, out, *EVALUATION]
    code, text, _ = ptq(capsys, *arguments, "--kl-per-block", "--json")
    document = json.loads(text)
    schema = Path(__file__).parents[2] / "ptq_cli" / "report" / "report.schema.json"
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(document)
    assert len(document["quality"]["kl_per_block"]) == 4
    code, text, error = ptq(
        capsys, *arguments, "--max-kl", "1e-9", "--max-perplexity-increase", "9"
    )
    assert code == 3
    assert "--max-kl" in error
    assert "perplexity" in text
    assert "rtn" in text
    assert "\u00b1" in text or "\\xb1" in text


@pytest.mark.parametrize("command", ["calibrate", "gptq", "awq"])
def test_more_sequences_than_there_are(command: str, capsys: Any, tmp_path: Path) -> None:
    words = ["--tokens", str(SAMPLE / "eval_tokens.npy"), "-o", str(tmp_path / "out")]
    code, _, error = ptq(capsys, command, str(SAMPLE), *words, "--nsamples", "129")
    assert code == 1
    assert "eval_tokens.npy: 128 sequences, fewer than --nsamples 129" in error


def test_calibrate_with_tokens(capsys: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "stats.safetensors")
    code, text, _ = ptq(capsys, "calibrate", str(SAMPLE), *TOKENS, "-o", out)
    assert code == 0
    assert "17 sites" in text


@pytest.mark.parametrize(
    "words",
    [
        ["calibrate", str(SAMPLE), *TOKENS, "--activations", str(SAMPLE / "activations")],
        ["eval", str(SAMPLE), str(SAMPLE), "--max-kl", "1"],
        ["eval", str(SAMPLE), str(SAMPLE), "--kl-per-block"],
    ],
)
def test_words_that_contradict_each_other(capsys: Any, words: list[str]) -> None:
    assert ptq(capsys, *words)[0] == 2


def test_capture_without_torch_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match="needs torch"), capture(None, SAMPLE):
        pass
