"""Pictures: a matplotlib figure as SVG that takes its colours and font from the page.

A figure is drawn once, in colours that stand for roles ("ours", "rtn", "ink"); in the SVG each
becomes a CSS variable, so one drawing serves light and dark. Text stays text. The same figure gives
the same bytes: no date, no random ids, no settings of the user's.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ptq_cli.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = tuple(f"series-{i}" for i in range(1, 9))
ROLES = ("ink", "muted", "grid", "paper", "ours", "rtn", "bad", *SERIES)
_HEX = {role: f"#0000{number:02x}" for number, role in enumerate(ROLES, 1)}
_VARIABLE = {code: f"var(--{role})" for role, code in _HEX.items()}
_FONT = 12.0  # pixels at a figure's natural size
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ptq",
    "text.parse_math": False,
    "font.size": _FONT,
    "axes.titlesize": _FONT,
    "legend.fontsize": _FONT,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "path.simplify": True,
}


def colour(role: str) -> str:
    """What matplotlib is given for a role."""
    return _HEX[role]


def require_matplotlib(what: str) -> None:
    """Raises InputError where matplotlib is not installed."""
    import_extra("matplotlib", what, "report")


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's are; its complaints about glyphs that
    its font lacks are not ours: the browser has the fonts."""
    import matplotlib.style

    roles = {
        "text.color": colour("ink"),
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("grid"),
        "xtick.color": colour("grid"),
        "ytick.color": colour("grid"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
        "grid.color": colour("grid"),
    }
    with matplotlib.style.context(["default", {**_SETTINGS, **roles}]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of that many pixels; call within `drawing`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def as_svg(figure: Figure, name: str, labelled_by: str, css: str = "") -> str:
    """The figure as an `<svg>` element for an HTML page; call within `drawing`.

    name: begins every id in it; labelled_by: ids of what says in words what it shows
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style") or _is_backdrop(child):
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        element.tag = _local(element.tag)
        _tidy(element, name, used)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "class": f"picture {css}".strip(),
        "role": "img",
        "aria-labelledby": labelled_by,
    }
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _is_backdrop(element: ElementTree.Element) -> bool:
    """The empty rectangles behind a figure and its axes."""
    paths = list(element)
    styles = [path.get("style", "").replace(" ", "") for path in paths]
    return element.get("id", "").startswith("patch_") and styles == ["fill:none"]


def _references(root: ElementTree.Element) -> set[str]:
    found: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if _local(key) == "href":
                found.add(value.removeprefix("#"))
            found |= set(re.findall(r"url\(#([^)]*)\)", value))
    return found


def _tidy(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Short attributes without namespaces, ids of the page's own, variables for colours."""
    attributes: dict[str, Any] = {}
    for key, value in element.attrib.items():
        key = _local(key)
        if key == "id":
            if value not in used:
                continue
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value.removeprefix('#')}"
        elif key == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        elif key == "style":
            value = _style(value)
        elif key in ("d", "x", "y", "transform", "width", "height"):
            value = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split())
            value = "" if key == "transform" and value.startswith("rotate(-0 ") else value
        if value:
            attributes[key] = value
    element.attrib.clear()
    element.attrib.update(attributes)


def _style(value: str) -> str:
    """CSS without font families (the page has one), its colours variables."""
    parts = [part.strip() for part in value.split(";")]
    kept = [
        part for part in parts if part and not part.startswith(("font-family", "stroke-linecap"))
    ]
    return re.sub(
        r"#[0-9a-f]{6}", lambda found: _VARIABLE.get(found[0], found[0]), ";".join(kept)
    ).replace(": ", ":")
