"""`--dry-run`: what a run would do, as tables or as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptq_cli.cli import console
from ptq_cli.cli.common import emit_warnings
from ptq_cli.commands.estimate import Estimate, document
from ptq_cli.core.names import fold_names
from ptq_cli.core.text import common_parents, size


def emit_estimate(
    estimate: Estimate, as_json: bool, top: int, warnings: Sequence[str], strict: bool = False
) -> None:
    """Print the estimate, and refuse what the run would refuse.

    warnings: those that were printed already; strict: the others are errors

    Raises:
        FileError: too little space on the disk.
        InputError: --strict, and there is a warning.
    """
    emit_warnings([w for w in estimate.warnings if w not in warnings], strict)
    content = document(estimate)
    if as_json:
        console.print_json(content)
    elif content["finished"]:
        console.line(
            f"{content['output']}: finished already, from the same inputs and settings;"
            " nothing would be done"
        )
    else:
        _show(content, top)
    estimate.found.check_space()


def _show(content: dict[str, Any], top: int) -> None:
    layers, left_alone, units = (content[key] for key in ("layers", "left_alone", "units"))
    if layers:
        _show_layers(layers, top)
    elif not left_alone:
        rows = [
            [x["unit"], str(len(x["layers"])), str(x["tokens"]), size(x["memory"])] for x in units
        ]
        _table("unit", ["linears", "tokens", "memory"], rows, top)
    for row in dict.fromkeys(entry["reason"] for entry in left_alone):
        names = [entry["tensor"] for entry in left_alone if entry["reason"] == row]
        console.line(f"copied ({row}): {_named(names)}")
    if content["method"] is not None:
        _show_totals(content)
    if sites := sum(unit["unit"].startswith("smoothing ") for unit in units):
        console.line(f"before that the inputs of {sites} sites would be smoothed")
    if content["output"] is not None:
        finished = content["interrupted"]
        more = f" (goes on with an interrupted run, of which {finished} units are finished)"
        console.line(f"output: {content['output']}{'' if finished is None else more}")
    _show_needs(content)


def _show_units(units: list[dict[str, Any]], top: int) -> None:
    rows = [[x["unit"], str(len(x["layers"])), str(x["tokens"]), size(x["memory"])] for x in units]
    _table("unit", ["linears", "tokens", "memory"], rows, top)


def _table(first: str, columns: Sequence[str], rows: list[list[str]], top: int) -> None:
    """A table of `top` rows, or of all: 0. Words stand left, numbers right."""
    shown = rows if top <= 0 else rows[:top]
    left = ("by", "grid")
    head = [(name, "left" if name in left else "right") for name in columns]
    console.table([(first, "left"), *head], shown)
    if len(shown) < len(rows):
        kind = first.split()[0]
        console.line(f"and {len(rows) - len(shown)} {kind}s more; --top 0 shows all")


def _show_layers(layers: list[dict[str, Any]], top: int) -> None:
    common = common_parents([row["module"] for row in layers])
    rows = [
        [
            row["module"].removeprefix(common),
            row["method"],
            "x".join(map(str, row["shape"])),
            _grid(row),
            f"{row['bits_per_weight']:.2f}",
        ]
        for row in layers
    ]
    first = f"layer ({common}...)" if common else "layer"
    _table(first, ["by", "shape", "grid", "bits/w"], rows, top)
    for reason in sorted({row["reason"] for row in layers if row["reason"]}):
        names = [row["module"] for row in layers if row["reason"] == reason]
        console.line(f"rounded to nearest ({reason}): {_named(names)}")


def _grid(row: dict[str, Any]) -> str:
    """`4 bits g128`, `8 bits row`, `3 bits g64 asym`"""
    groups = {-1: "row", 0: "tensor"}.get(row["group_size"], f"g{row['group_size']}")
    return f"{row['bits']} bits {groups}" + ("" if row["sym"] else " asym")


def _named(names: list[str]) -> str:
    return f"{len(names)}: {fold_names(names)}"


def _show_totals(content: dict[str, Any]) -> None:
    totals, verb = content["totals"], "repack" if content["method"] == "repack" else "round"
    bits = totals["bits_per_weight"]
    before, after = (size(totals[key]) for key in ("bytes_before", "bytes_after"))
    console.line(
        f"ptq {content['command']} would {verb} {totals['layers']} layers"
        + (f" at {bits:.2f} bits/weight" if bits else "")
        + f" and copy {totals['left_alone']} tensors: {before} -> {after},"
        f" format {content['format']}"
    )


def _show_needs(content: dict[str, Any]) -> None:
    memory, disk, seconds = content["memory"], content["disk"], content["time"]["seconds"]
    largest = f", {size(memory['largest_bytes'])} for {memory['largest_unit']} alone"
    console.line(
        f"memory: at most {size(memory['peak_bytes'])} with {memory['workers']} at work"
        + (largest if memory["largest_unit"] else "")
        + f" (units in flight may take {size(memory['limit'])})"
    )
    if disk["needed"]:
        scratch = f", {size(disk['scratch'])} of it scratch" if disk["scratch"] else ""
        console.line(f"disk: {size(disk['needed'])} needed{scratch}, {size(disk['free'])} free")
    console.line(
        f"time: about {_duration(seconds)}, a rough estimate (as a rule within a factor of three)"
    )
    console.line("dry run: nothing was written")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
