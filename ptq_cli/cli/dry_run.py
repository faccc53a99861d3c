"""`--dry-run`: what a run would do, in words or as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptq_cli.cli import console
from ptq_cli.cli.common import emit_warnings
from ptq_cli.cli.progress import duration
from ptq_cli.commands.estimate import Estimate, document
from ptq_cli.core.names import fold_names
from ptq_cli.core.text import size


def emit_estimate(
    estimate: Estimate, as_json: bool, warnings: Sequence[str], strict: bool = False
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
        _show(content)
    estimate.found.check_space()


def _show(content: dict[str, Any]) -> None:
    for words, names in _groups(content).items():
        console.line(f"{words}: {len(names)}: {fold_names(names)}")
    if content["method"] is not None:
        _show_totals(content)
    if sites := sum(unit["unit"].startswith("smoothing ") for unit in content["units"]):
        console.line(f"before that the inputs of {sites} sites would be smoothed")
    if content["output"] is not None:
        finished = content["interrupted"]
        more = f" (goes on with an interrupted run, of which {finished} units are finished)"
        console.line(f"output: {content['output']}{'' if finished is None else more}")
    _show_needs(content)


def _groups(content: dict[str, Any]) -> dict[str, list[str]]:
    """Layers by what becomes of them, tensors by why they are copied; else the units of work."""
    groups: dict[str, list[str]] = {}
    for row in content["layers"]:
        by = f"rounded to nearest ({row['reason']})" if row["reason"] else row["method"]
        words = f"{by}, {_grid(row)}, {row['bits_per_weight']:.2f} bits/weight"
        groups.setdefault(words, []).append(row["module"])
    for entry in content["left_alone"]:
        groups.setdefault(f"copied ({entry['reason']})", []).append(entry["tensor"])
    return groups or {"to work on": [unit["unit"] for unit in content["units"]]}


def _grid(row: dict[str, Any]) -> str:
    """`4 bits g128`, `8 bits row`, `3 bits g64 asym`; `Q4_K`"""
    if row["type"]:
        return str(row["type"])
    groups = {-1: "row", 0: "tensor"}.get(row["group_size"], f"g{row['group_size']}")
    return f"{row['bits']} bits {groups}" + ("" if row["sym"] else " asym")


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
        f"time: about {duration(seconds)}, a rough estimate (as a rule within a factor of three)"
    )
    console.line("dry run: nothing was written")
