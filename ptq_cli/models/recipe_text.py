"""Sites as a recipe for somebody to check: `[[sites]]` in TOML, as models/recipe.py reads them.

::

    # likely: by what they are called
    [[sites]]
    linears = ["blocks.*.attn.wq", "blocks.*.attn.wkv"]
    # norm = "blocks.*.norm_1"

What may feed a site is in comments, since awq and smoothquant fold factors into it: it counts only
once somebody has looked at the model's code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ptq_cli.core.text import printable, quoted
from ptq_cli.models.sites import SitePattern, Specs

_WIDTH = 100
_CHECK = "Check that the linears of a site see the same input, and give this file with --config."
_FED = (
    "Lines with norm and after say what may feed a site. For awq and smoothquant take their #",
    "away where the norm feeds nothing else (plus_one = true: its gain is stored less one), and",
    "where what is between two linears commutes with a scale per channel.",
)


def recipe_text(about: str, sites: Iterable[tuple[SitePattern, str]], specs: Specs) -> str:
    """The recipe, sites that differ in their numbers only written once.

    about: a line on where they come from; sites: of full names, and what is said of each
    specs: the headers of the whole checkpoint
    """
    numbers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in specs:
        if name.endswith(".weight"):
            numbers[_starred(name)].add(_numbers(name))
    alike: dict[tuple[SitePattern, str], list[SitePattern]] = defaultdict(list)
    for pattern, said in sites:
        alike[pattern.named(_starred), said].append(pattern)
    fed = _FED if any(pattern.norm or pattern.after for pattern, _ in alike) else ()
    lines = [f"# {printable(line)}" for line in (about, _CHECK, *fed)]
    for (starred, said), patterns in alike.items():
        whole = all(map(_one_star_fits, patterns)) and (
            numbers[f"{starred.linears[0]}.weight"] == {_numbers(x.linears[0]) for x in patterns}
        )
        for pattern in [starred] if whole else patterns:
            lines += ["", *_entry(pattern, said)]
    return "\n".join(lines)


def _starred(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def _one_star_fits(pattern: SitePattern) -> bool:
    """Whether a `*` can stand for the same number in all names of a site."""
    modules = [module for module in (*pattern.linears, pattern.norm, pattern.after) if module]
    starred = set(map(_starred, modules))
    return len(starred) == len(modules) and len(set(map(_numbers, modules))) == 1


def _entry(pattern: SitePattern, said: str) -> list[str]:
    names = [quoted(linear) for linear in pattern.linears]
    lines = [f"# {printable(said)}", "[[sites]]", f"linears = [{', '.join(names)}]"]
    if len(lines[-1]) > _WIDTH:
        lines[-1:] = ["linears = [", *(f"    {name}," for name in names), "]"]
    if pattern.norm:
        lines.append(f"# norm = {quoted(pattern.norm)}")
    if pattern.after:
        lines.append(f"# after = {quoted(pattern.after)}")
        if pattern.layout != "all":
            lines.append(f"# layout = {quoted(pattern.layout)}")
        if pattern.layout == "heads" and pattern.heads:
            lines.append(f"# heads = {pattern.heads}")
    if pattern.transposed:
        lines.append("transposed = true")
    return lines
