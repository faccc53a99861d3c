"""What people see: with progress.py the only importer of rich.

Warnings and errors go to stderr; the table of results goes to stdout, or with `--json`
one JSON document and nothing else. Names of tensors are data: they are escaped, and never read as
markup. Errors are printed raw, one line and one for the hint, never wrapped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from ptq_cli.core.report import LayerReport, RunReport
from ptq_cli.core.text import common_parents, middle, number, printable, size
from ptq_cli.errors import FileError
from ptq_cli.plan.prediction import prediction_of
from ptq_cli.report.report import row_error, row_rtn_error
from ptq_cli.report.words import (
    beside_measured,
    cached,
    measured_on,
    mixed,
    of_site,
    predicted,
    smoothed,
    times,
)

if TYPE_CHECKING:
    from rich.console import Console


def write(stream: TextIO, text: str) -> None:
    """Write one line to a stream, with escapes for what the stream cannot encode.

    Raises:
        FileError: the stream takes nothing (a full disk, a closed stdout).
        BrokenPipeError: its reader has left.
    """
    # rich puts a proxy in the place of stderr while lines are live.
    encoding = getattr(stream, "rich_proxied_file", stream).encoding or "ascii"
    safe = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(safe + "\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"stdout: {error.strerror}") from error


def say(kind: str, text: str) -> None:
    """One line on stderr: `ptq: <kind>: <text>`, very long words cut in their middle. A closed
    stderr is not an error."""
    with contextlib.suppress(OSError, ValueError, FileError):
        words = re.sub(r"\S{201,}", lambda word: middle(word[0], 200), printable(text))
        write(sys.stderr, f"ptq: {kind}: {words}")


def warn(text: str) -> None:
    say("warning", text)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    write(sys.stdout, json.dumps(document, indent=1, sort_keys=True, allow_nan=False))


def _console() -> Console:
    """A console that renders for stdout, into a string: as wide as the terminal, or as wide as the
    table where there is none."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else 1000
    if os.environ.get("COLUMNS", "").strip() == "0":
        width = 80
    return Console(file=io.StringIO(), force_terminal=terminal or None, width=width)


