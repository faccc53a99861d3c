"""`--dry-run`: what a run would do, as tables or as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptq_cli.cli import console
from ptq_cli.cli.common import emit_warnings
from ptq_cli.commands.forecast import Forecast, check, document
from ptq_cli.core.names import fold_names
from ptq_cli.core.text import common_parents, size
from ptq_cli.storage.rates import measure


def emit_forecast(
    forecast: Forecast, as_json: bool, top: int, warnings: Sequence[str], strict: bool = False
) -> None:
    """Measure the machine, print the forecast, and refuse what the run would refuse.

    warnings: those that were printed already; strict: the others are errors

    Raises:
        FileError: too little space on the disk.
        InputError: --strict, and there is a warning.
    """
    emit_warnings([w for w in forecast.warnings if w not in warnings], strict)
    content = document(forecast, measure(forecast.files, forecast.threads))
    if as_json:
        console.print_json(content)
    elif content["finished"]:
        console.line(
            f"{content['output']}: finished already, from the same inputs and settings;"
            " nothing would be done"
        )
    else:
        _show(content, top)
    check(forecast)


def _show(content: dict[str, Any], top: int) -> None:
    if content["layers"]:
        _show_layers(content["layers"], top)
    if content["left_alone"]:
        _show_left_alone(content["left_alone"])
    elif not content["layers"]:
        _show_units(content["units"], top)
    totals = content["totals"]
    if content["method"] is not None:
        bits, verb = totals["bits_per_weight"], "round"
        if content["method"] == "repack":
            verb = "repack"
        at = f" at {bits:.2f} bits/weight" if bits else ""
        before, after = (size(totals[key]) for key in ("bytes_before", "bytes_after"))
        console.line(
            f"ptq {content['command']} would {verb} {totals['layers']} layers{at} and copy"
            f" {totals['left_alone']} tensors: {before} -> {after}, format {content['format']}"
        )
    sites = [unit for unit in content["units"] if unit["unit"].startswith("smoothing ")]
    if sites:
        console.line(f"before that the inputs of {len(sites)} sites would be smoothed")
    if content["output"] is not None:
        console.line(f"output: {content['output']}{_interrupted(content['interrupted'])}")
    _show_needs(content)


def _interrupted(finished: int | None) -> str:
    if finished is None:
        return ""
    return f" (goes on with an interrupted run, of which {finished} units are finished)"


def _show_layers(layers: list[dict[str, Any]], top: int) -> None:
    shown = layers if top <= 0 else layers[:top]
    common = common_parents([row["module"] for row in layers])
    rows = [
        [
            row["module"].removeprefix(common),
            row["method"],
            "x".join(map(str, row["shape"])),
            _grid(row),
            f"{row['bits_per_weight']:.2f}",
        ]
        for row in shown
    ]
    first = f"layer ({common}...)" if common else "layer"
    columns = [(first, "left"), ("by", "left"), ("shape", "right"), ("grid", "left")]
    console.table([*columns, ("bits/w", "right")], rows)
    if len(shown) < len(layers):
        console.line(f"and {len(layers) - len(shown)} layers more; --top 0 shows all")
    reasons = sorted({row["reason"] for row in layers if row["reason"]})
    for reason in reasons:
        names = [row["module"] for row in layers if row["reason"] == reason]
        console.line(f"rounded to nearest ({reason}): {_named(names)}")


def _grid(row: dict[str, Any]) -> str:
    """`4 bits g128`, `8 bits row`, `3 bits g64 asym`"""
    groups = {-1: "row", 0: "tensor"}.get(row["group_size"], f"g{row['group_size']}")
    return f"{row['bits']} bits {groups}" + ("" if row["sym"] else " asym")


def _show_left_alone(entries: list[dict[str, Any]]) -> None:
    reasons = dict.fromkeys(entry["reason"] for entry in entries)
    for reason in reasons:
        names = [entry["tensor"] for entry in entries if entry["reason"] == reason]
        console.line(f"copied ({reason}): {_named(names)}")


def _show_units(units: list[dict[str, Any]], top: int) -> None:
    shown = units if top <= 0 else units[:top]
    rows = [[u["unit"], str(len(u["layers"])), str(u["tokens"]), size(u["memory"])] for u in shown]
    columns = ("linears", "tokens", "memory")
    console.table([("unit", "left"), *((column, "right") for column in columns)], rows)
    if len(shown) < len(units):
        console.line(f"and {len(units) - len(shown)} units more; --top 0 shows all")


def _named(names: list[str]) -> str:
    return f"{len(names)}: {fold_names(names)}"


def _show_needs(content: dict[str, Any]) -> None:
    memory, disk, spent = (content[key] for key in ("memory", "disk", "time"))
    largest = f", {size(memory['largest_bytes'])} for {memory['largest_unit']} alone"
    console.line(
        f"memory: at most {size(memory['peak_bytes'])} with {memory['workers']} at work"
        + (largest if memory["largest_unit"] else "")
        + f" (units in flight may take {size(memory['limit'])})"
    )
    if disk["free"] is not None:
        scratch = f", {size(disk['scratch'])} of it scratch" if disk["scratch"] else ""
        console.line(f"disk: {size(disk['needed'])} needed{scratch}, {size(disk['free'])} free")
    console.line(
        f"time: about {_duration(spent['seconds'])}, an estimate from half a second's measurement"
        " of this machine, often off by a factor of two"
    )
    console.line("dry run: nothing was written")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
