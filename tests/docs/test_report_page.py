"""docs/report.md explains every field of the report, and names none that is not there."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ptq_cli
from ptq_cli.cli.main import cli
from ptq_cli.core.report import LayerReport
from ptq_cli.report import report

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
SCHEMA: dict[str, Any] = json.loads(
    (Path(ptq_cli.__file__).parent / "report" / "report.schema.json").read_text("utf-8")
)
PARTS: dict[str, dict[str, Any]] = SCHEMA["$defs"]


def explained(heading: str) -> set[str]:
    """Names in the first cells of a section's table, where something is said of them."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    names = set()
    for row in rows:
        first, *said = (cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|")))
        assert said[-1], f"nothing is said of {first}"
        names |= set(re.findall(r"`([^`]+)`", first))
    return names


def test_every_column() -> None:
    assert explained("A row of `layers`") == {field.name for field in fields(LayerReport)}


def test_every_total() -> None:
    of_some = {"rounded_inputs"}  # there where inputs are rounded
    assert explained("`totals`") == set(report.totals([], [], 0, 0, 0.0)) | of_some


def test_the_schema_has_the_same() -> None:
    assert explained("`totals`") == set(PARTS["totals"]["properties"])
    assert explained("`quality`: predictions") == set(PARTS["quality"]["properties"])


def test_every_key_of_the_document() -> None:
    own = set(SCHEMA["properties"])
    assert explained("The rest of the document") == own
    sites = PAGE.split("| `sites` |")[1].splitlines()[0]
    assert set(PARTS["site"]["properties"]) <= set(re.findall(r"`([^`]+)`", sites))


@pytest.mark.parametrize("name", ["gptq", "eval"])
def test_every_gate(name: str) -> None:
    """A gate is an option whose help says what it fails on."""
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    gates = {
        param.opts[0]
        for param in command.params
        if (getattr(param, "help", None) or "").startswith("Fail where")
        and param.opts[0].startswith(("--max-", "--min-"))
    }
    assert gates
    assert gates <= {gate.split()[0] for gate in explained("Gates")}
