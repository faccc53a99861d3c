"""`ptq gptq`, `ptq rtn`, `ptq pack`: one command a method, options from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.cli.common import model_argument, source_options
from ptq_cli.cli.options import add_options
from ptq_cli.cli.quantizing import quantizing_options, run_command, take_recipe, take_sources
from ptq_cli.cli.tokens import token_options
from ptq_cli.commands.quantize import prepare
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.registry import method

_HELP = {
    "gptq": """Quantize MODEL with GPTQ and report its error, layer by layer.

    MODEL is a .safetensors file, a *.safetensors.index.json, or a model folder. With --tokens the
    model itself is run, and each layer is calibrated on what the rounded layers before it produce;
    else statistics of the inputs come from ptq calibrate, or from activations. For each layer the
    better of GPTQ and round-to-nearest on held-out inputs is written.

    \b
    ptq gptq model.safetensors --bits 4 --group-size 128
    ptq gptq model/ --bits 3 --asym --tokens tokens.npy
    ptq gptq model/ --bits 3 --asym --calibration stats.safetensors -o out
    """,
    "rtn": """Round MODEL to nearest, each group's range searched for the least error.

    Statistics of the inputs, where there are any, weigh the search and measure the error.
    """,
    "pack": """Round the float MODEL to nearest and pack it, without calibration; or repack a
    quantized MODEL in another --format, without loss or not at all.

    \b
    ptq pack model.safetensors --bits 8 --group-size -1
    ptq pack model-gptq-w4g128/ --format gguf
    """,
}


_DEFAULTS = {"pack": {"mse": False}}  # where a command's own differ


def _command(name: str) -> click.Command:
    own = method("rtn" if name == "pack" else name).settings

    def run(model: Path, **options: Any) -> None:
        _run(name, own, model, options)

    command: Any = quantizing_options(name, "w<bits>g<group>[-<format>]")(run)
    if name != "pack":
        command = click.option(
            "--require-calibration", is_flag=True, help="Fail where there is no calibration."
        )(command)
        command = source_options(token_options(command, parallel_layers=True))
    if name == "gptq":
        command = click.option(
            "--fallback",
            type=click.Choice(["error", "rtn"]),
            default="error",
            help="What a layer gets that has no statistics, or whose Hessian cannot be"
            " factored.  [default: error]",
        )(command)
    command = add_options(GridSettings, own, defaults=_DEFAULTS.get(name, {}))(command)
    command = model_argument()(command)
    return click.command(name, help=_HELP[name])(command)


def _run(name: str, own: type[Any], model: Path, options: dict[str, Any]) -> None:
    recipe = {**_DEFAULTS.get(name, {}), **take_recipe(name, options, (GridSettings, own))}
    words = ("fallback", "runtime", "require_calibration")
    where = {key: options.pop(key) for key in words if key in options}
    source = take_sources(options)
    run_command(
        name,
        lambda: prepare(name, model, options, recipe, source, output=options["output"], **where),
        options,
    )


gptq = _command("gptq")
rtn = _command("rtn")
pack = _command("pack")
