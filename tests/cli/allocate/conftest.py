"""The model of these tests, and what was measured of it: each once a session, not to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.allocate.words import BUDGET, CHOICES, QUICK, TOKENS, WIDTHS, done
from tests.run.tiny_llama import tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A Llama of two blocks with its tokens."""
    return tiny_llama(tmp_path_factory.mktemp("allocate") / "m", 64)


@pytest.fixture
def model(llama, tmp_path) -> Path:
    """A copy of it in the test's own folder."""
    return shutil.copytree(llama, tmp_path / "m")


@pytest.fixture(scope="session")
def gptq(llama, tmp_path_factory) -> Path:
    """A folder with what `gptq` makes of a budget: `r.toml`, `t.json`, and what was `printed`."""
    folder = tmp_path_factory.mktemp("gptq")
    where = ("--table", folder / "t.json", "-o", folder / "r.toml")
    outcome = done("allocate", llama, *TOKENS(llama), *BUDGET, *WIDTHS, *where)
    (folder / "printed").write_text(outcome.out)
    return folder


@pytest.fixture(scope="session")
def quick(llama, tmp_path_factory) -> Path:
    """The same with `r.toml` and `t.json` of rounding to nearest."""
    folder = tmp_path_factory.mktemp("quick")
    where = ("--table", folder / "t.json", "-o", folder / "r.toml")
    done("allocate", llama, *TOKENS(llama), *BUDGET, *QUICK, *where)
    return folder


@pytest.fixture
def measured(model, quick) -> Path:
    """The test's own model, with the table of `quick` beside it."""
    shutil.copy(quick / "t.json", "m.choices.json")
    return model


@pytest.fixture(scope="session")
def errors(llama, tmp_path_factory):
    """The table of the model's weights alone, rounded to nearest at `CHOICES`, by format."""
    tables: dict[str, Path] = {}

    def make(fmt: str) -> Path:
        if fmt not in tables:
            path = tmp_path_factory.mktemp("table") / "t.json"
            run = ("--format", fmt, *CHOICES[fmt], "--method", "rtn", "--target-bpw", 5.5)
            done("allocate", llama, *run, "--table", path, "-o", path.with_suffix(".toml"))
            tables[fmt] = path
        return tables[fmt]

    return make
