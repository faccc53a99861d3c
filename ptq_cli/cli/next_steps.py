"""What to do with what a command has just made: the command lines, ready to be pasted."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ptq_cli.cli.shared_options import gates_set
from ptq_cli.core.layer import Layer
from ptq_cli.core.report import RunReport
from ptq_cli.plan.grid_settings import FLOAT_BITS
from ptq_cli.registry import format_named
from ptq_cli.run.repack import may_become
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings

# The runtime that most people load a format with.
_RUNTIME = {
    "compressed-tensors": "vllm",
    "gptq": "vllm",
    "gptq_v2": "gptqmodel",
    "awq": "vllm",
    "fp8": "vllm",
    "gguf": "llama.cpp",
    "mlx": "mlx",
}
_TOKENS = (*(field.name for field in fields(TokenSettings)), "min_expert_tokens")
Step = tuple[str, Sequence[object]]


def quoted(word: object) -> str:
    """A word as a shell takes it, in printable characters that stdout can show."""
    text = str(word)
    encoding = sys.stdout.encoding or "ascii"
    if text.isprintable() and text.encode(encoding, "replace").decode(encoding) == text:
        return shlex.quote(text)
    raw = text.encode("utf-8", "surrogateescape")
    kept = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in raw)
    return f"$'{''.join(kept)}'"


def as_line(words: Sequence[object]) -> str:
    return " ".join(map(quoted, words))


def path(value: object) -> str:
    """A path that cannot be taken for an option."""
    return f".{os.sep}{value}" if str(value).startswith("-") else str(value)


def after(
    report: RunReport, given: Mapping[str, Any], output: str, layers: Sequence[Layer] = ()
) -> Iterator[Step]:
    """What for, and the words of a command.

    given: the parameters of the command that was run; layers: what was written, where a runtime
        could load it: a model with its config.json
    """
    if report.command == "eval":
        yield from _after_eval(report, given)
        return
    if report.settings.get("bits") == FLOAT_BITS:
        yield "to round it", ("ptq", "rtn", path(output), "--scheme", "W8A8")
        return
    if not report.rows:
        return
    if report.settings.get("method") != "repack":
        tokens = _given(given, *_TOKENS)
        what = f"to measure it{', better on other tokens' if tokens else ''}"
        words = ["ptq", "eval", path(given["model"]), path(output)]
        yield what, [*words, *(tokens or _source(given))]
    fmt = str(report.settings["format"])
    if not layers:
        return
    if fmt == "ptq":
        folder = open_quantized(Path(output))
        fitting = (name for name in _RUNTIME if may_become(folder, format_named(name)))
        if name := next(fitting, None):
            yield "for a runtime", ("ptq", "pack", path(output), "--format", name)
    elif runtime := given.get("runtime") or _RUNTIME.get(fmt):
        yield "before loading it", ("ptq", "check", path(output), "--runtime", runtime)


def _given(given: Mapping[str, Any], *names: str) -> list[object]:
    """Options as they were given."""
    words: list[object] = []
    for name in names:
        values = given.get(name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None:
                words += [f"--{name.replace('_', '-')}", path(value)]
    return words


def _source(given: Mapping[str, Any]) -> list[object]:
    """Where statistics come from, as it was given."""
    words = _given(given, "calibration", "activations")
    return [*words, *(["--bf16"] if given.get("bf16") and words else [])]


def _after_eval(report: RunReport, given: Mapping[str, Any]) -> Iterator[Step]:
    """The same evaluation with gates that it passes, if none were set."""
    gain, worst = report.totals["gain_vs_rtn"], report.totals["worst_rel_err"]
    if gates_set(given) or not gain or not worst or report.weak:
        return
    sides = (path(given["original"]), path(given["quantized"]))
    words: list[object] = ["ptq", "eval", *sides, *_source(given)]
    if gain > 1.15:
        words += ["--min-gain", f"{math.floor(9 * gain) / 10:g}"]
    words += ["--max-rel-err", _above(worst), *_given(given, *_TOKENS)]
    if report.quality is not None:
        words += ["--max-kl", _above(report.quality["kl"]["quantized"]["mean"])]
    yield "to keep it so in CI", words


def _above(value: float) -> str:
    """A limit a quarter above a value, in two digits, rounded up."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(1.25 * value)) - 1)
    return f"{math.ceil(1.25 * value / step) * step:.2g}"


def after_calibration(model: Path, output: Path, default: Path) -> Step:
    words: list[object] = ["ptq", "gptq", path(model), "--bits", 4, "--group-size", 128]
    if output != default:
        words += ["--calibration", path(output)]
    return "to use it", words


def after_allocation(model: Path, method: str, recipe: Path, given: Mapping[str, Any]) -> Step:
    """given: the parameters of ptq allocate"""
    words: list[object] = ["ptq", method, path(model), "--config", path(recipe)]
    source = _given(given, *_TOKENS) or _given(given, "imatrix") or _source(given)
    return "to use it", [*words, *source]
