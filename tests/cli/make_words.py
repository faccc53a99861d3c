"""Writes ptq_cli/cli/words.py, which completion reads: `python -m tests.cli.make_words`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from ptq_cli.cli.main import COMMANDS, cli

TARGET = Path(__file__).parents[2] / "ptq_cli" / "cli" / "words.py"
HEAD = '''\
"""Every command's words, for completion. Written by tests/cli/make_words.py."""
# ruff: noqa: E501
# fmt: off

'''
WEIGHTS = ".safetensors .safetensors.index.json .gguf"
STATISTICS, ARRAY = ".safetensors", ".npy"
TAKES = {
    "model": WEIGHTS, "original": WEIGHTS, "quantized": WEIGHTS, "path": WEIGHTS, "out": WEIGHTS,
    "calibration": STATISTICS, "merge": STATISTICS,
    "activations": ARRAY, "tokens": ARRAY, "mask": ARRAY,
    "config": ".toml", "report_path": ".csv .json", "html": ".html", "junit": ".xml",
}  # fmt: skip


def entry(param: click.Parameter) -> tuple[str, object, str]:
    """One parameter: its words, what it takes, and its help in a few words."""
    takes: object = ""
    if getattr(param, "is_flag", False):
        takes = None
    elif isinstance(param.type, click.Choice):
        takes = tuple(map(str, param.type.choices))
    elif isinstance(param.type, click.Path):
        usual = "dir" if param.metavar == "DIR" else "file"
        takes = TAKES.get(param.name or "", usual)
    if isinstance(param, click.Argument):
        return (param.name or "").upper(), takes, ""
    words = list(param.opts)
    if param.secondary_opts:
        words[-1] += f"/{param.secondary_opts[0]}"
    text = re.split(r"[.;:]\s|\s\(|\[default", getattr(param, "help", "") or "")[0]
    return " ".join(words), takes, text.strip().rstrip(".")


def table() -> str:
    """The module's text."""
    context = click.Context(cli)
    lines = [HEAD, "from typing import Any\n\n", "GROUP: tuple[tuple[str, Any, str], ...] = (\n"]
    lines += [f"    {entry(param)!r},\n" for param in cli.params]
    lines += [")\n\nWORDS: dict[str, tuple[str, tuple[tuple[str, Any, str], ...]]] = {\n"]
    for name, (_, text) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        lines.append(f"    {name!r}: ({text!r}, (\n")
        lines += [f"        {entry(param)!r},\n" for param in command.params]
        lines.append("    )),\n")
    return "".join([*lines, "}\n"])


if __name__ == "__main__":
    TARGET.write_text(table())
    sys.stdout.write(f"{TARGET}\n")
