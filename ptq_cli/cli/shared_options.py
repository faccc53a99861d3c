"""Parameters that several commands share, in the order in which their help lists them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ptq_cli.cli.options import in_section, option
from ptq_cli.storage.tokens import CALIBRATION_SEQUENCES, SEQ_LEN


def _path(word: str) -> click.Path:
    """A path, called so in help."""
    kind = click.Path(path_type=Path)
    kind.name = word
    return kind


PATH, FILE, DIR = _path("path"), _path("file"), _path("dir")


def path_argument(name: str) -> click.Argument:
    return click.Argument([name], type=PATH)


# The fields of `TokenSettings`, by the same names.
TOKENS = in_section(
    "Calibration",
    option(
        "--tokens",
        type=FILE,
        help="Run the model on these token ids: a .npy of integers [n, length].",
    ),
    option(
        "--text",
        type=FILE,
        help="The same with a text and the model's tokenizer.json (needs ptq[text]).",
    ),
    option(
        "--chat",
        type=FILE,
        help="The same with conversations, JSON lines, and the model's chat template (needs"
        " ptq[text]).",
    ),
    option(
        "--seq-len",
        type=click.IntRange(2),
        metavar="N",
        help="Cut text, or tokens in one dimension, into sequences of N; pack conversations into"
        f" rows of N.  [default: {SEQ_LEN} for --text, --chat]",
    ),
    option(
        "--nsamples",
        type=click.IntRange(1),
        metavar="N",
        help="Take N of the sequences, drawn at random.  [default: all; to calibrate on --text"
        f" or --chat {CALIBRATION_SEQUENCES} at most]",
    ),
    option(
        "--seed",
        type=click.IntRange(0),
        metavar="N",
        help="Seed of the random draw.  [default: 0]",
    ),
    option(
        "--mask",
        type=FILE,
        help="A .npy of the tokens' shape, 0 where there is padding.",
    ),
)

(MIN_EXPERT_TOKENS,) = in_section(
    "Calibration",
    option(
        "--min-expert-tokens",
        type=click.IntRange(0),
        metavar="N",
        help="With --tokens: an expert that fewer than N tokens reach is calibrated on those of all"
        " experts beside it.  [default: an eighth of its columns]",
    ),
)

(BF16,) = in_section(
    "Calibration",
    option("--bf16", is_flag=True, help="uint16 activations are bfloat16."),
)
# Where statistics come from: the fields of `SourceSettings`, by the same names.
SOURCES = in_section(
    "Calibration",
    option(
        "--calibration",
        type=FILE,
        help="Statistics from ptq calibrate.  [default: <model>.calibration.safetensors"
        " beside MODEL, else activations/ there]",
    ),
    option(
        "--activations",
        type=PATH,
        multiple=True,
        help="Folder of <module>.npy, or such a file; may be repeated.",
    ),
    BF16,
)

(IMATRIX,) = in_section(
    "Calibration",
    option(
        "--imatrix",
        type=FILE,
        help="Importance matrix of llama.cpp, as the diagonal of the Hessian.",
    ),
)

REPLACING = in_section(
    "Output",
    option("--force", is_flag=True, help="Replace an existing output."),
    option("--restart", is_flag=True, help="Drop an interrupted run's work."),
)

(MAX_SHARD_SIZE,) = in_section(
    "Output",
    option(
        "--max-shard-size",
        metavar="SIZE",
        help="Weights files hold at most SIZE of tensors, more where one is larger."
        "  [default: 4GB; gguf: one file]",
    ),
)

RUN = in_section(
    "Run",
    option(
        "--dry-run",
        is_flag=True,
        help="Say what would be done and what it would take, and write nothing.",
    ),
    option("--strict", is_flag=True, help="Treat warnings as errors."),
    option(
        "-q",
        "--quiet",
        is_flag=True,
        help="No progress on stderr; warnings and errors stay.",
    ),
)
# What a run may use: the arguments of `take_resources`.
RESOURCES = in_section(
    "Run",
    option(
        "--workers",
        type=click.IntRange(1, 4096),
        metavar="N",
        help="Worker processes.  [default: one for each core]",
    ),
    option(
        "--max-memory",
        metavar="SIZE",
        help="Memory for the units in flight, like 2GiB.  [default: three quarters of what is"
        " available]",
    ),
    option(
        "--scheduler",
        metavar="ADDRESS",
        help="Let the workers of a Dask cluster do the work (needs ptq[distributed]).",
    ),
)

JSON = option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
REPORT = in_section(
    "Report",
    option(
        "--top",
        default=20,
        show_default=True,
        metavar="N",
        help="Layers in the table, worst first; 0 shows all.",
    ),
    JSON,
    option(
        "--report",
        "report_path",
        type=FILE,
        help="Write the report also to FILE, .csv or .json.",
    ),
    option(
        "--html",
        type=FILE,
        help="Write the report also as a page with charts (needs ptq[report]).",
    ),
    option(
        "--junit",
        type=FILE,
        help="Write layers and gates to FILE as JUnit XML, for CI.",
    ),
)

# Exit code 3 where one is missed.
GATE_OPTIONS = in_section(
    "Gates",
    option(
        "--max-rel-err",
        type=float,
        metavar="X",
        help="Fail where a layer's relative error is above X.",
    ),
    option(
        "--min-gain",
        type=float,
        metavar="X",
        help="Fail where mean RTN error / mean error is below X.",
    ),
    option(
        "--max-fallbacks",
        type=click.IntRange(0),
        metavar="N",
        help="Fail where more than N layers fell back to plain rounding (eval: have its codes).",
    ),
)
(ALLOW_WEAK,) = in_section(
    "Gates",
    option(
        "--allow-weak-calibration",
        is_flag=True,
        help="Let gates pass on errors that were measured on what was calibrated on, on very few"
        " inputs, or on the same again and again.",
    ),
)
GATES_OF_PREDICTIONS = in_section(
    "Gates",
    option(
        "--max-perplexity-increase",
        type=float,
        metavar="X",
        help="Fail where the perplexity on --tokens rises by more than X.",
    ),
    option(
        "--max-kl",
        type=float,
        metavar="X",
        help="Fail where the mean KL divergence on --tokens is above X nats.",
    ),
)
GATES = tuple(str(gate.name) for gate in (*GATE_OPTIONS, *GATES_OF_PREDICTIONS))


def refuse_idle_allowance(given: Mapping[str, Any]) -> None:
    """Raises UsageError for --allow-weak-calibration where there is no gate."""
    if given["allow_weak_calibration"] and not gates_set(given):
        raise click.UsageError("--allow-weak-calibration does nothing without a gate")


def gates_set(given: Mapping[str, Any]) -> dict[str, Any]:
    """The gates that were set among the parameters of a command, by name."""
    return {name: given[name] for name in GATES if given.get(name) is not None}
