"""The generated parts of docs/ are what the code makes of them today.

CI compares every byte (`cog --check`); here, without cog, white space aside, as click breaks lines
of help differently from version to version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PART = re.compile(r"<!-- \[\[\[cog (.*?) \]\]\] -->\n(.*?)<!-- \[\[\[end\]\]\] -->", re.DOTALL)
PARTS = [
    pytest.param(page.name, code, text, id=f"{page.stem}-{re.findall(r'[a-z]+', code)[-1]}")
    for page in sorted(DOCS.glob("*.md"))
    for code, text in PART.findall(page.read_text("utf-8"))
]


def test_there_is_something_to_compare() -> None:
    assert {part.values[0] for part in PARTS} >= {"commands.md", "settings.md", "runtimes.md"}


@pytest.mark.parametrize(("page", "code", "text"), PARTS)
def test_part_is_fresh(page: str, code: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    made: list[str] = []
    exec(code, {"cog": SimpleNamespace(out=made.append)})
    monkeypatch.delitem(sys.modules, "tables")
    assert text.split() == "".join(made).split(), f"{page} is stale: cog -r -I docs docs/*.md"
