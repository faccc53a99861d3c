"""`ptq diff`: what changed between two reports, and did it become worse."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import click

from ptq_cli.cli import console
from ptq_cli.cli.diff_files import document_of_files, show_files
from ptq_cli.cli.shared_options import PATH
from ptq_cli.core.names import fold_names
from ptq_cli.errors import GateMissed, InputError
from ptq_cli.report.compare import Change, Difference, difference
from ptq_cli.storage.quantized import gguf_of, is_gguf_file
from ptq_cli.storage.reports import read_report

_SHOWN = 5


@click.command("diff")
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.01,
    show_default=True,
    metavar="X",
    help="Fail where something became worse by more than this fraction of what it was.",
)
@click.option(
    "--top",
    default=20,
    show_default=True,
    metavar="N",
    help="Layers in the table, those that became worst first; 0 shows all.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option(
    "--allow-weak-calibration",
    "allow_weak",
    is_flag=True,
    help="Do not fail where errors were measured on what was calibrated on, on very few inputs, or"
    " on the same again and again.",
)
def diff(
    before: Path, after: Path, tolerance: float, top: int, as_json: bool, allow_weak: bool
) -> None:
    """Say what changed from the report BEFORE to AFTER: settings, layers, errors, size, perplexity.

    Each is an output folder, its report.json, or a file of --report. Exits 3 where something
    became worse by more than --tolerance, or where the errors of one were measured on inputs that
    say little.

    Two GGUF files of one model are compared themselves where a report of either is missing: types,
    sizes, key-values, and how far the values of each tensor are apart. Nothing of that is better or
    worse.

    \b
    ptq diff model-gptq-w4g128 candidate --tolerance 0.02
    ptq diff theirs-Q4_K_M.gguf model-gptq-Q4_K_M/model.gguf
    """
    if not isfinite(tolerance):
        raise click.UsageError("--tolerance is a number like 0.01")
    sides = (before, after)
    if any(map(is_gguf_file, sides)) and not all(map(_has_report, sides)):
        _diff_files(before, after, top, as_json)
        return
    found = difference(read_report(before)[0], read_report(after)[0])
    worse = found.worse(tolerance)
    if as_json:
        console.print_json(_document(found, tolerance, worse))
    else:
        _show(found, top)
    if worse:
        named = ", ".join(f"{c.name} {_moved(c)}" for c in worse[:_SHOWN])
        more = f" and {len(worse) - _SHOWN} more" if len(worse) > _SHOWN else ""
        raise GateMissed(f"worse by more than {100 * tolerance:g} %: {named}{more}")
    if found.weak and not found.same and not allow_weak:
        raise GateMissed(
            f"not comparable, on weak calibration: {'; '.join(found.weak)}",
            hint="--allow-weak-calibration",
        )


def _has_report(path: Path) -> bool:
    try:
        read_report(path)
    except InputError:
        return False
    return True


def _diff_files(before: Path, after: Path, top: int, as_json: bool) -> None:
    """Two GGUF files, or what an output folder holds."""
    from ptq_cli.evaluation.gguf_difference import gguf_difference

    files = [gguf_of(path) for path in (before, after)]
    for path, file in zip((before, after), files, strict=True):
        if file is None:
            raise InputError(
                f"{path} is no GGUF file, and the other one is",
                hint="compare two, or the reports of two outputs",
            )
    found = gguf_difference(*[file for file in files if file is not None])
    if as_json:
        console.print_json(document_of_files(found))
    else:
        show_files(found, top)


def _document(found: Difference, tolerance: float, worse: list[Change]) -> dict[str, Any]:
    def entry(change: Change) -> dict[str, Any]:
        part = change.worse if isfinite(change.worse) else None
        missed = change in worse
        return {"before": change.before, "after": change.after, "worse": part, "missed": missed}

    return {
        "same": found.same,
        "tolerance": tolerance,
        "missed": len(worse),
        "settings": {k: {"before": b, "after": a} for k, (b, a) in found.settings.items()},
        "totals": {change.name: entry(change) for change in found.totals},
        "layers": {change.name: entry(change) for change in found.layers},
        "added": list(found.added),
        "removed": list(found.removed),
        "measured": list(found.measured),
        "weak": list(found.weak),
    }


def _show(found: Difference, top: int) -> None:
    if found.same:
        console.line("no difference")
        return
    for key, (before, after) in found.settings.items():
        console.line(f"{key}: {_word(before)} -> {_word(after)}")
    for words in found.measured:
        console.line(f"not comparable: {words}")
    for words in found.weak:
        console.line(f"weak calibration: {words}")
    for title, modules in (("added", found.added), ("removed", found.removed)):
        if modules:
            console.line(f"{len(modules)} layers {title}: {fold_names(modules)}")
    shown = found.layers if top <= 0 else found.layers[:top]
    if found.totals:
        _table("total", found.totals)
    if shown:
        _table("layer", shown)
    if len(shown) < len(found.layers):
        console.line(f"... and {len(found.layers) - len(shown)} more (--top 0 shows all)")


def _table(title: str, changes: tuple[Change, ...]) -> None:
    rows = [
        [c.name, _number(c.before), _number(c.after), _moved(c), "worse" if worse else "better"]
        for c, worse in ((change, change.worse > 0) for change in changes)
    ]
    console.table((title, "before", "after", "change", ""), rows)


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _moved(change: Change) -> str:
    if change.before == 0:
        return f"from 0 to {_number(change.after)}"
    return f"{100 * (change.after - change.before) / abs(change.before):+.3g} %"


def _word(value: Any) -> str:
    return "unset" if value is None or value in ("", []) else str(value)
