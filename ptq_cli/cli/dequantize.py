"""`ptq dequantize`: a quantized model in, the float model folder out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ptq_cli.cli import console
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.common import emit_warnings, finished_already
from ptq_cli.cli.dry_run import emit_estimate
from ptq_cli.cli.options import Command, in_section, option
from ptq_cli.cli.progress import Follow
from ptq_cli.commands.dequantize import prepare_dequantization
from ptq_cli.commands.job import take_run_options
from ptq_cli.core.text import size
from ptq_cli.formats.common import SCALE_WORDS

_PARAMETERS = (
    shared.path_argument("model"),
    *in_section(
        "Output",
        option(
            "-o",
            "--output",
            type=shared.DIR,
            help="[default: <model>-float in the current folder]",
        ),
        option(
            "--dtype",
            type=click.Choice(sorted(SCALE_WORDS)),
            help="Of the tensors that are decoded; the others stay as they are."
            "  [default: the model's]",
        ),
    ),
    shared.MAX_SHARD_SIZE,
    *shared.REPLACING,
    *shared.RUN,
    shared.JSON,
)


@click.command("dequantize", cls=Command, params=list(_PARAMETERS))
def dequantize(model: Path, **options: Any) -> None:
    """Write the float model that a quantized MODEL stands for.

    MODEL is FP8, NVFP4, MXFP4, GPTQ, AWQ, compressed-tensors, MLX, GGUF, bitsandbytes, or an output
    of this tool. The folder has the model's config.json without its quantization, tokenizer and
    whatever else lies beside the weights; tensors that were not quantized are copied as they are.

    \b
    ptq dequantize model-fp8/ -o model-bf16 --dtype bfloat16
    ptq dequantize model.gguf -o model
    """
    job = prepare_dequantization(model, dtype=options["dtype"], output=options["output"])
    strict, how = options["strict"], take_run_options(options)
    emit_warnings(job.warnings, strict)
    if options["dry_run"]:
        emit_estimate(job.estimate(how), options["as_json"], job.warnings, strict)
        return
    with Follow("dequantize", options["quiet"]) as listen:
        result = job.run(replace(how, listen=listen))
    if earlier := result.pop("earlier"):
        finished_already(result["output"])
    if options["as_json"]:
        console.print_json(result)
    elif not earlier:
        console.line(
            f"{result['decoded']} of {result['tensors']} tensors decoded"
            f" ({result['quantized_as'] or 'float'}), {size(result['bytes'])};"
            f" written: {result['output']}"
        )
