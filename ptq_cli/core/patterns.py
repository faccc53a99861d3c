"""Regular expressions from files that nobody vouches for.

Python's `re` tries every way to match: `(a+)+$` on a name of 60 letters runs for years. What a
config.json may hold is therefore bounded before it is tried: each pattern, and the whole list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb

from ptq_cli.core.text import middle
from ptq_cli.errors import InputError

_STEPS = 10_000_000  # of one pattern on one name: a fraction of a second
_STEPS_OF_LIST, _STEPS_A_NAME = 500_000_000, 100_000  # of all; on many names as many for each
_TOKENS_A_STEP = 8
_SLOW = 32  # tokens take as long as a look ahead or behind, or once more through a group
_CALL = 100  # steps that it takes to try a pattern at all
_MOST, _CHARACTERS = 10_000, 500_000  # of a list
_LONGEST = 4096
_PLAIN = re.compile(r"(?:[\w.^$-]|\\\W)*")  # no group, nothing to choose
_EXACT = re.compile(r"\^((?:[\w-]|\\\W)*)\$")  # one name
_TOKEN = re.compile(
    r"""(?P<atom>\\. | \[\^?\]?(?:\\.|[^\]\\])*\])
    |   (?P<comment>\(\?(?:\#|[a-zA-Z]*x))
    |   (?P<look>\(\?<?[=!])
    |   (?P<open>\()(?:\?(?:P?<\w+>|[:>])?)?
    |   (?P<close>\))
    |   (?P<either>\|)
    |   (?P<optional>\?)
    |   (?P<repeat>[*+] | \{(?P<least>\d*),\d*\})
    |   (?P<times>\{(?P<number>\d+)\})
    |   (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


class ForeignPatterns:
    """A list of patterns that are tried on many names, each compiled once.

    Patterns that are one name (`^lm_head$`) are looked up; plain ones (`model.layers.3`) are tried
    together, as alternatives of one expression.
    """

    def __init__(
        self, patterns: Sequence[str], names: Iterable[str], where: str, after: str = ""
    ) -> None:
        """
        names: that they will be tried on
        where: said first in an error
        after: an expression that has to match after each pattern

        Raises:
            InputError: not a regular expression, or what could take long: a repeat of what is
                itself of many lengths, many repeats on a long name, too many patterns.
        """
        self._where = where
        self._exact: dict[str, int] = {}  # name -> place in the list
        self._plain_places: list[int] = []
        self._others: list[tuple[int, re.Pattern[str]]] = []
        costs: list[tuple[str, int, int]] = []  # pattern, its repeats, steps for each way to match
        plain: list[str] = []
        characters = 0
        for place, pattern in enumerate(patterns):
            exact = None if after else _EXACT.fullmatch(pattern)
            if exact is not None:
                self._exact.setdefault(re.sub(r"\\(\W)", r"\1", exact[1]), place)
                continue
            characters += len(pattern)
            if len(plain) + len(costs) == _MOST or characters > _CHARACTERS:
                most = f"{_MOST} regular expressions, or {_CHARACTERS} characters of them"
                raise InputError(f"{where}: more than {most}, of {len(patterns)} entries")
            if len(pattern) > _LONGEST:
                raise _refused(where, pattern, f"it has {len(pattern)} characters")
            if _PLAIN.fullmatch(pattern):
                self._plain_places.append(place)
                plain.append(f"({pattern})")
                continue
            if after:
                _compiled(pattern, where)
                pattern = f"(?:{pattern}){after}"
            costs.append((pattern, *_count(pattern, where)))
            self._others.append((place, _compiled(pattern, where)))
        self._plain = re.compile(f"(?:{'|'.join(plain)}){after}")
        self._check_steps(costs, Counter(len(name) for name in names))

    def first(self, name: str) -> int | None:
        """The place in the list of the first pattern that matches from the start of the name on,
        as `re.match` says."""
        found = [self._exact[name]] if name in self._exact else []
        if self._plain_places and (match := self._plain.match(name)):
            found.append(self._plain_places[(match.lastindex or 1) - 1])
        before = min(found, default=None)
        for place, pattern in self._others:
            if before is not None and place > before:
                break
            if pattern.match(name):
                return place
        return before

    def _check_steps(self, costs: Sequence[tuple[str, int, int]], names: Counter[int]) -> None:
        """names: how many there are of each length"""
        count = sum(names.values())
        total = count * len(self._plain.pattern)
        for pattern, repeats, each in costs:
            for length, number in names.items():
                steps = comb(length + repeats, repeats) * each
                if steps > _STEPS:
                    why = f"it has too many repeats for a name of {length} letters"
                    raise _refused(self._where, pattern, why)
                total += number * (_CALL + steps)
        most = max(_STEPS_OF_LIST, count * _STEPS_A_NAME)
        if total > most:
            raise InputError(
                f"{self._where}: {len(costs) + len(self._plain_places)} regular expressions on"
                f" {count} layers could take {total} steps, more than {most}"
            )


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
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
    and of the steps that one way takes: its tokens, as often as `{9}` and `{9,}` say.

    Raises:
        InputError: a group with any choice in it is repeated.
    """
    repeats, choices = 0, 1
    alternatives = [1]  # of each group that is open
    chooses = [False]  # whether there is anything to choose in it
    tokens = [0]  # how many it has, those before its last item
    item = 0  # tokens of that item: a letter, or a group that is closed
    last, closed = "", False  # the token before; whether there was in the group that closed last
    for token in _TOKEN.finditer(pattern):
        kind = str(token.lastgroup)
        if kind == "comment":
            raise _refused(where, pattern, "it may have comments")
        if kind in ("repeat", "times") and last == "close" and closed:
            raise _refused(where, pattern, "it repeats what repeats")
        if kind in ("repeat", "times"):
            times = int(token["number"] or token["least"] or 1)
            item *= times * _SLOW if last == "close" and times > 1 else max(1, times)
        else:
            tokens[-1] += item
            item = _SLOW if kind == "look" else 1
        if kind in ("open", "look"):
            alternatives.append(1)
            chooses.append(False)
            tokens.append(0)
        elif kind == "close" and len(chooses) > 1:
            choices *= alternatives.pop()
            closed = chooses.pop()
            chooses[-1] |= closed
            item = 1 + tokens.pop()
        elif kind == "either":
            alternatives[-1] += 1
        elif kind == "repeat":
            repeats += 1
        elif kind == "optional" and last not in ("repeat", "times", "optional"):  # else lazy
            choices *= 2
        chooses[-1] |= kind in ("either", "repeat", "optional")
        last = kind
    if last == "repeat" and len(chooses) == 1 and alternatives == [1]:
        repeats -= 1  # at the end nothing can fail after it: its first way is taken
    return repeats, choices * alternatives[0] * (1 + (tokens[0] + item) // _TOKENS_A_STEP)
