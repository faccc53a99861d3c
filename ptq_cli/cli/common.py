"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ptq_cli.calibration.source import StatisticsSource
from ptq_cli.cli import console
from ptq_cli.cli.next_steps import Step, after, as_line
from ptq_cli.core.layer import Layer
from ptq_cli.core.report import RunReport
from ptq_cli.errors import GateMissed, InputError
from ptq_cli.report.junit import as_junit
from ptq_cli.report.report import Gate, as_csv, as_document, check_gates, gates_of
from ptq_cli.storage.files import write_whole

C = TypeVar("C", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def model_argument(name: str = "model") -> Callable[[C], C]:
    return click.argument(name, type=PATH)


def source_options(command: C) -> C:
    """Where statistics come from."""
    for option in (
        click.option("--bf16", is_flag=True, help="uint16 activations are bfloat16."),
        click.option(
            "--activations",
            type=PATH,
            multiple=True,
            metavar="PATH",
            help="Folder of <module>.npy, or such a file; may be repeated.",
        ),
        click.option(
            "--calibration",
            type=PATH,
            metavar="FILE",
            help="Statistics from ptq calibrate.  [default: <model>.calibration.safetensors"
            " beside MODEL, else activations/ there]",
        ),
    ):
        command = option(command)
    return command


def quiet_option(command: C) -> C:
    """No progress."""
    text = "No progress on stderr; warnings and errors still are."
    return click.option("-q", "--quiet", is_flag=True, help=text)(command)


def resource_options(command: C) -> C:
    """What a run may use, and whether it tells of it."""
    for option in (
        quiet_option,
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="Let the workers of a Dask cluster do the work (needs ptq[distributed]).",
        ),
        click.option(
            "--max-memory",
            metavar="SIZE",
            help="Memory for the units in flight, like 2GiB.  [default: three quarters of what is"
            " available]",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1, 4096),
            metavar="N",
            help="Processes at work.  [default: the cores there are]",
        ),
    ):
        command = option(command)
    return command


def report_options(command: C) -> C:
    """What is printed and written of the report."""
    for option in (
        click.option("--strict", is_flag=True, help="Treat warnings as errors."),
        click.option(
            "--top",
            default=20,
            show_default=True,
            metavar="N",
            help="Layers in the table, worst first; 0 shows all.",
        ),
        click.option(
            "--report",
            "report_path",
            type=PATH,
            metavar="FILE",
            help="Write the report also to FILE, .csv or .json.",
        ),
        click.option(
            "--junit",
            type=PATH,
            metavar="FILE",
            help="Write layers and gates to FILE as JUnit XML, for CI.",
        ),
        click.option(
            "--html",
            type=PATH,
            metavar="FILE",
            help="Write the report also as a page with charts (needs ptq[report]).",
        ),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        command = option(command)
    return command


GATES = ("max_rel_err", "min_gain", "max_fallbacks", "max_perplexity_increase", "max_kl")


def gate_options(command: C) -> C:
    """Quality gates: exit code 3 where one is missed."""
    for option in (
        click.option(
            "--max-fallbacks",
            type=click.IntRange(0),
            metavar="N",
            help="Fail where more than N layers fell back to plain rounding (eval: equal it).",
        ),
        click.option(
            "--min-gain",
            type=float,
            metavar="X",
            help="Fail where mean RTN error / mean error is below X.",
        ),
        click.option(
            "--max-rel-err",
            type=float,
            metavar="X",
            help="Fail where a layer's relative error is above X.",
        ),
    ):
        command = option(command)
    return command


def emit_warnings(warnings: tuple[str, ...] | list[str], strict: bool) -> None:
    """Print warnings; with --strict the first one is an error instead.

    Raises:
        InputError: --strict, and there is a warning.
    """
    if warnings and strict:
        raise InputError(f"{warnings[0]} (--strict)")
    for warning in warnings:
        console.warn(warning)


def finished_already(output: object) -> None:
    """Say that an earlier run of the same kind has made the output."""
    console.say("note", f"{output}: finished already, from the same inputs and settings")


def check_report_paths(options: Mapping[str, Any]) -> None:
    """Find out before the work whether the reports that were asked for could be written."""
    check_path(options["report_path"], (".csv", ".json"), "a report")
    check_path(options["junit"], (".xml",), "a JUnit report")
    if options["html"] is not None:
        from ptq_cli.report.html.svg import require_matplotlib

        check_path(options["html"], (".html", ".htm"), "a page")
        require_matplotlib("--html")


def check_path(path: Path | None, suffixes: tuple[str, ...], what: str) -> None:
    """Raises InputError where no file of this kind can be written there."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise InputError(f"{path}: {what} is {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise InputError(f"{path}: a folder", hint=f"name a file for {what}")


def finish(
    report: RunReport,
    options: Mapping[str, Any],
    output: str,
    *,
    written: bool,
    layers: Sequence[Layer] = (),
    source: StatisticsSource | None = None,
) -> None:
    """Write and print the report, hold it against the gates, and say what to do next.

    output: what was written, or else what was measured
    layers: that a runtime could load from there
    source: the statistics of its inputs, for the page

    Raises:
        GateMissed: after everything was written.
    """
    limits = {name: options[name] for name in GATES if options.get(name) is not None}
    gates = gates_of(report, **limits)
    if options["junit"] is not None:
        write_whole(options["junit"], as_junit(report, gates, output))
    try:
        if options["html"] is not None:
            _write_page(report, options["html"], Path(output), source, gates)
    finally:
        shown = output if written else None
        emit_report(report, options["report_path"], options["as_json"], options["top"], shown)
    try:
        check_gates(report, **limits)
    except GateMissed as error:
        error.hint = f"{output} was written all the same" if written else None
        raise
    if not options["as_json"]:
        show_next(after(report, click.get_current_context().params, output, layers))


def show_next(steps: Iterable[Step]) -> None:
    for what, words in steps:
        console.line(f"{what}: {as_line(words)}")


def _write_page(
    report: RunReport,
    path: Path,
    output: Path,
    source: StatisticsSource | None,
    gates: Sequence[Gate],
) -> None:
    from ptq_cli.report.html.build import write_page
    from ptq_cli.report.html.subject import subject_of

    document = as_document(report, times=False)
    subject = subject_of(document, output.resolve().name, output, source, gates)
    write_page(path, [subject])


def emit_report(
    report: RunReport, path: Path | None, as_json: bool, top: int, output: str | None = None
) -> None:
    """Write and print the report."""
    from ptq_cli.storage.files import to_json

    document = as_document(report, times=True)
    if output is not None:
        document["output"] = output
    if path is not None:
        write_whole(path, as_csv(report) if path.suffix == ".csv" else to_json(document))
    if as_json:
        console.print_json(document)
    else:
        console.show_report(report, top=top, output=output)
