"""`--help`: options by topic, in the order of need, on 80 columns."""

from __future__ import annotations

import re

import click
import pytest

from ptq_cli.cli.main import cli
from ptq_cli.cli.options import SECTIONS
from tests.builders import ptq

COMMANDS = ("calibrate", "gptq", "rtn", "smoothquant", "awq", "pack", "eval")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_once_in_its_section(name):
    text = ptq(name, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == [section for section in SECTIONS if section in headings]
    start = text.index(f"\n{headings[0]}:\n")
    command = cli.get_command(click.Context(cli), name)
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text[start:], re.MULTILINE)
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert sorted(listed) == sorted(["--help", *(option.opts[-1] for option in options)])


@pytest.mark.parametrize(
    ("option", "section"),
    [("--bits", "Numbers"), ("--refine", "Method"), ("--tokens", "Calibration"),
     ("--format", "Output"), ("--workers", "Run"), ("--html", "Report"), ("--min-gain", "Gates")],
)  # fmt: skip
def test_an_option_is_found_under_its_topic(option, section):
    _, text = ptq("gptq", "--help").out.split(f"\n{section}:\n")
    assert option in re.split(r"^\w+:$", text, flags=re.MULTILINE)[0]
