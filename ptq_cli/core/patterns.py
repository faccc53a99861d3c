"""Regular expressions from files that nobody vouches for.

Python's `re` tries every way to match: `(a+)+$` on a name of 60 letters runs for years. What a
config.json may hold is therefore bounded before it is tried.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import comb

from ptq_cli.core.text import middle
from ptq_cli.errors import InputError

_WAYS = 10_000_000  # to match that are tried at most: a fraction of a second
_LONGEST = 4096
_TOKEN = re.compile(
    r"""(?P<atom>\\. | \[\^?\]?(?:\\.|[^\]\\])*\])
    |   (?P<comment>\(\?(?:\#|[a-zA-Z]*x))
    |   (?P<open>\()(?:\?(?:P?<\w+>|[:>=!]|<[=!])?)?
    |   (?P<close>\))
    |   (?P<either>\|)
    |   (?P<optional>\?)
    |   (?P<repeat>[*+] | \{\d*,\d*\})
    |   (?P<times>\{\d+\})
    |   (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def foreign_match(pattern: str, name: str, where: str) -> bool:
    """Whether a name matches from its start on, as `re.match` says.

    where: said first in an error

    Raises:
        InputError: not a regular expression, or one that could take long: a repeat of what is
            itself of many lengths, or many repeats on a long name.
    """
    compiled, repeats, choices = _read(pattern, where)
    if comb(len(name) + repeats, repeats) * choices > _WAYS:
        raise _refused(where, pattern, f"it has too many repeats for a name of {len(name)} letters")
    return compiled.match(name) is not None


def _refused(where: str, pattern: str, why: str) -> InputError:
    return InputError(
        f"{where}: the regular expression {middle(pattern, 100)!r} could take hours: {why}"
    )


@lru_cache(maxsize=1024)
def _read(pattern: str, where: str) -> tuple[re.Pattern[str], int, int]:
    """Compiled; how many repeats it has, and how many ways there are to choose besides."""
    if len(pattern) > _LONGEST:
        raise _refused(where, pattern, f"it has {len(pattern)} characters")
    repeats, choices = _count(pattern, where)
    try:
        return re.compile(pattern), repeats, choices
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def _count(pattern: str, where: str) -> tuple[int, int]:
    """The repeats (`*`, `+`, `{2,}`) of a pattern, and the product of its other choices (`?`, `|`).

    Raises:
        InputError: a group with any of these in it is repeated.
    """
    repeats, choices = 0, 1
    alternatives = [1]  # of each group that is open
    chooses = [False]  # whether there is anything to choose in it
    last, closed = "", False  # the token before; whether there was in the group that closed last
    for token in _TOKEN.finditer(pattern):
        kind = str(token.lastgroup)
        if kind == "comment":
            raise _refused(where, pattern, "it may have comments")
        if kind in ("repeat", "times") and last == "close" and closed:
            raise _refused(where, pattern, "it repeats what repeats")
        if kind == "open":
            alternatives.append(1)
            chooses.append(False)
        elif kind == "close" and len(chooses) > 1:
            choices *= alternatives.pop()
            closed = chooses.pop()
            chooses[-1] |= closed
        elif kind == "either":
            alternatives[-1] += 1
        elif kind == "repeat":
            repeats += 1
        elif kind == "optional" and last not in ("repeat", "times", "optional"):  # else lazy
            choices *= 2
        chooses[-1] |= kind in ("either", "repeat", "optional")
        last = kind
    return repeats, choices * alternatives[0]
