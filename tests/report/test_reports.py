"""Reports read back: what does not follow the schema is refused, as by a library for schemas."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest

import ptq_cli
from ptq_cli.errors import InputError
from ptq_cli.storage.reports import read_report
from tests.report.html import documents

SCHEMA = json.loads((Path(ptq_cli.__file__).parent / "report" / "report.schema.json").read_text())
UNDERSTOOD = {"$ref", "anyOf", "type", "properties", "required", "items", "minItems"}
UNDERSTOOD |= {"minimum", "maximum", "exclusiveMinimum", "additionalProperties"}
SILENT = {"$schema", "$defs", "title", "description"}


def good() -> dict:
    document = documents.document(documents.rows(3), quality=copy.deepcopy(documents.QUALITY))
    allocation = copy.deepcopy(documents.ALLOCATION)
    document["settings"] = {**document["settings"], "allocation": allocation}
    del allocation["curve"][2:]
    return document


def schemas(node):
    """Every schema in the schema."""
    yield node
    for key in ("properties", "$defs"):
        for part in node.get(key, {}).values():
            yield from schemas(part)
    for part in (node.get("items"), node.get("additionalProperties"), *node.get("anyOf", ())):
        if isinstance(part, dict):
            yield from schemas(part)


def test_every_word_of_the_schema_is_understood():
    assert {key for node in schemas(SCHEMA) for key in node} <= UNDERSTOOD | SILENT


def test_a_good_report_is_read_as_it_stands(tmp_path):
    path = documents.write(tmp_path / "r.json", good())
    assert read_report(path) == (good(), None)


def places(value, path=()):
    """Every place in a document."""
    yield path
    entries = value.items() if isinstance(value, dict) else ()
    for key, entry in enumerate(value) if isinstance(value, list) else entries:
        yield from places(entry, (*path, key))


def changed(place, new):
    document = good()
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    if new is KeyError:
        del owner[place[-1]]
    else:
        owner[place[-1]] = new
    return document


def refusal(path: Path) -> str | None:
    try:
        read_report(path)
    except InputError as error:
        return error.message
    return None


PLACES = [place for place in places(good()) if place and "settings" not in place[1:]]
VALUES = [KeyError, None, True, "text", -1, 0, 1.5, 99, [], {}, [None], {"x": None}]


@pytest.mark.parametrize("count", [30, pytest.param(120, marks=pytest.mark.slow)])
def test_whatever_the_schema_forbids_is_refused(tmp_path, count):
    """Each place of a report changed to each of some values; unknown keys alone are let pass."""
    lenient = copy.deepcopy(SCHEMA)
    for node in schemas(lenient):
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]
    validator = jsonschema.Draft202012Validator(lenient)
    path, counts = tmp_path / "r.json", [0, 0]
    for place in PLACES[:: max(1, len(PLACES) // count)]:
        for new in VALUES:
            document = changed(place, new)
            documents.write(path, document)
            valid = validator.is_valid(document)
            accepted = refusal(path) is None
            assert accepted == valid, (place, new)
            counts[valid] += 1
    assert min(counts) > 20


@pytest.mark.parametrize(
    ("place", "new", "words"),
    [
        (("layers", 1, "rel_err"), "x", "layers[1].rel_err is str, not number"),
        (("layers", 0, "module"), KeyError, "layers[0] lacks 'module'"),
        (("totals", "bytes_after"), -5, "totals.bytes_after is -5, out of range"),
        (("layers", 0, "shape"), [3], "layers[0].shape is too short"),
        (("layers", 0, "loss"), 10**400, "layers[0].loss is no number to work with"),
        (
            ("settings", "allocation", "curve", 0, 1),
            "x",
            "settings.allocation.curve[0][1] is str, not number",
        ),
        (("totals",), KeyError, "the document lacks 'totals'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, place, new, words):
    path = documents.write(tmp_path / "r.json", changed(place, new))
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert caught.value.message == f"{path}: not a report of ptq: {words}"


@pytest.mark.parametrize("text", ["", "[1]", "{", "NaN", '{"layers": 1e999}', "[" * 100000, "\xff"])
def test_files_that_are_no_reports_are_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text, "latin-1")
    with pytest.raises(InputError, match=str(path)):
        read_report(path)


def test_a_folder_without_a_report_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no report.json in it\nptq eval"):
        read_report(tmp_path)
