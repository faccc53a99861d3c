"""docs/formats.md: what its table says was tried has a case, what it says is refused is refused."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from ptq_cli.formats.runtimes import facts, loads
from ptq_cli.formats.runtimes.artifact import Artifact
from ptq_cli.registry import FORMATS, format_named
from tests.formats.cases import layer
from tests.formats.float_weights import GRIDS, float_layer
from tests.interop import test_onnx, test_runtimes, test_small_floats

ROOT = Path(__file__).parents[2]
TITLE = "## What was tried: format × bits × symmetry × runtime"
FLOATS = "## Small floats: format × scheme × runtime"
TRIED, UNTRIED, REFUSED, BLANK = "●", "○", "–", ""
BITS = range(2, 9)
SYMMETRIES = {"symmetric": (True,), "asymmetric": (False,), "both": (True, False)}
# A column of the table: what `ptq check` calls it, and its package in the extra interop.
COLUMNS = {
    "transformers": ("transformers", "transformers"),
    "GPTQModel": ("gptqmodel", "gptqmodel"),
    "mlx-lm": ("mlx", "mlx-lm"),
    "ONNX Runtime": (None, "onnxruntime"),
}
CLIENTS = {
    "transformers": "transformers", "transformers+gptqmodel": "transformers",
    "gptqmodel": "GPTQModel", "mlx": "mlx-lm",
}  # fmt: skip


class Cell(NamedTuple):
    format: str
    bits: int
    sym: bool
    column: str


def rows(title: str = TITLE) -> list[list[str]]:
    section = (ROOT / "docs" / "formats.md").read_text("utf-8").split(title + "\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


HEAD, _, *BODY = rows()
NAMES = [heading.rsplit(" ", 1)[0] for heading in HEAD[3:]]


def cells() -> dict[Cell, str]:
    found: dict[Cell, str] = {}
    for formats, bits, symmetry, *marks in BODY:
        assert len(marks) == len(NAMES), formats
        for name in re.findall(r"`([^`]+)`", formats):
            for width in map(int, bits.split(",")):
                for sym in SYMMETRIES[symmetry]:
                    for column, mark in zip(NAMES, marks, strict=True):
                        cell = Cell(name, width, sym, column)
                        assert cell not in found, f"twice: {cell}"
                        found[cell] = mark
    return found


def tried() -> dict[Cell, list[float]]:
    """Every cell that tests/interop loads, with its cases' tolerances."""
    found: dict[Cell, list[float]] = defaultdict(list)
    for case in test_runtimes.CASES:
        default = test_runtimes.TOLERANCES[case.client]
        found[Cell(case.format, case.bits, case.sym, CLIENTS[case.client])].append(
            default if case.tolerance is None else case.tolerance
        )
    for bits, _, sym, _ in test_onnx.CASES:
        found[Cell("onnx", bits, sym, "ONNX Runtime")].append(1e-6)
    return found


CELLS, CASES = cells(), tried()


def marked(mark: str) -> list[Cell]:
    return [cell for cell, text in CELLS.items() if text[:1] == mark]


def loaded(cell: Cell) -> bool:
    """What `ptq check` makes of a model of one such layer, as its format declares it."""
    runtime, _ = COLUMNS[cell.column]
    if runtime is None:
        return cell.format == "onnx"
    fmt = format_named(cell.format)
    own = layer(bits=cell.bits, sym=cell.sym)
    if fmt.misfit(own) is not None:
        own = layer()
    config = {"model_type": "llama", "dtype": "float16"}
    config |= dict.fromkeys(fmt.config_keys, fmt.config([own], []))
    files = ["model.gguf"] if cell.format == "gguf" else ["config.json", "tokenizer.json"]
    return loads(facts(Artifact(cell.format, [own], [], config, files), runtime))


def test_every_cell_stands_in_the_table_once() -> None:
    formats = [name for name in FORMATS if name != "ptq"]
    grid = {Cell(f, b, s, c) for f in formats for b in BITS for s in (True, False) for c in COLUMNS}
    assert set(CELLS) == grid
    assert {text[:1] for text in CELLS.values()} <= {TRIED, UNTRIED, REFUSED, BLANK}


def test_columns_name_the_versions_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(pin.split("==") for pin in project["optional-dependencies"]["interop"])
    for heading in HEAD[3:]:
        name, version = heading.rsplit(" ", 1)
        assert f"{pins[COLUMNS[name][1]]}.".startswith(f"{version}."), heading


def test_tried_is_what_has_a_case() -> None:
    assert set(marked(TRIED)) == set(CASES)


def test_figures_are_within_the_tolerances() -> None:
    for cell in marked(TRIED):
        figure = re.match(r"● (\d\S*?),?(?: |$)", CELLS[cell])
        assert figure is not None, cell
        assert float(figure[1]) <= min(CASES[cell]), cell


def test_refused_is_what_the_format_cannot_hold() -> None:
    for cell, text in CELLS.items():
        if text[:1] != BLANK:
            reason = format_named(cell.format).misfit(layer(bits=cell.bits, sym=cell.sym))
            assert (reason is not None) == (text[:1] == REFUSED), (cell, reason)


@pytest.mark.parametrize("column", NAMES)
def test_blank_is_what_the_runtime_does_not_read(column: str) -> None:
    for cell, text in CELLS.items():
        if cell.column == column:
            # A refused cell says nothing of the runtime but that it reads the format otherwise.
            assert loaded(cell) == (text[:1] != BLANK), cell


def of_schemes() -> dict[tuple[str, str, str], str]:
    """(format, scheme, client) of the table of small floats → its mark and figure."""
    head, _, *body = rows(FLOATS)
    clients = [heading.split(" ")[0].removesuffix("-lm") for heading in head[2:]]
    return {
        (fmt.strip("`"), scheme, client): mark
        for fmt, schemes, *marks in body
        for scheme in re.findall(r"`([^`]+)`", schemes)
        for client, mark in zip(clients, marks, strict=True)
    }


def test_schemes_that_were_tried_have_a_case() -> None:
    table = of_schemes()
    tried = {
        (case.format, scheme, case.client): test_small_floats.TOLERANCES[case.client]
        for case in test_small_floats.CASES
        for scheme in case.scheme.split(" and ")
    }
    assert {key for key, mark in table.items() if mark[:1] == TRIED} == tried.keys()
    for key, most in tried.items():
        figure = re.match(r"● (\S*?),?(?: |$)", table[key])
        assert figure is not None
        assert float(figure[1]) <= most


def test_schemes_that_are_refused() -> None:
    table = of_schemes()
    schemes = [name for name in GRIDS if name != "FP8A16"]  # which has no name of its own
    formats = {"compressed-tensors": "transformers", "fp8": "transformers", "mlx": "mlx"}
    for fmt, client in formats.items():
        for scheme in schemes:
            own, record = float_layer(scheme), format_named(fmt)
            if own.grid.scale_dtype == "bfloat16":
                own = float_layer(scheme, scale_dtype=record.scale_dtype("BF16"))
            assert (record.misfit(own) is None) == (table[fmt, scheme, client][:1] == TRIED)
