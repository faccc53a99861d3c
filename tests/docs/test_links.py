"""Every relative link in a Markdown file leads to a file, and its anchor to a heading there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ("*.md", "docs/*.md", "benchmarks/*.md", "sample_data/*.md", "tests/golden/*.md")
PAGES = sorted(page for pattern in OWN for page in ROOT.glob(pattern))
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "code", FENCED.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    made: set[str] = set()
    for heading in headings:
        word = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        made.add(
            next(name for n in range(99) if (name := f"{word}-{n}" if n else word) not in made)
        )
    return made


def test_links_are_found() -> None:
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert target.suffix == ".md", link
            assert anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_every_page_of_docs_stands_in_its_index() -> None:
    index = set(LINK.findall(prose(ROOT / "docs" / "README.md")))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= index
