"""Many names of tensors and modules in few words, and in the order of their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ptq_cli.core.text import shared_start

_SHOWN = 160  # characters that a folded list takes
_CONFUSING = re.compile(r"[{},\s]|\d-\d")  # what could be read as the words of a folded list


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: "layers.10" after "layers.9"."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def by_number(names: Iterable[str]) -> list[str]:
    """Layer 10 after layer 9, wherever it is stored; else in the order in which they come."""
    split = {name: re.split(r"(\d+)", name) for name in names}
    words = dict.fromkeys(part for parts in split.values() for part in parts)
    rank = {word: int(word) if word.isdecimal() else place for place, word in enumerate(words)}
    return sorted(split, key=lambda name: [rank[part] for part in split[name]])


def fold_names(names: Iterable[str], width: int = _SHOWN) -> str:
    """Names as a short list: `model.layers.{0-29}.self_attn.{q,k,v,o}_proj`.

    Numbers become ranges, other alternatives stand in braces in the order they come in. Expanding
    the braces gives exactly the names. What does not fit into `width` characters is counted:
    `…, and 12 more`; one name is always shown.
    """
    names = list(dict.fromkeys(names))
    folded = _folded(names)
    if len(folded) <= width or len(names) < 2:
        return folded
    low, high = 1, len(names)  # so many fit, so many do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(_some(names, middle)) <= width
        low, high = (middle, high) if fits else (low, middle)
    return _some(names, low)


def fold_reasons(reasons: Mapping[str, Sequence[str]], what: str = "layers", shown: int = 3) -> str:
    """`210 layers: reason: names`, the reason of most layers first, and so many reasons."""
    most = sorted(reasons.items(), key=lambda entry: -len(entry[1]))[:shown]
    width = _SHOWN // max(1, len(most))
    said = [f"{len(names)} {what}: {why}: {fold_names(names, width)}" for why, names in most]
    more = len(reasons) - len(most)
    return "; ".join([*said, *([f"and {more} more reasons"] if more else [])])


def first_and_others(mistakes: Mapping[str, str]) -> str:
    """The first of some mistakes, by the names of what is wrong, and the names of the others."""
    first, *others = mistakes
    more = f"; {len(others)} more are wrong: {fold_names(others)}" if others else ""
    return mistakes[first] + more


def _some(names: Sequence[str], count: int) -> str:
    return f"{_folded(names[:count])}, and {len(names) - count} more"


def _folded(names: Sequence[str]) -> str:
    """All of them, whatever the length: by number first, or by kind where that is shorter."""
    split = [_parts(name) for name in names if not _CONFUSING.search(name)]
    plain = [name for name in names if _CONFUSING.search(name)]
    parents = shared_start(parts[:-1] for parts in split)
    rests = [parts[len(parents) :] for parts in split]
    by_kind = [part for same in _kinds(rests) for part in _alternatives(same)]
    shortest = min(_alternatives(rests), by_kind, key=lambda parts: len(_braced(parts)))
    if parents:
        shortest = ["".join(parents) + _braced(shortest)]
    return ", ".join([*shortest, *plain])


def _parts(name: str) -> tuple[str, ...]:
    """`a.b.c` is a., b. and c: the last part of a name is never equal to one before the last."""
    *parents, last = name.split(".")
    return (*(f"{parent}." for parent in parents), last)


def _kinds(names: Sequence[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """The names whose kinds, all but the numbers, are there with the same numbers."""
    numbers: dict[tuple[str, ...], dict[tuple[str, ...], tuple[str, ...]]] = {}
    for name in names:
        kind = tuple("0." if part[:-1].isdecimal() else part for part in name)
        own = tuple(part for part in name if part[:-1].isdecimal())
        numbers.setdefault(kind, {})[own] = name
    groups: dict[frozenset[tuple[str, ...]], list[tuple[str, ...]]] = {}
    for found in numbers.values():
        groups.setdefault(frozenset(found), []).extend(found.values())
    return list(groups.values())


def _alternatives(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Folded by their first part, those together after which the same comes."""
    rests: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        rests.setdefault(name[0], []).append(name[1:])
    groups: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first, after in rests.items():
        groups.setdefault(frozenset(after), []).append(first)
    found = []
    for firsts in groups.values():
        after = rests[firsts[0]]
        if after == [()]:
            found.append(_words(firsts))
        else:
            own = _words([first.removesuffix(".") for first in firsts])
            found.append(f"{own}.{_braced(_alternatives(after))}")
    return found


def _words(words: Sequence[str]) -> str:
    """Single words: `{q,k,v}_proj`, `w{1-3}`, `{0-3,7}`."""
    if len(words) == 1:
        return words[0]
    before, after = _shared(words)
    middles = [word[len(before) : len(word) - len(after)] for word in words]
    numbers = sorted(int(word) for word in middles if _is_number(word))
    pieces = _ranges(numbers) + [word for word in middles if not _is_number(word)]
    return f"{before}{{{','.join(pieces)}}}{after}"


def _shared(words: Sequence[str]) -> tuple[str, str]:
    """What all words begin and end with, up to a `_` or a number."""
    after = "_" + words[0].rpartition("_")[2]
    if not ("_" in words[0] and all(len(w) > len(after) and w.endswith(after) for w in words)):
        after = ""
    stems = [word.removesuffix(after) for word in words]
    before = stems[0].rstrip("0123456789") or stems[0].rpartition("_")[0]
    numbers = [stem[len(before) :] for stem in stems if stem.startswith(before)]
    together = len(numbers) == len(stems) and all(map(_is_number, numbers))
    return (before, after) if together else ("", after)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and (word == "0" or word[0] != "0")


def _ranges(numbers: Sequence[int]) -> list[str]:
    """[0, 1, 2, 7] is 0-2 and 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def _braced(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    between = ", " if any("{" in part or "." in part for part in parts) else ","
    return f"{{{between.join(parts)}}}"
