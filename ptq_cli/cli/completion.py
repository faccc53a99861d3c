"""Completion in bash, zsh and fish: click's own, over a table of words instead of the commands.

Importing a command imports the engine, which takes longer than anybody waits for a TAB. words.py
holds what completion needs of every command; tests/cli/make_words.py writes it, a test compares.
What a parameter takes: a tuple of choices; None, nothing (a flag); "", anything; "dir"; "file"; or
file suffixes with folders beside them, ".npy".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
)

from ptq_cli.cli.words import GROUP, WORDS

VARIABLE = "_PTQ_COMPLETE"
Entry = tuple[str, Any, str]

# What each shell does with a path: quote it, and go on after a folder without a space.
_BASH = """\
        elif [[ $type == 'path' ]]; then
            compopt -o filenames
            COMPREPLY+=("$value")
        elif [[ $type == 'plain' ]]; then"""
_ZSH = """\
        elif [[ "$type" == "path" ]]; then
            if [[ "$key" == */ ]]; then
                compadd -U -S '' -- "$key"
            else
                compadd -U -- "$key"
            fi
        elif [[ "$type" == "dir" ]]; then"""
_FISH = """\
        else if test $metadata[1] = "plain" -o $metadata[1] = "path";"""


class Bash(BashComplete):
    source_template = BashComplete.source_template.replace(
        "        elif [[ $type == 'plain' ]]; then", _BASH
    )


class Zsh(ZshComplete):
    source_template = ZshComplete.source_template.replace(
        '        elif [[ "$type" == "dir" ]]; then', _ZSH
    )


class Fish(FishComplete):
    source_template = FishComplete.source_template.replace(
        '        else if test $metadata[1] = "plain";', _FISH
    )


SHELLS: Mapping[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}


class _Paths(click.Path):
    """Files that end in one of these, and folders."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        super().__init__()
        self.suffixes = suffixes

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        folder, start = os.path.split(incomplete)
        try:
            entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda e: e.name)
        except OSError:
            return []
        found = []
        for entry in entries:
            hidden = entry.name.startswith(".") and not start.startswith(".")
            if not entry.name.startswith(start) or hidden or "\n" in entry.name:
                continue
            if entry.is_dir() or entry.name.endswith(self.suffixes):
                path = os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
                found.append(CompletionItem(path, type="path"))
        return found


def _kind(takes: Any) -> Any:
    if isinstance(takes, tuple):
        return click.Choice(takes)
    if takes in ("file", "dir"):
        return click.Path(file_okay=takes == "file")
    return _Paths(tuple(takes.split())) if takes else click.STRING


def _parameter(entry: Entry) -> click.Parameter:
    words, takes, text = entry
    if not words.startswith("-"):
        return click.Argument([words.lower()], type=_kind(takes))
    if takes is None:
        return click.Option(words.split(), is_flag=True, help=text)
    return click.Option(words.split(), type=_kind(takes), multiple=True, help=text)


def _commands(table: Mapping[str, tuple[str, Sequence[Entry]]]) -> dict[str, click.Command]:
    return {
        name: click.Command(name, params=[_parameter(entry) for entry in entries], short_help=text)
        for name, (text, entries) in table.items()
    }


def words_group() -> click.Group:
    """The command line as far as completion knows it."""
    names = {"help_option_names": ["-h", "--help"]}
    params = [_parameter(entry) for entry in GROUP]
    return click.Group("ptq", commands=_commands(WORDS), params=params, context_settings=names)


def script(shell: str) -> str:
    """What a shell must read to complete `ptq`."""
    return ShellComplete.source(SHELLS[shell](words_group(), {}, "ptq", VARIABLE))


def answer(instruction: str) -> int:
    """Answer a shell: `bash_source`, `zsh_complete`. The exit code: 1 for an unknown word."""
    shell, _, what = instruction.partition("_")
    if shell not in SHELLS or what not in ("source", "complete"):
        return 1
    if what == "source":
        click.echo(script(shell))
    else:
        click.echo(SHELLS[shell](words_group(), {}, "ptq", VARIABLE).complete())
    return 0


@click.command("completion")
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print what SHELL must read to complete commands, options, choices and files.

    In ~/.bashrc; in ~/.zshrc, after compinit; once, for fish:

    \b
    eval "$(ptq completion bash)"
    eval "$(ptq completion zsh)"
    ptq completion fish > ~/.config/fish/completions/ptq.fish
    """
    click.echo(script(shell))
