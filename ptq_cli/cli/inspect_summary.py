"""What `ptq inspect` says of a checkpoint, folded to one screen."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptq_cli.core.names import fold_names
from ptq_cli.core.text import number, printable, size

_LINES = 25
# Characters of a folded list, the first that fits the screen; with less than `_FEW` sites are
# counted rather than named.
_WIDTHS, _FEW = (640, 480, 320, 240, 160, 110, 70, 40), 160
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
_RANKS = {"rank 0": "scalar", "rank 1": "vector"}


def summary(document: Mapping[str, Any], columns: int) -> list[str]:
    """Lines of at most so many columns; no more than a screen's where folding can do it."""
    named = [(width, True) for width in _WIDTHS if width >= _FEW]
    lines: list[str] = []
    for width, sites in (*named, *((width, False) for width in _WIDTHS)):
        texts = _paragraphs(document, width, sites)
        lines = [line for text in texts for line in _wrapped(text, columns)]
        if len(lines) <= _LINES:
            break
    return lines


def _wrapped(text: str, columns: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        printable(text),
        columns,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _paragraphs(document: Mapping[str, Any], width: int, sites: bool) -> list[str]:
    found = mixed(document["gguf"], width) if "gguf" in document else []
    tensors = document["tensors"]
    if document["kind"] == "quantized":
        found += [grids(document["format"], document["layers"])]
        found += _layers(document["layers"], width)
        if document["kv_cache"]:
            found.append(f"keys and values are cached in FP8 ({document['kv_cache']})")
    else:
        chosen = [entry["tensor"] for entry in tensors if not entry["left_alone"]]
        found += [f"family: {document['family']}"] if document["family"] else []
        found.append(f"is quantized ({len(chosen)}): {_folded(chosen, width)}")
    found += _dense(tensors, width)
    own = document.get("sites") or []
    found += _sites(own, width) if sites else _counted(own)
    found += _fisher(document.get("fisher") or [])
    found += document.get("notes", [])
    if "quantizing" in document:
        found.append(quantizing(document["quantizing"]))
    return [*found, f"{totals(document['totals'])}; --tensors and --json show each"]


def _folded(tensors: Iterable[str], width: int) -> str:
    return fold_names((name.removesuffix(".weight") for name in tensors), width) or "nothing"


def _dense(tensors: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Reason after reason, with its tensors."""
    reasons: dict[str, list[str]] = {}
    for entry in tensors:
        if why := entry["left_alone"]:
            reasons.setdefault(_RANKS.get(why, why), []).append(entry["tensor"])
    if not reasons:
        return []
    said = [f"  {why} ({len(own)}): {_folded(own, width)}" for why, own in reasons.items()]
    return ["stays dense:", *said]


def _layers(layers: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Layers with one grid, method and rounding of inputs together."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        symmetry = "symmetric" if layer["sym"] else "asymmetric"
        named = layer["type"] or layer["numbers"]
        words = (_grid(layer), None if named else symmetry, layer["method"])
        key = (*words, layer["inputs"] and f"inputs of {layer['inputs']}")
        groups.setdefault(key, []).append(layer)
    found = []
    for key, own in groups.items():
        names = _folded((layer["module"] for layer in own), width)
        found.append(
            f"  {', '.join(filter(None, key))}, {size(sum(x['bytes'] for x in own))}: {names}"
        )
    return found


def _sites(sites: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Sites that differ in the number of their block only together."""
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for site in sites:
        linears = tuple(_BLOCK.sub("{}", name) for name in site["linears"])
        fed_by = _BLOCK.sub("{}", site["fed_by"] or "")
        why = (site["certainty"], site["reason"])
        kinds.setdefault((linears, site["in_features"], fed_by, *why), []).append(site)
    found = []
    for (_, inputs, _, certainty, reason), own in kinds.items():
        names = _folded((name for site in own for name in site["linears"]), width)
        fed = [site["fed_by"] for site in own if site["fed_by"]]
        if fed:
            fed_by = f"fed by {_folded(map(_inside, fed), 60)}"
        else:
            fed_by = f"{'nothing feeds it' if certainty == 'known' else certainty}: {reason}"
        found.append(f"  {names}: {inputs} inputs, {fed_by}{_seen(own)}")
    return ["sites:", *found] if found else []


def _counted(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    taking = sum(site["fed_by"] is not None for site in sites)
    return [f"sites: {len(sites)}, of which {taking} can be smoothed{_seen(sites)}"]


def _inside(name: str) -> str:
    """A name inside its block."""
    return re.sub(r"^.*?\.\d+\.", "", name, count=1)


def _seen(sites: Sequence[Mapping[str, Any]]) -> str:
    """What calibration saw there."""
    own = [site for site in sites if "absmax" in site]
    if not own:
        return ""
    outliers = sum(len(site["loud_channels"]) for site in own)
    return f", absmax {number(max(site['absmax'] for site in own))}, outliers {outliers}"


def _fisher(rows: Sequence[Mapping[str, Any]], shown: int = 5) -> list[str]:
    first = ", ".join(f"{row['module']} {row['share']:.1%}" for row in rows[:shown])
    return [f"most Fisher information: {first}"] if rows else []


def grids(name: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """How many layers have which grid."""
    counted = Counter(map(_grid, layers)).most_common()
    said = ", ".join(f"{n} with {grid}" for grid, n in counted)
    return f"{name}: {len(layers)} layers, {said}"


def _grid(layer: Mapping[str, Any]) -> str:
    """The numbers of a layer: what types and small floats are called, else bits and groups."""
    if layer["type"] or layer["numbers"]:
        return str(layer["type"] or layer["numbers"])
    group = layer["group_size"]
    shared = {-1: "per row", 0: "per tensor"}.get(group, f"in groups of {group}")
    return f"{layer['bits']} bits {shared}"


def type_counts(found: Mapping[str, Any]) -> str:
    """`25 Q4_K, 5 Q6_K, 9 F32, 4.92 bits per weight`"""
    types = ", ".join(f"{own['tensors']} {kind}" for kind, own in found["types"].items())
    bits = found["bits_per_weight"]
    return types if bits is None else f"{types}, {bits:.2f} bits per weight"


def mixed(found: Mapping[str, Any], width: int) -> list[str]:
    """The types of a GGUF file, and which of llama.cpp's mixes it is."""
    lines = [f"types: {type_counts(found)}", _mix(found)]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (kind, wanted) in found["differing"].items():
        groups.setdefault((kind, wanted), []).append(name)
    lines += [
        f"  {kind} instead of {wanted} ({len(names)}): {_folded(names, width)}"
        for (kind, wanted), names in groups.items()
    ]
    return lines


def _mix(found: Mapping[str, Any]) -> str:
    stated, nearest = found["stated"], found["nearest"]
    if stated is None:
        said = "says no mix that is known here" if found["file_type"] is not None else "is missing"
        said = f"general.file_type {said}"
    else:
        said = f"general.file_type says {stated}"
    if nearest is None:
        return said
    if not found["differing"]:
        same = "it" if stated in found["mixes"] else " or ".join(found["mixes"])
        return f"{said}, and the types are those of {same}"
    count = len(found["differing"])
    have = "1 tensor has another type" if count == 1 else f"{count} tensors have other types"
    return f"{said}; {have} than in {nearest}:"


def quantizing(entry: Mapping[str, Any]) -> str:
    """What the default grid would make of a float model."""
    if "refused" in entry:
        return f"cannot be quantized: {entry['refused']}"
    before, after = (size(entry[key]) for key in ("bytes_before", "bytes_after"))
    return (
        f"{entry['bits']} bits in groups of {entry['group_size']} would take {entry['layers']}"
        f" tensors, and {before} to {after}; ptq gptq --dry-run says more"
    )


def totals(found: Mapping[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    return f"{found['tensors']} tensors ({dtypes}), {size(found['bytes'])}"
