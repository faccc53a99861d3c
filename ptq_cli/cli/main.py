"""The command line: a group whose commands are imported when they are called."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from ptq_cli._version import __version__
from ptq_cli.errors import PtqError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# name -> (module:attribute in this room, line in `ptq --help`)
COMMANDS = {
    "calibrate": ("calibrate:calibrate", "Collect statistics of the inputs in one file."),
    "gptq": ("quantize:gptq", "Quantize with GPTQ, compensating each error."),
    "rtn": ("quantize:rtn", "Round to nearest, with a scale search."),
    "smoothquant": ("quantize:smoothquant", "Smooth inputs into weights; W8A8 or float weights."),
    "awq": ("quantize:awq", "Scale weights by their inputs, then round."),
    "allocate": ("allocate:allocate", "Share out a size among layers; writes a recipe."),
    "pack": ("quantize:pack", "Pack a float model, or repack a quantized one."),
    "dequantize": ("dequantize:dequantize", "Write the float model of a quantized one."),
    "inspect": ("inspect:inspect", "Show tensors, sites and what matters in them."),
    "check": ("check:check", "Say from the files alone whether a runtime loads it."),
    "eval": ("eval:evaluate", "Measure a quantized folder against the original."),
    "report": ("report:report", "Write a page with charts of one or more runs."),
    "diff": ("diff:diff", "Compare two reports; fail where something is worse."),
    "completion": ("completion:completion", "Shell completion for bash, zsh and fish."),
}


class LazyGroup(click.Group):
    """Imports a command only when it is called, so that `ptq --help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(f"ptq_cli.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click does, which would import every command for its line of help."""
        from click.shell_completion import CompletionItem

        named = [
            CompletionItem(name, help=help_)
            for name, (_, help_) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return named + click.Command.shell_complete(self, ctx, incomplete)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    import numpy
    import safetensors
    from threadpoolctl import threadpool_info

    blas = [i for i in threadpool_info() if i.get("user_api") == "blas"]
    kernel = ", ".join(
        f"{i.get('internal_api')} {i.get('version')} {i.get('architecture', '')}".strip()
        for i in blas
    )
    click.echo(
        f"ptq {__version__} (Python {sys.version.split()[0]}, numpy {numpy.__version__},"
        f" safetensors {safetensors.__version__}; BLAS: {kernel or 'unknown'})"
    )
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Exit codes: 0 done, 1 bad input or I/O, 2 wrong usage, 3 a quality gate was missed,"
    " 4 numerical failure, 130 interrupted, 143 terminated.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show versions and the BLAS kernel, and exit.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Post-training quantization: int2 to int8 checkpoints from float ones.

    \b
    ptq gptq model.safetensors --bits 4 --group-size 128
    ptq eval model.safetensors model-gptq-w4g128 --min-gain 1.5
    """
    ctx.obj = {"debug": debug}


def run(arguments: list[str]) -> int:
    """Run the command line and give back the exit code."""
    debug = "--debug" in arguments
    try:
        result: Any = cli.main(arguments, prog_name="ptq", standalone_mode=False)
        sys.stdout.flush()
        _quiet_streams()  # a full or closed stderr is no error
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort as error:
        if isinstance(error.__cause__ or error.__context__, EOFError):
            return _explain("internal error: EOFError (rerun with ptq --debug)", 1, debug)
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        _quiet_streams()  # the reader left (`| head`); what had to be done was done before
        return 0
    except PtqError as error:
        return _explain(error.message, error.exit_code, debug, hint=error.hint)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _explain(f"{where}{error.strerror or error}", 1, debug)
    except MemoryError:
        return _explain("out of memory", 1, debug)
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        text = f"internal error: {type(error).__name__}: {words} (rerun with ptq --debug)"
        return _explain(text, 1, debug)


def _explain(text: str, code: int, debug: bool, *, hint: str | None = None) -> int:
    from ptq_cli.cli.console import say

    if debug:
        traceback.print_exc()
    notes = getattr(sys.exception(), "__notes__", ())  # of finished work that is kept
    say("error", "; ".join([text, *notes]))
    if hint is not None:
        say("hint", hint)
    _quiet_streams()
    return code


def _quiet_streams() -> None:
    """Keep Python's exit from complaining about streams that cannot be flushed."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
