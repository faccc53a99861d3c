"""Parameters that several commands share, in the order in which their help lists them."""

from __future__ import annotations

from pathlib import Path

import click

from ptq_cli.cli.sections import option
from ptq_cli.storage.tokens import SEQ_LEN

PATH = click.Path(path_type=Path)


def path_argument(name: str) -> click.Argument:
    return click.Argument([name], type=PATH)


# The fields of `TokenSettings`, by the same names.
TOKENS = (
    option(
        "Calibration",
        "--tokens",
        type=PATH,
        metavar="FILE",
        help="Run the model on these token ids: a .npy of integers [n, length].",
    ),
    option(
        "Calibration",
        "--text",
        type=PATH,
        metavar="FILE",
        help="The same with a text and the model's tokenizer.json (needs ptq[text]).",
    ),
    option(
        "Calibration",
        "--seq-len",
        type=click.IntRange(2),
        metavar="N",
        help="Cut text, or tokens in one dimension, into sequences of N."
        f"  [default: {SEQ_LEN} for --text]",
    ),
    option(
        "Calibration",
        "--nsamples",
        type=click.IntRange(1),
        metavar="N",
        help="Take N of the sequences, drawn at random.  [default: all]",
    ),
    option(
        "Calibration",
        "--seed",
        type=click.IntRange(0),
        metavar="N",
        help="Seed of the random draw.  [default: 0]",
    ),
    option(
        "Calibration",
        "--mask",
        type=PATH,
        metavar="FILE",
        help="A .npy of the tokens' shape, 0 where there is padding.",
    ),
)

BF16 = option("Calibration", "--bf16", is_flag=True, help="uint16 activations are bfloat16.")
# Where statistics come from: the fields of `SourceSettings`, by the same names.
SOURCES = (
    option(
        "Calibration",
        "--calibration",
        type=PATH,
        metavar="FILE",
        help="Statistics from ptq calibrate.  [default: <model>.calibration.safetensors"
        " beside MODEL, else activations/ there]",
    ),
    option(
        "Calibration",
        "--activations",
        type=PATH,
        multiple=True,
        metavar="PATH",
        help="Folder of <module>.npy, or such a file; may be repeated.",
    ),
    BF16,
)

REPLACING = (
    option("Output", "--force", is_flag=True, help="Replace an existing output."),
    option("Output", "--restart", is_flag=True, help="Drop an interrupted run's work."),
)

DRY_RUN = option(
    "Run",
    "--dry-run",
    is_flag=True,
    help="Say what would be done and what it would take, and write nothing.",
)
STRICT = option("Run", "--strict", is_flag=True, help="Treat warnings as errors.")
QUIET = option(
    "Run",
    "-q",
    "--quiet",
    is_flag=True,
    help="No progress on stderr; warnings and errors stay.",
)
# What a run may use: the arguments of `take_resources`.
RESOURCES = (
    option(
        "Run",
        "--workers",
        type=click.IntRange(1, 4096),
        metavar="N",
        help="Worker processes.  [default: one for each core]",
    ),
    option(
        "Run",
        "--max-memory",
        metavar="SIZE",
        help="Memory for the units in flight, like 2GiB.  [default: three quarters of what is"
        " available]",
    ),
    option(
        "Run",
        "--scheduler",
        metavar="ADDRESS",
        help="Let the workers of a Dask cluster do the work (needs ptq[distributed]).",
    ),
)

JSON = option("Report", "--json", "as_json", is_flag=True, help="One JSON document on stdout.")
REPORT = (
    option(
        "Report",
        "--top",
        default=20,
        show_default=True,
        metavar="N",
        help="Layers in the table, worst first; 0 shows all.",
    ),
    JSON,
    option(
        "Report",
        "--report",
        "report_path",
        type=PATH,
        metavar="FILE",
        help="Write the report also to FILE, .csv or .json.",
    ),
    option(
        "Report",
        "--html",
        type=PATH,
        metavar="FILE",
        help="Write the report also as a page with charts (needs ptq[report]).",
    ),
    option(
        "Report",
        "--junit",
        type=PATH,
        metavar="FILE",
        help="Write layers and gates to FILE as JUnit XML, for CI.",
    ),
)

# Exit code 3 where one is missed.
GATE_OPTIONS = (
    option(
        "Gates",
        "--max-rel-err",
        type=float,
        metavar="X",
        help="Fail where a layer's relative error is above X.",
    ),
    option(
        "Gates",
        "--min-gain",
        type=float,
        metavar="X",
        help="Fail where mean RTN error / mean error is below X.",
    ),
    option(
        "Gates",
        "--max-fallbacks",
        type=click.IntRange(0),
        metavar="N",
        help="Fail where more than N layers fell back to plain rounding (eval: have its codes).",
    ),
)
GATES_OF_PREDICTIONS = (
    option(
        "Gates",
        "--max-perplexity-increase",
        type=float,
        metavar="X",
        help="Fail where the perplexity on --tokens rises by more than X.",
    ),
    option(
        "Gates",
        "--max-kl",
        type=float,
        metavar="X",
        help="Fail where the mean KL divergence on --tokens is above X nats.",
    ),
)