def text_width() -> int:
    """Columns that text is wrapped to: the terminal's, or 80 where there is none."""
    return _console().width if sys.stdout.isatty() else 80


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """A table on stdout. Nothing in it is ever cut: the first column folds where it is too long,
    and where that is not enough each row is a name with its values under it.

    words: the first so many columns, and those without a title, stand to the left; the others are
        numbers
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console()
    head, *body = [[Text(printable(cell)) for cell in row] for row in (titles, *rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(head, *body, strict=True)]
    if min(widths[0], 18) + sum(widths[1:]) + 2 * len(titles) > console.width:
        _stacked(titles, rows, console.width)
        return
    plain = box.Box("    \n    \n -- \n" + 5 * "    \n", ascii=True)
    result = Table(box=box.SIMPLE_HEAD if shows_unicode(sys.stdout) else plain, pad_edge=False)
    for i, title in enumerate(head):
        side: Literal["left", "right"] = "left" if i < words or not title else "right"
        result.add_column(title, justify=side, overflow="fold", no_wrap=i > 0)
    for row in body:
        result.add_row(*row)
    console.print(result)
    rendered = cast(io.StringIO, console.file).getvalue().splitlines()
    write(sys.stdout, "\n".join(text for text in map(str.rstrip, rendered) if text))


def _stacked(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    """Each row a name, and under it its values with their titles, as many a line as fit."""
    line(f"{titles[0]}:")
    for row in rows:
        line(f"  {row[0]}")
        words = "    "
        for title, cell in zip(titles[1:], row[1:], strict=True):
            pair = " ".join(filter(None, (title, cell))) if cell else ""
            if pair and words.strip() and len(words) + 2 + len(pair) > width:
                line(words)
                words = "    "
            words += ("; " if pair and words.strip() else "") + pair
        line(words)


def shows_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "ascii").lower().startswith("utf")


def line(text: str = "") -> None:
    """A line on stdout."""
    write(sys.stdout, printable(text))


def show_report(report: RunReport, *, top: int, output: str | None = None) -> None:
    """Worst layers first, then the totals."""
    if report.sites:
        show_sites(report.sites)
    if report.rows:
        rows = sorted(report.rows, key=row_error, reverse=True)
        shown = rows if top <= 0 else rows[:top]
        common = common_parents([row.module for row in rows])
        _show_layers(shown, common, is_repack(report))
        _show_activations(shown, common)
        if len(shown) < len(rows):
            others = "more" if is_repack(report) else "better"
            line(f"... and {len(rows) - len(shown)} {others} layers (--top 0 shows all)")
        _show_compared(rows)
        _show_totals(report)
    if report.kv_cache:
        line(cached(report.kv_cache))
    if report.quality is not None:
        _show_quality(report.quality)
        if report.settings.get("kv_cache"):
            line("keys and values were cached in FP8, but for the original")
    if (prediction := prediction_of(report.settings)) is not None:
        line(beside_measured(prediction, report.totals, report.quality))
    if output is not None:
        line(f"written: {output}")


def is_repack(report: RunReport) -> bool:
    """Whether codes were only packed anew: then there is no error to speak of."""
    return report.settings.get("method") == "repack"


def _show_layers(rows: Sequence[LayerReport], common: str, repacked: bool) -> None:
    width = "type" if all(row.type for row in rows) else "bits/w"
    titles = (_under("layer", common), "method", width, "rel err", "rtn", "gain", "weight only")
    left_out = set(titles[3:]) if repacked else set()
    if _console().width < 100 or all(row.weight_rel_err is None for row in rows):
        left_out |= {"weight only"}  # reports and pages have it
    if _console().width < 72 and len({row.bits_per_weight for row in rows}) == 1:
        left_out |= {"bits/w"}  # which the totals tell, too
    keep = [i for i, title in enumerate(titles) if title not in left_out]
    cells = [
        [
            row.module.removeprefix(common),
            row.method + ("*" if row.fallback else ""),
            row.type or f"{row.bits_per_weight:.2f}",
            number(row_error(row)),
            number(row_rtn_error(row)),
            times(row.gain_vs_rtn),
            "-" if row.weight_rel_err is None else number(row.weight_rel_err),
        ]
        for row in rows
    ]
    table([titles[i] for i in keep], [[row[i] for i in keep] for row in cells], words=2)


def _under(what: str, common: str) -> str:
    """The title of a column of names that all begin alike."""
    return f"{what} ({common}...)" if common else what


def _show_activations(rows: Sequence[LayerReport], common: str) -> None:
    """Errors with integer inputs, beside those of the weight alone and of plain rounding."""
    measured = [(row.module, row.activations) for row in rows if row.activations]
    if not measured:
        return
    cells = []
    for module, found in measured:
        parts = (found.integer, found.weight_only, found.plain)
        values = [found.integer.mae, *(v for part in parts for v in (part.rel_err, part.sqnr_db))]
        cells.append([module.removeprefix(common), *map(number, values)])
    line(f"outputs with integer inputs ({measured[0][1].scheme}):")
    titles = ("layer", "MAE", "rel err", "SQNR", "weight only", "SQNR", "plain", "SQNR")
    table(titles, cells)


def _show_compared(rows: Sequence[LayerReport]) -> None:
    """Mean errors of the methods that were compared, and how often each was best."""
    tried = [row for row in rows if row.compared]
    for name in tried[0].compared or () if tried else ():
        errors = [row.compared[name] for row in tried if row.compared]
        best = sum(row.best == name for row in tried)
        line(f"{name}: mean {number(sum(errors) / len(errors))}, best on {best} of {len(tried)}")


def show_sites(sites: Sequence[Mapping[str, Any]]) -> None:
    """What smoothing made of each site."""
    common = common_parents([site["site"] for site in sites])
    numbers = ("strength", "error", "plain_error", "function_change")
    table(
        (_under("site", common), "strength", "rel err", "without", "float change", ""),
        [
            [
                site["site"].removeprefix(common),
                *(number(site[key]) for key in numbers),
                of_site(site),
            ]
            for site in sites
        ],
    )
    change = max((site["function_change"] or 0.0 for site in sites), default=0.0)
    line(f"{smoothed(sites)}; float outputs change by at most {number(change)}")


def _show_totals(report: RunReport) -> None:
    totals = report.totals
    ratio = totals["compression_ratio"]
    line(
        f"{totals['layers']} layers at {totals['bits_per_weight']:.2f} bits/weight"
        f"{mixed([vars(row) for row in report.rows])}, {totals['left_alone']} tensors left alone"
    )
    line(
        f"size: {size(totals['bytes_before'])} -> {size(totals['bytes_after'])}"
        + (f" ({ratio:.2f}x smaller)" if ratio and ratio >= 1.01 else "")
    )
    if is_repack(report):
        line(f"codes and scales are those that were there; done in {totals['seconds']:.1f} s")
        return
    line(
        f"rel err on {measured_on(totals)}: mean {number(totals['mean_rel_err'])},"
        f" worst {number(totals['worst_rel_err'])}"
    )
    line(
        f"gain over round-to-nearest: {times(totals['gain_vs_rtn'])}"
        f" (its mean: {number(totals['rtn_mean_rel_err'])})"
    )
    on = Counter(row.calibrated_on for row in report.rows if row.calibrated_on)
    if on:
        line(
            f"layers of experts with statistics of their own tokens: {on['own']}, of those of all"
            f" experts beside them: {on['site']}"
        )
    line(f"{_fallbacks(report)}done in {totals['seconds']:.1f} s")


def _fallbacks(report: RunReport) -> str:
    """Layers that plain rounding wrote where something better was asked for; to an evaluation,
    which does not know what was asked for, all whose codes are those of plain rounding."""
    count = report.totals["fallbacks"]
    marked = " (marked *)" if count else ""
    if report.command == "eval":
        return f"codes equal to round-to-nearest's: {count} layers{marked}; "
    if report.settings.get("method") == "rtn":
        return ""
    return f"fallbacks to round-to-nearest: {count}{marked}; "


def _show_quality(quality: Mapping[str, Any]) -> None:
    """Predictions: the model, and what rounding to nearest at the same grid would make of it."""
    rows = [["original", f"{quality['perplexity']['original']:.4f}", "", "", "", ""]]
    for name in quality["increase"]:
        perplexity, rise, same = predicted(quality, name)
        kl = (number(quality["kl"][name][key]) for key in ("mean", "p99_9"))
        rows.append([name, perplexity, rise, *kl, same])
    table(("model", "perplexity", "increase", "KL", "KL 99.9 %", "equal top"), rows)
    line(f"{quality['tokens']} tokens predicted in {quality['sequences']} sequences")
    if "kl_per_block" in quality:
        per_block = ", ".join(f"{i}: {kl:.2g}" for i, kl in enumerate(quality["kl_per_block"]))
        line(f"KL of each block quantized alone: {per_block}")
