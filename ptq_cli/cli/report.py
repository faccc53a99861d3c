"""`ptq report`: runs as a page with charts."""

from __future__ import annotations

from pathlib import Path

import click

from ptq_cli.cli import console
from ptq_cli.cli.common import check_path
from ptq_cli.cli.shared_options import FILE, PATH
from ptq_cli.errors import import_extra


@click.command("report")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
@click.option(
    "--calibration",
    type=FILE,
    help="Statistics from ptq calibrate: of one run, show the largest input channels.",
)
def report(runs: tuple[Path, ...], output: Path, calibration: Path | None) -> None:
    """Write a page with charts and tables of one of RUNS, or of several side by side.

    Each is an output folder, its report.json, or a file of --report. The page is one file that
    needs no network. Needs ptq[report].

    \b
    ptq report model-gptq-w4g128
    ptq report w4/ w3/ w3-tokens/ -o compared.html
    """
    if calibration is not None and len(runs) > 1:
        raise click.UsageError("--calibration goes with one run")
    check_path(output, (".html", ".htm"), "a page")
    import_extra("matplotlib", "the page", "report")
    from ptq_cli.calibration.from_file import open_calibration
    from ptq_cli.report.html.build import page
    from ptq_cli.report.html.subject import open_subjects
    from ptq_cli.storage.files import write_whole

    source = None if calibration is None else open_calibration(calibration)
    write_whole(output, page(open_subjects(runs, source)))
    console.line(f"written: {output}")
