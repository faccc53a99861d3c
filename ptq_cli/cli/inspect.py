"""`ptq inspect`: what is in a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from ptq_cli.cli import console
from ptq_cli.cli.options import Command
from ptq_cli.cli.shared_options import JSON, SOURCES, path_argument
from ptq_cli.commands import api
from ptq_cli.core.text import number, size


@click.command("inspect", cls=Command, params=[path_argument("path"), *SOURCES, JSON])
def inspect(path: Path, as_json: bool, **source: Any) -> None:
    """Show tensors, dtypes and shapes of PATH; of a float model its sites, too, and what quantizing
    it would give; of a quantized one grid, method and size of each layer.

    With calibration: outlier channels, the channels that can move a site's outputs most
    (max|x| · mean|W|), and, where gradients were given to ptq calibrate, layers ranked by Fisher
    information.

    \b
    ptq inspect model/ --calibration stats.safetensors
    ptq inspect model-gptq-w4g128 --json
    """
    document = api.inspect(path, **source)
    if as_json:
        console.print_json(document)
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    quantized = document["kind"] == "quantized"
    rows = [
        [t["tensor"], t["dtype"], str(t["shape"]), t["left_alone"] or ""]
        for t in document["tensors"]
        if t["left_alone"] or not quantized
    ]
    console.table(("tensor", "dtype", "shape", "left alone"), rows, words=4)
    if quantized:
        _show_layers(document["format"], document["layers"])
    if document.get("sites"):
        _show_sites(document["sites"])
    if document.get("fisher"):
        _show_fisher(document["fisher"])
    for note in document.get("notes", []):
        console.line(note)
    if not quantized:
        _show_quantizing(document["quantizing"])
    totals = document["totals"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in totals["dtypes"].items())
    console.line(f"{totals['tensors']} tensors ({dtypes}), {size(totals['bytes'])}")


def _show_layers(name: str, layers: list[dict[str, Any]]) -> None:
    """Grid, method and size per layer, and how many have which grid."""
    titles = ("layer", "shape", "bits", "group", "sym", "method", "inputs", "bits/weight", "size")
    rows = [
        [
            layer["module"],
            str(layer["shape"]),
            *(str(layer[key]) for key in ("bits", "group_size")),
            "yes" if layer["sym"] else "no",
            layer["method"] or "-",
            layer["inputs"] or "-",
            f"{layer['bits_per_weight']:.2f}",
            size(layer["bytes"]),
        ]
        for layer in layers
    ]
    console.table(titles, rows, words=len(titles))
    grids = Counter((layer["bits"], layer["group_size"]) for layer in layers)
    said = ", ".join(f"{n} with {b} bits in groups of {g}" for (b, g), n in grids.most_common())
    said = said.replace("in groups of -1", "per row").replace("in groups of 0", "per tensor")
    console.line(f"{name}: {len(layers)} layers, {said}")


def _show_quantizing(entry: dict[str, Any]) -> None:
    if "refused" in entry:
        console.line(f"cannot be quantized: {entry['refused']}")
        return
    before, after = (size(entry[key]) for key in ("bytes_before", "bytes_after"))
    console.line(
        f"{entry['bits']} bits in groups of {entry['group_size']} would take {entry['layers']}"
        f" tensors, and {before} to {after}; ptq gptq --dry-run says more"
    )


def _show_sites(sites: list[dict[str, Any]]) -> None:
    titles = ("site", "inputs", "fed by", "absmax", "median", "outliers", "most important channels")
    rows = []
    for site in sites:
        top = ", ".join(str(entry["channel"]) for entry in site.get("importance", []))
        fed_by = site["fed_by"] or f"nothing: {site['reason']}"
        outliers = str(len(site["loud_channels"])) if "loud_channels" in site else "-"
        numbers = [number(site.get(key)) for key in ("absmax", "median_absmax")]
        rows.append([site["site"], str(site["in_features"]), fed_by, *numbers, outliers, top])
    console.table(titles, rows, words=len(titles))


def _show_fisher(rows: list[dict[str, Any]]) -> None:
    console.table(
        ("layer", "mean Fisher", "share"),
        [[row["module"], number(row["mean"]), f"{row['share']:.1%}"] for row in rows],
    )
