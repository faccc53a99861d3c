"""Options of the commands that run a model on tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ptq_cli.storage.tokens import SEQ_LEN

C = TypeVar("C", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


def token_options(command: C, *, parallel_layers: bool = False) -> C:
    """Which tokens: the fields of `TokenSettings`, by the same names.

    parallel_layers: whether the command may quantize in sequence
    """
    if parallel_layers:
        command = click.option(
            "--parallel-layers",
            is_flag=True,
            help="With --tokens: calibrate every layer on the float model, not on what the rounded"
            " layers before it produce; faster.",
        )(command)
    for option in (
        click.option(
            "--mask",
            type=_PATH,
            metavar="FILE",
            help="A .npy of the tokens' shape, 0 where there is padding.",
        ),
        click.option(
            "--seed", type=click.IntRange(0), metavar="N", help="Of --nsamples.  [default: 0]"
        ),
        click.option(
            "--nsamples",
            type=click.IntRange(1),
            metavar="N",
            help="Take N of the sequences, drawn at random.  [default: all]",
        ),
        click.option(
            "--seq-len",
            type=click.IntRange(2),
            metavar="N",
            help="Cut text, or tokens in one dimension, into sequences of N."
            f"  [default: {SEQ_LEN} for --text]",
        ),
        click.option(
            "--text",
            type=_PATH,
            metavar="FILE",
            help="The same with a text and the model's tokenizer.json (extra: text).",
        ),
        click.option(
            "--tokens",
            type=_PATH,
            metavar="FILE",
            help="Run the model on these token ids: a .npy of integers [n, length].",
        ),
    ):
        command = option(command)
    return command
