"""Extras: what is missing is named with what installs it, and `all` is all of them."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.builders import ROOT, ptq

# An extra, a package of it as Python imports it, and options that need that.
NEEDED = [
    ("text", "tokenizers", "--text", "text.txt"),
    ("text", "jinja2", "--chat", "chat.jsonl"),
    ("report", "matplotlib", "--html", "page.html"),
    ("onnx", "onnx", "--format", "onnx"),
    ("distributed", "distributed", "--scheduler", "tcp://127.0.0.1:1"),
]


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed[1])
def test_a_missing_package_is_named_with_its_extra(needed, sample, monkeypatch):
    extra, package, *options = needed
    monkeypatch.setitem(sys.modules, package, None)
    outcome = ptq("rtn", sample, *options, "-o", "out")
    assert outcome.code == 1
    (error,) = outcome.errors
    assert options[0] in error
    assert error.endswith(f"is not installed; pip install 'ptq[{extra}]' (or 'ptq[all]')")
    assert not Path("out").exists()


def test_all_is_every_extra_of_a_user():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    (said,) = extras["all"]
    named = re.fullmatch(r"ptq\[(.*)\]", said)[1].split(",")
    assert sorted(named) == sorted({extra for extra, *_ in NEEDED})
    assert set(extras) - {*named, "all"} == {"test", "lint", "interop", "browser"}
