"""Words and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import takewhile

# The way out where a model cannot become a GGUF file here.
CONVERTED = (
    "make a GGUF file of the model with llama.cpp's convert_hf_to_gguf.py, and give that as MODEL"
)
TWO_STEPS = f"--format ptq, which holds every model; or {CONVERTED}"


def middle(text: str, width: int) -> str:
    """Text cut in its middle to at most `width` characters."""
    if len(text) <= width:
        return text
    left = (width - 3) // 2
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"


def nearest_or_all(word: str, known: Iterable[str]) -> str:
    """What somebody may have meant who wrote an unknown word: a hint."""
    known = list(known)
    near = get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes for people."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.2f} {unit}"
    return f"{count / 1024:.2f} GiB"


def shared_start(paths: Iterable[Sequence[str]]) -> list[str]:
    """The first parts, which all paths share."""
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in columns]


def common_parents(modules: Sequence[str]) -> str:
    """The leading names that all modules share, `model.layers.`."""
    parents = [module.split(".")[:-1] for module in modules]
    return "".join(f"{name}." for name in shared_start(parents))


def printable(text: str) -> str:
    """Text with control, bidirectional and other unprintable characters escaped."""
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def quoted(text: str) -> str:
    """A string of TOML, with escapes for what does not print."""
    escaped = (
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}"
        for char in text
    )
    return f'"{"".join(escaped)}"'
