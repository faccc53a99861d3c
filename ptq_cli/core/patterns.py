"""Regular expressions from files that nobody vouches for.

Python's `re` tries every way to match: `(a+)+$` on a name of 60 letters runs for years. What a
config.json may hold is therefore bounded before it is tried: each pattern, and the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import comb

from ptq_cli.core.text import middle
from ptq_cli.errors import InputError

_STEPS = 10_000_000  # of one pattern on one name: a fraction of a second
_STEPS_OF_LIST, _STEPS_A_NAME = 100_000_000, 200_000
_CALL = 100  # steps that it takes to try a pattern at all
_MOST, _CHARACTERS = 10_000, 500_000  # of a list
_LONGEST = 4096
_TOKEN = re.compile(
    r"""(?P<atom>\\. | \[\^?\]?(?:\\.|[^\]\\])*\])
    |   (?P<comment>\(\?(?:\#|[a-zA-Z]*x))
    |   (?P<open>\()(?:\?(?:P?<\w+>|[:>=!]|<[=!])?)?
    |   (?P<close>\))
    |   (?P<either>\|)
    |   (?P<optional>\?)
    |   (?P<repeat>[*+] | \{(?P<least>\d*),\d*\})
    |   (?P<times>\{(?P<number>\d+)\})
    |   (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


class ForeignPatterns:
    """A list of patterns that are tried on many names, each compiled once."""

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        """
        where: said first in an error

        Raises:
            InputError: not a regular expression, one that repeats what repeats, too many.
        """
        self._where = where
        self._left = _STEPS_OF_LIST
        if len(patterns) > _MOST or sum(map(len, patterns)) > _CHARACTERS:
            raise InputError(
                f"{where}: {len(patterns)} regular expressions, more than {_MOST} or with more than"
                f" {_CHARACTERS} characters"
            )
        self._patterns = [(_compiled(text, where), *_count(text, where)) for text in patterns]

    def first(self, name: str) -> int | None:
        """The place in the list of the first pattern that matches from the start of the name on,
        as `re.match` says.

        Raises:
            InputError: it could take long: many repeats on a long name, or all together.
        """
        self._left += _STEPS_A_NAME
        for place, (pattern, repeats, ways) in enumerate(self._patterns):
            steps = _CALL + comb(len(name) + repeats, repeats) * ways
            if steps > _STEPS:
                why = f"it has too many repeats for a name of {len(name)} letters"
                raise _refused(self._where, pattern.pattern, why)
            self._left -= steps
            if self._left < 0:
                count = len(self._patterns)
                raise InputError(f"{self._where}: {count} regular expressions could take hours")
            if pattern.match(name):
                return place
        return None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise _refused(where, pattern, f"it has {len(pattern)} characters")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def _refused(where: str, pattern: str, why: str) -> InputError:
    return InputError(
        f"{where}: the regular expression {middle(pattern, 100)!r} could take hours: {why}"
    )


def _count(pattern: str, where: str) -> tuple[int, int]:
    """The repeats (`*`, `+`, `{2,}`) of a pattern, and the product of its other choices (`?`, `|`)
    of the numbers in `{9}` and `{9,}`, which may stand one inside the other, and of how long one
    way takes: a step for eight tokens.

    Raises:
        InputError: a group with any choice in it is repeated.
    """
    repeats, ways = 0, 1
    alternatives = [1]  # of each group that is open
    chooses = [False]  # whether there is anything to choose in it
    last, closed = "", False  # the token before; whether there was in the group that closed last
    tokens = list(_TOKEN.finditer(pattern))
    for token in tokens:
        kind = str(token.lastgroup)
        if kind == "comment":
            raise _refused(where, pattern, "it may have comments")
        if kind in ("repeat", "times"):
            if last == "close" and closed:
                raise _refused(where, pattern, "it repeats what repeats")
            ways *= max(1, int(token["number"] or token["least"] or 1))
        if kind == "open":
            alternatives.append(1)
            chooses.append(False)
        elif kind == "close" and len(chooses) > 1:
            ways *= alternatives.pop()
            closed = chooses.pop()
            chooses[-1] |= closed
        elif kind == "either":
            alternatives[-1] += 1
        elif kind == "repeat":
            repeats += 1
        elif kind == "optional" and last not in ("repeat", "times", "optional"):  # else lazy
            ways *= 2
        chooses[-1] |= kind in ("either", "repeat", "optional")
        last = kind
    return repeats, ways * alternatives[0] * (1 + len(tokens) // 8)
