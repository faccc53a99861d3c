"""What several commands do: warn, report, hold the report against the gates, say what is next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.source import Source
from ptq_cli.cli import console
from ptq_cli.cli.next_steps import Step, after, as_line
from ptq_cli.cli.shared_options import gates_set
from ptq_cli.core.layer import Layer
from ptq_cli.core.report import RunReport
from ptq_cli.errors import GateMissed, InputError, import_extra
from ptq_cli.report.gates import check_gates, gates_of
from ptq_cli.report.report import as_csv, as_document
from ptq_cli.storage.files import to_json, write_whole


def emit_warnings(warnings: Sequence[str], strict: bool, untried: Sequence[str] = ()) -> None:
    """Print warnings; with --strict the first one is an error instead, but for those of `untried`.

    Raises:
        InputError: --strict, and there is a warning.
    """
    wrong = [warning for warning in warnings if warning not in untried]
    if wrong and strict:
        raise InputError(f"{wrong[0]} (--strict)")
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
        check_path(options["html"], (".html", ".htm"), "a page")
        import_extra("matplotlib", "--html", "report")


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
    source: Source | None = None,
) -> None:
    """Write and print the report, hold it against the gates, and say what to do next.

    output: what was written, or else what was measured
    layers: that a runtime could load from there
    source: the statistics of its inputs, for the page

    Raises:
        GateMissed: after everything was written.
    """
    gates = gates_of(report, options["allow_weak_calibration"], **gates_set(options))
    fresh = written and not report.earlier
    document = as_document(report, times=True) | ({"output": output} if written else {})
    if options["junit"] is not None:
        from ptq_cli.report.junit import as_junit

        write_whole(options["junit"], as_junit(report, gates, output))
    if (path := options["report_path"]) is not None:
        write_whole(path, as_csv(report) if path.suffix == ".csv" else to_json(document))
    try:
        if options["html"] is not None:
            from ptq_cli.report.html.build import page
            from ptq_cli.report.html.subject import subject_of

            place, plain = Path(output), as_document(report, times=False)
            subject = subject_of(plain, place.resolve().name, place, source, gates)
            write_whole(options["html"], page([subject]))
    finally:
        if options["as_json"]:
            console.print_json(document)
        else:
            console.show_report(report, top=options["top"], output=output if fresh else None)
    try:
        check_gates(gates)
    except GateMissed as error:
        written_too = f"{output} was written all the same" if fresh else None
        error.hint = "; ".join(filter(None, (error.hint, written_too))) or None
        raise
    if not options["as_json"]:
        show_next(after(report, click.get_current_context().params, output, layers))


def show_next(steps: Iterable[Step]) -> None:
    for what, words in steps:
        console.line(f"{what}: {as_line(words)}")
