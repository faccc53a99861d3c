"""Reports read back: `report.json` of an output folder, or a file of `--report`.

A report may have been written by hand or by another version, so it is held against the schema in
this package before anything believes it. Properties that the schema does not know are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ptq_cli.errors import InputError, PtqError
from ptq_cli.storage.companions import GGUF_SUFFIX
from ptq_cli.storage.files import listing, parse_json, read_json
from ptq_cli.storage.made import REPORT, report_beside

MAX_REPORT = 256 << 20
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "number": (int, float), "integer": (int,), "null": (type(None),),
}  # fmt: skip


def read_report(path: Path) -> tuple[dict[str, Any], Path | None]:
    """A report, and the output folder it lies in, if it is a folder's own.

    path: the folder, the GGUF file that it lies beside, or the file

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
    elif path.suffix == GGUF_SUFFIX:
        path = report_beside(path)
    document = read_json(path, MAX_REPORT)
    schema = parse_json(
        resources.files("ptq_cli.report").joinpath("report.schema.json").read_bytes(),
        Path("schema"),
    )
    wrong = next(_misfits(document, schema, schema["$defs"], ""), None)
    if wrong is not None:
        raise InputError(f"{path}: not a report of ptq: {wrong}")
    own = path.name == REPORT and "quantization.json" in listing(path.parent)
    return document, path.parent if own else None


def settings_of(output: Path) -> Mapping[str, Any]:
    """Settings of the run that made an output, as its report says; none where there is no report
    that can be read."""
    if not output.is_dir() and output.suffix != GGUF_SUFFIX:
        return {}
    try:
        settings: dict[str, Any] = read_report(output)[0]["settings"]
    except PtqError:
        return {}
    return settings


def _misfits(
    value: Any, schema: Mapping[str, Any], parts: Mapping[str, Any], where: str
) -> Iterator[str]:
    """The places where `value` does not follow `schema`, in words.

    Understands what report.schema.json uses (a test holds it to that).
    """
    if "$ref" in schema:
        yield from _misfits(value, parts[schema["$ref"].removeprefix("#/$defs/")], parts, where)
        return
    if "anyOf" in schema:
        found = [list(_misfits(value, part, parts, where)) for part in schema["anyOf"]]
        if all(found):
            yield from found[0]
        return
    name = where or "the document"
    types = schema.get("type", [])
    if wrong := _wrong_type(value, [types] if isinstance(types, str) else types):
        yield f"{name} {wrong}"
    elif isinstance(value, dict):
        for missing in sorted(set(schema.get("required", ())) - value.keys()):
            yield f"{name} lacks {missing!r}"
        other = schema.get("additionalProperties", {})
        for key, entry in value.items():
            rule = schema.get("properties", {}).get(key, other if isinstance(other, dict) else {})
            yield from _misfits(entry, rule, parts, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{name} is too short"
        for i, entry in enumerate(value):
            yield from _misfits(entry, schema.get("items", {}), parts, f"{name}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        below = value < schema.get("minimum", value)
        below |= "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]
        if below or value > schema.get("maximum", value):
            yield f"{name} is {value:g}, out of range"


def _wrong_type(value: Any, types: list[str]) -> str | None:
    if not types:
        return None
    fits = any(isinstance(value, _TYPES[name]) for name in types)
    if isinstance(value, bool):
        fits = "boolean" in types
    if not fits:
        return f"is {type(value).__name__}, not {' or '.join(types)}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "is no number to work with" if number and not abs(value) < 1e300 else None
