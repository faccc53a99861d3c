"""`ptq smoothquant` and `ptq awq`: one command a smoother, options from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.cli.common import model_argument, source_options
from ptq_cli.cli.options import add_options
from ptq_cli.cli.quantizing import quantizing_options, run_command, take_recipe, take_sources
from ptq_cli.cli.tokens import token_options
from ptq_cli.commands.smooth import prepare_smoothing, smooth_settings
from ptq_cli.plan.grid_settings import FLOAT_BITS
from ptq_cli.registry import smoother

_HELP = {
    "smoothquant": """Smooth MODEL's inputs into its weights, and quantize both.

    Outlying channels of a site's inputs are divided by factors that the weights take over, folded
    into the norm or linear that feeds the site: the float model computes what it did, which is
    checked. Written are int8 weights per channel (W8A8), or with --bits 16 the smoothed float
    weights. A site where rounding is no better for it is left as it was.

    With --tokens the model itself is run, and each site is smoothed and rounded on what the
    quantized layers before it produce, their inputs rounded as at run time.

    \b
    ptq smoothquant model/ --alpha auto
    ptq smoothquant model/ --tokens tokens.npy
    ptq smoothquant model/ --bits 16 -o smoothed
    ptq smoothquant model/ --activation-scheme static --then gptq
    """,
    "awq": """Scale MODEL's weights where their inputs are loud, and quantize them.

    For every layer rtn, awq, gptq and awq+gptq are compared on held-out inputs (the report's
    `compared` and `best`). What is written is awq, or with --then gptq awq+gptq; where a layer of
    a site would come out worse than plain rounding, the site is not scaled. With --tokens the
    model itself is run, and each site is scaled and rounded on what the quantized layers before it
    produce.

    \b
    ptq awq model/ --bits 4 --group-size 128
    ptq awq model/ --bits 3 --asym --tokens tokens.npy
    ptq awq model/ --bits 3 --then gptq
    """,
}


_FLOATS = "smoothquant"  # whose weights may stay floats


def _command(name: str) -> click.Command:
    def run(model: Path, **options: Any) -> None:
        _run(name, model, options)

    command: Any = quantizing_options(name, "w<bits><group>")(run)
    command = source_options(token_options(command, parallel_layers=True))
    command = add_options(*smooth_settings(name), defaults=smoother(name).defaults)(command)
    made: click.Command = click.command(name, help=_HELP[name])(model_argument()(command))
    for option in made.params:
        if name == _FLOATS and option.name == "bits":
            option.type = click.IntRange(2, FLOAT_BITS)
    return made


def _run(name: str, model: Path, options: dict[str, Any]) -> None:
    recipe = take_recipe(name, options, smooth_settings(name), floats=name == _FLOATS)
    source = take_sources(options)
    where = {key: options.pop(key) for key in ("output", "runtime")}
    run_command(
        name, lambda: prepare_smoothing(name, model, options, recipe, source, **where), options
    )


smoothquant = _command("smoothquant")
awq = _command("awq")
