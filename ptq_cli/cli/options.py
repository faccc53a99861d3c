"""Help by topic: an option names the section of its command's help that it stands in.

Options of settings: each field of a settings class is one (core/settings.py says how).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import click

from ptq_cli.core.settings import settings_fields

_METAVARS: Mapping[Any, str] = {int: "N", float: "X"}
# In the order of need.
SECTIONS = ("Numbers", "Method", "Calibration", "Output", "Run", "Report", "Gates", "Help")
COLUMN = 24  # characters for an option's words; the texts of all sections stand in one column


class Option(click.Option):
    """An option in a section."""

    section = SECTIONS[-1]


class Command(click.Command):
    """A command whose help lists its options section by section, in the order they were given."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                words, text = record
                section = getattr(param, "section", Option.section)
                found[section].append((words.ljust(COLUMN), text))
        for section, records in found.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records, col_max=COLUMN)


def option(*names: str, **details: Any) -> Option:
    """Names and details are those of `click.Option`."""
    return Option(names, **details)


def in_section(section: str, *options: Option) -> tuple[Option, ...]:
    for each in options:
        each.section = section
    return options


def setting_options(
    section: str, *classes: type[Any], defaults: Mapping[str, Any] = {}
) -> list[Option]:
    """An option for each field; a field's own `section` is stronger.

    defaults: the command's own defaults, where they are not the fields'
    """
    found: list[Option] = []
    for field, kind in settings_fields(*classes):
        if not field.metadata.get("recipe_only"):
            made = _option(field, kind, defaults)
            found += in_section(field.metadata.get("section", section), made)
    return found


def _option(field: dataclasses.Field[Any], kind: Any, defaults: Mapping[str, Any]) -> Option:
    meta, word = field.metadata, field.name.replace("_", "-")
    names = [f"--{word}", field.name]
    extra: dict[str, Any] = {}
    if kind is bool:
        names[0] = f"--{word}/--{meta.get('off', 'no-' + word)}"
    elif kind == tuple[str, ...]:
        extra = {"multiple": True, "metavar": meta.get("metavar")}
    else:
        metavar = None if "choices" in meta else _METAVARS.get(kind)  # click lists choices
        extra = {"type": _click_type(field, kind), "metavar": meta.get("metavar", metavar)}
    if kind is int and "choices" in meta:  # click before 8.2 has choices of words only
        extra["callback"] = lambda ctx, param, value: None if value is None else int(value)
    if "short" in meta:
        names.insert(0, meta["short"])
    default = _shown_default(field, kind, defaults.get(field.name, field.default))
    text = meta["help"] + (f"  [default: {default}]" if default else "")
    return option(*names, default=None, help=text, **extra)


def _click_type(field: dataclasses.Field[Any], kind: Any) -> Any:
    meta = field.metadata
    if "choices" in meta:
        return click.Choice([str(choice) for choice in meta["choices"]], case_sensitive=False)
    if kind is int:
        return click.IntRange(meta.get("min"), meta.get("max"))
    if "words" in meta:
        return click.STRING
    if kind is float:
        return click.FloatRange(meta.get("min"), meta.get("max"))
    return kind


def _shown_default(field: dataclasses.Field[Any], kind: Any, default: Any) -> str:
    if "shown" in field.metadata:
        return str(field.metadata["shown"])
    if kind is bool:
        word = field.name.replace("_", "-")
        return word if default else str(field.metadata.get("off", "no-" + word))
    return "" if default in ((), "") else str(default)
