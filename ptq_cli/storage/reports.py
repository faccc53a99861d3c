"""Reports read back: `report.json` of an output folder, or a file of `--report`.

A report may have been written by hand or by another version, so it is held against the schema in
this package before anything believes it. Properties that the schema does not know are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.storage.files import listing, parse_json, read_json

REPORT = "report.json"
MAX_REPORT = 256 << 20
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "number": (int, float), "integer": (int,), "null": (type(None),),
}  # fmt: skip


def read_report(path: Path) -> tuple[dict[str, Any], Path | None]:
    """A report, and the output folder it lies in, if it is a folder's own.

    path: the folder, or the file

    Raises:
        InputError: no report, or one that does not follow the schema.
    """
    if path.is_dir():
        names = listing(path)
        if REPORT not in names:
            raise InputError(
                f"{path}: no {REPORT} in it",
                hint="ptq eval ORIGINAL QUANTIZED --report FILE.json writes one",
            )
        path = path / REPORT
    document = read_json(path, MAX_REPORT)
    schema = parse_json(
        resources.files("ptq_cli.report").joinpath("report.schema.json").read_bytes(),
        Path("schema"),
    )
    wrong = _misfit(document, schema, schema["$defs"], "")
    if wrong is not None:
        raise InputError(f"{path}: not a report of ptq: {wrong}")
    own = path.name == REPORT and "quantization.json" in listing(path.parent)
    return document, path.parent if own else None


def _misfit(
    value: Any, schema: Mapping[str, Any], parts: Mapping[str, Any], where: str
) -> str | None:
    """The first place where `value` does not follow `schema`, in words, or None.

    Understands what report.schema.json uses (a test holds it to that).
    """
    if "$ref" in schema:
        return _misfit(value, parts[schema["$ref"].removeprefix("#/$defs/")], parts, where)
    if "anyOf" in schema:
        found = [_misfit(value, part, parts, where) for part in schema["anyOf"]]
        return None if None in found else found[0]
    name = where or "the document"
    types = schema.get("type", [])
    if wrong := _wrong_type(value, [types] if isinstance(types, str) else types):
        return f"{name} {wrong}"
    if isinstance(value, dict):
        return _misfit_of_object(value, schema, parts, where)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{name} is too short"
        entries = (
            _misfit(entry, schema.get("items", {}), parts, f"{name}[{i}]")
            for i, entry in enumerate(value)
        )
        return next((wrong for wrong in entries if wrong is not None), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        below = value < schema.get("minimum", value)
        below |= "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]
        if below or value > schema.get("maximum", value):
            return f"{name} is {value:g}, out of range"
    return None


def _wrong_type(value: Any, types: list[str]) -> str | None:
    if not types:
        return None
    own = [_TYPES[name] for name in types]
    fits = any(isinstance(value, kinds) for kinds in own)
    if isinstance(value, bool):
        fits = "boolean" in types
    if not fits:
        return f"is {type(value).__name__}, not {' or '.join(types)}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "is no number to work with" if number and not abs(value) < 1e300 else None


def _misfit_of_object(
    value: Mapping[str, Any], schema: Mapping[str, Any], parts: Mapping[str, Any], where: str
) -> str | None:
    missing = sorted(set(schema.get("required", ())) - value.keys())
    if missing:
        return f"{where or 'the document'} lacks {missing[0]!r}"
    known = schema.get("properties", {})
    other = schema.get("additionalProperties", {})
    for key, entry in value.items():
        rule = known.get(key, other if isinstance(other, dict) else {})
        wrong = _misfit(entry, rule, parts, f"{where}.{key}".removeprefix("."))
        if wrong is not None:
            return wrong
    return None
