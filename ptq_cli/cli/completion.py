"""`ptq completion`: what a shell must read; click itself completes (`_PTQ_COMPLETE`)."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what SHELL must read to complete commands, options, choices and files.

    In ~/.bashrc; in ~/.zshrc, after compinit; once, for fish:

    \b
    eval "$(ptq completion bash)"
    eval "$(ptq completion zsh)"
    ptq completion fish > ~/.config/fish/completions/ptq.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "ptq", "_PTQ_COMPLETE").source())
