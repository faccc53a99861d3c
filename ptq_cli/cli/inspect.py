"""`ptq inspect`: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.cli import console
from ptq_cli.cli.inspect_summary import grids, mixed, quantizing, summary, totals
from ptq_cli.cli.options import Command, in_section, option
from ptq_cli.cli.shared_options import JSON, SOURCES, path_argument
from ptq_cli.commands import api
from ptq_cli.commands.sites import derived_recipe
from ptq_cli.core.text import number, size

_TENSORS = option("--tensors", is_flag=True, help="Tensors, layers and sites one by one.")
_SITES = option(
    "--sites",
    is_flag=True,
    help="Only this: sites of a model of an unknown family as a recipe to check, and how sure"
    " each is.",
)


@click.command(
    "inspect",
    cls=Command,
    params=[path_argument("path"), *SOURCES, *in_section("Report", _TENSORS, _SITES), JSON],
)
def inspect(path: Path, tensors: bool, sites: bool, as_json: bool, **source: Any) -> None:
    """Show what of PATH is quantized, or would be, and what stays dense and why; of a float model
    its sites, too, and what quantizing it would give. --tensors and --json show each tensor.

    With calibration: outlier channels, with --tensors the channels that can move a site's outputs
    most (max|x| · mean|W|), and, where gradients were given to ptq calibrate, layers ranked by
    Fisher information.

    \b
    ptq inspect model/ --calibration stats.safetensors
    ptq inspect model-gptq-w4g128 --json
    ptq inspect model/ --sites > sites.toml
    """
    if sites and (tensors or as_json):
        raise click.UsageError("--sites excludes --tensors and --json, which show sites, too")
    if sites and any(source.values()):
        raise click.UsageError("--sites reads no calibration")
    if sites:
        for text in derived_recipe(path).splitlines():
            console.line(text)
        return
    document = api.inspect(path, **source)
    if as_json:
        console.print_json(document)
    elif tensors:
        _show(document)
    else:
        for line in summary(document, console.text_width()):
            console.line(line)


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
    for text in mixed(document["gguf"], console.text_width()) if "gguf" in document else ():
        console.line(text)
    if document.get("fisher"):
        _show_fisher(document["fisher"])
    for note in document.get("notes", []):
        console.line(note)
    if not quantized:
        console.line(quantizing(document["quantizing"]))
    console.line(totals(document["totals"]))


def _show_layers(name: str, layers: list[dict[str, Any]]) -> None:
    """Grid, method and size per layer, and how many have which grid."""
    titles = (
        *("layer", "shape", "bits", "group", "sym", "type", "method", "inputs", "bits/weight"),
        "size",
    )
    rows = [
        [
            layer["module"],
            str(layer["shape"]),
            *(str(layer[key]) for key in ("bits", "group_size")),
            "yes" if layer["sym"] else "no",
            layer["type"] or layer["numbers"] or "-",
            layer["method"] or "-",
            layer["inputs"] or "-",
            f"{layer['bits_per_weight']:.2f}",
            size(layer["bytes"]),
        ]
        for layer in layers
    ]
    console.table(titles, rows, words=len(titles))
    console.line(grids(name, layers))


def _show_sites(sites: list[dict[str, Any]]) -> None:
    titles = ("site", "inputs", "fed by", "absmax", "median", "outliers", "most important channels")
    rows = []
    for site in sites:
        top = ", ".join(str(entry["channel"]) for entry in site.get("importance", []))
        without = "nothing" if site["certainty"] == "known" else site["certainty"]
        fed_by = site["fed_by"] or f"{without}: {site['reason']}"
        outliers = str(len(site["loud_channels"])) if "loud_channels" in site else "-"
        numbers = [number(site.get(key)) for key in ("absmax", "median_absmax")]
        rows.append([site["site"], str(site["in_features"]), fed_by, *numbers, outliers, top])
    console.table(titles, rows, words=len(titles))


def _show_fisher(rows: list[dict[str, Any]]) -> None:
    console.table(
        ("layer", "mean Fisher", "share"),
        [[row["module"], number(row["mean"]), f"{row['share']:.1%}"] for row in rows],
    )
