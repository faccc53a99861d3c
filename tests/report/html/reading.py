"""A page as a reader of HTML sees it, without this project's code."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str | None = None) -> list[Element]:
        """Every element below, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if tag in (None, child.tag) else []
                found += child.all(tag)
        return found

    def by_id(self, name: str) -> Element:
        (found,) = [e for e in self.all() if e.attributes.get("id") == name]
        return found


class _Reader(HTMLParser):
    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        assert len(element.attributes) == len(attrs), f"twice in {tag}: {attrs}"
        self.open[-1].children.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """The page's elements; every tag is closed by its own."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def cells(table: Element) -> list[dict[str, str]]:
    """Rows of a table as column title -> text."""
    head, *body = table.all("tr")
    titles = [cell.text for cell in head.all("th")]
    rows = []
    for row in body:
        texts = [c.text for c in row.children if isinstance(c, Element)]
        rows.append(dict(zip(titles, texts, strict=True)))
    return rows
