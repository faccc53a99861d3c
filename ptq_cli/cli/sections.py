"""Help by topic: an option names the section of its command's help that it stands in."""

from __future__ import annotations

from typing import Any

import click

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
