"""The report of an output that is finished already."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.core.report import RunReport
from ptq_cli.report.report import report_from_document
from ptq_cli.storage.reports import read_report
from ptq_cli.storage.target import Target


def report_of_earlier(target: Target) -> RunReport | None:
    """The report of the run that made the output, from the same inputs and settings; None where
    there is work to do. Raises InputError where its report.json is damaged."""
    if not target.finished():
        return None
    document, _ = read_report(target.output)
    return replace(report_from_document(document), earlier=True)
