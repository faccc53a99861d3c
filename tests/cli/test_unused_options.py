"""Options that do nothing are errors that say what would make them count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import pytest

import ptq_cli
from ptq_cli.cli import quantize
from ptq_cli.cli.main import cli
from ptq_cli.core.settings import settings_fields
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import settings_classes
from tests.builders import SAMPLE, ptq

TOKENS = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", "2")

# A command, options, the one that does nothing, and what it needs.
CASES = [
    ("smoothquant --refine 77", "--refine 77", "--then gptq"),
    ("smoothquant --act-order desc", "--act-order desc", "--then gptq"),
    ("smoothquant --activation-scheme none --activation-bits 4", "--activation-bits 4",
     "--activation-scheme dynamic-token or dynamic-tensor or static"),
    ("smoothquant --no-mse --weight hessian", "--weight hessian", "--mse"),
    ("smoothquant --bits 16 --sweeps 2", "--sweeps 2", "--then gptq"),
    ("awq --damp-percent 0.1", "--damp-percent 0.1", "--then gptq"),
    ("awq --effort best", "--effort best", "--then gptq"),
    ("awq --mse", "--mse", "--then gptq"),
    ("awq --then gptq --no-compare --no-clip", "--no-clip", "--then awq or --compare"),
    ("awq --then gptq --no-compare --no-mse --weight hessian", "--weight hessian", "--mse"),
    ("gptq --drift 0.5", "--drift 0.5", "--tokens, --text or --chat, without --parallel-layers"),
    ("gptq --no-mse --weight hessian", "--weight hessian", "--mse"),
    ("rtn --no-mse --weight hessian", "--weight hessian", "--mse"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sample(one_block):
    return one_block


@pytest.mark.parametrize(("line", "option", "needs"), CASES)
def test_a_setting_that_is_not_read_is_refused(line, option, needs, sample):
    command, *options = line.split()
    outcome = ptq(command, sample, *options, "-o", "out")
    assert outcome.code == 1
    (error,) = outcome.errors
    assert f"{option} does nothing here; it needs {needs}" in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "line", "needs"),
    [
        ("smoothquant", "refine = 77", "--then gptq"),
        ("smoothquant", "refine = 2", "--then gptq"),
        ("pack", 'weight = "hessian"', "--mse and calibration"),
    ],
)
def test_a_recipe_states_it_even_where_it_is_the_default(command, line, needs, sample):
    Path("recipe.toml").write_text(line)
    outcome = ptq(command, sample, "--config", "recipe.toml", "-o", "out")
    assert outcome.code == 1
    name = line.split()[0]
    (error,) = outcome.errors
    assert f"{name} (of the recipe) does nothing here; it needs {needs}" in error


def test_what_scheme_is_short_for_was_not_asked_for(sample):
    """W4A16 names a scheme of inputs, which GPTQ does not have."""
    assert ptq("gptq", sample, "--scheme", "W4A16", "--dry-run", "--json").code == 0


def test_from_python(sample):
    with pytest.raises(InputError, match=r"--refine 3 does nothing here\sit needs --then gptq"):
        ptq_cli.smoothquant(sample, refine=3, output="out")
    with pytest.raises(InputError, match="--seed needs --nsamples"):
        ptq_cli.gptq(sample, tokens=TOKENS[1], seed=0, output="out")


def test_gptq_on_no_statistics(job):
    """With --fallback rtn every layer is rounded to nearest."""
    outcome = ptq("gptq", job, "--fallback", "rtn", "--refine", 3, "-o", "out")
    assert outcome.code == 1
    assert "--refine 3 does nothing here; it needs calibration" in outcome.errors[0]


OTHERS = [
    ("gptq MODEL TOKENS --nsamples 2 --parallel-layers --drift 1", 1, "--drift 1 does nothing"),
    ("gptq MODEL TOKENS --seed 1", 1, "--seed needs --nsamples"),
    ("gptq MODEL TOKENS --bf16", 1, "--bf16 is about activations"),
    ("gptq MODEL --parallel-layers", 1, "--parallel-layers needs --tokens, --text or --chat"),
    ("smoothquant MODEL --bits 16 --runtime vllm", 1, "--runtime"),
    ("pack MODEL --weight hessian", 2, "No such option"),
    ("smoothquant MODEL --bits 16 --max-rel-err 1", 2, "--max-rel-err: nothing is rounded"),
    ("pack PACKED --no-mse", 1, "--mse has no effect"),
    ("pack PACKED --scheme W8A8", 1, "--scheme has no effect"),
    ("pack PACKED --scheduler tcp://127.0.0.1:1", 2, "--scheduler does nothing"),
    ("pack PACKED --min-gain 1", 2, "--min-gain: repacking measures nothing"),
    ("pack PACKED --workers 2", 2, "--workers does nothing here: one process repacks"),
    ("pack PACKED --max-memory 1GB", 2, "--max-memory does nothing here"),
    ("inspect PACKED --bf16", 1, "quantized already"),
    ("eval MODEL PACKED --max-kl 0", 2, "perplexity and KL need --tokens, --text or --chat"),
    ("eval MODEL PACKED --percentile 1.0", 2, "--percentile need --activation-scheme"),
    ("eval MODEL PACKED --activation-scheme static --percentile 0.5", 1,
     "--percentile 0.5 does nothing here\nptq: hint: it needs --activation-scheme dynamic-token"),
    ("eval BARE PACKED --activation-scheme static", 1,
     "--activation-scheme static does nothing here"),
    ("calibrate MODEL TOKENS --fallback error", 2, "--fallback does nothing with --tokens"),
    ("calibrate MODEL TOKENS --bf16", 2, "--bf16 does nothing with --tokens"),
    ("calibrate MODEL --merge a --heldout-every 0", 2, "--heldout-every does nothing with --merge"),
    ("calibrate MODEL --heldout-every 0 --heldout-limit 9", 2, "--heldout-limit does nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), OTHERS)
def test_other_options_that_are_not_read(line, code, words, sample):
    places = {"MODEL": [sample], "TOKENS": TOKENS[:2], "PACKED": ["packed"], "BARE": ["bare"]}
    if "BARE" in line:
        shutil.copytree(sample, "bare", ignore=shutil.ignore_patterns("activations"))
    if "PACKED" in line:
        assert ptq("pack", sample, "-o", "packed").code == 0
    arguments = [part for word in line.split() for part in places.get(word, [word])]
    outcome = ptq(*arguments)
    assert outcome.code == code
    assert words in outcome.err


MODES = [
    *("rtn", "pack", "gptq TOKENS", "awq --then gptq", "smoothquant", "smoothquant --bits 16"),
    *(
        pytest.param(mode, marks=pytest.mark.slow)
        for mode in (
            "rtn --no-mse", "pack --mse", "gptq", "gptq --no-mse", "gptq TOKENS --parallel-layers",
            "awq", "awq --then gptq --no-compare", "smoothquant --then gptq TOKENS",
            "smoothquant --activation-scheme none",
        )
    ),
]  # fmt: skip
VALUES: dict[Any, tuple[Any, ...]] = {int: (3, 5), float: (0.25, 0.5), tuple[str, ...]: ("q_proj",)}


def fingerprint(model: Path, mode: str, extra: tuple[str, ...] = ()) -> str | None:
    """What the job is told from others by; None: refused, as it does nothing."""
    command, *words = mode.split()
    words = [str(part) for word in words for part in (TOKENS if word == "TOKENS" else [word])]
    top = click.Context(cli, **cli.context_settings)
    arguments = [str(model), *words, *extra]
    try:
        made = getattr(quantize, command).make_context(command, arguments, parent=top)
        job = quantize._job(command, made.params.pop("model"), made.params)
    except click.NoSuchOption:
        return None
    except InputError as error:
        if "does nothing here" in str(error):
            return None
        return f"other: {error}"
    return repr(job.target().job)


def spellings(field: Any, kind: Any) -> list[tuple[str, ...]]:
    word = "--" + field.name.replace("_", "-")
    if kind is bool:
        return [(word,), (f"--{field.metadata.get('off', 'no-' + word[2:])}",)]
    if field.name == "format":
        return [(word, "ptq"), (word, "mlx")]
    return [(word, str(v)) for v in field.metadata.get("choices", VALUES.get(kind, (0.25, "auto")))]


@pytest.mark.parametrize("mode", MODES)
def test_every_setting_is_read_or_refused(mode, sample):
    """Whatever its value, a setting is refused; or what is done depends on its value."""
    command = mode.split()[0]
    plain = fingerprint(sample, mode)
    for field, kind in settings_fields(*settings_classes(command)):
        if field.metadata.get("recipe_only") or f"--{field.name}" in mode:
            continue
        found = [fingerprint(sample, mode, extra) for extra in spellings(field, kind)]
        accepted = [entry for entry in found if entry is not None and entry[:6] != "other:"]
        if None in found:
            assert not accepted, field.name
        else:
            assert set(found) != {plain}, field.name
