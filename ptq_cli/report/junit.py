"""The error report as JUnit XML, which build servers show as tests.

One testsuite; a testcase for each layer (each site where no layer was rounded) and for each gate
that was set. A missed gate is a failure, and so is every layer above `--max-rel-err`. Numbers stand
in `system-out`, one `name value` a line. Only the times differ from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ptq_cli.core.report import LayerReport, RunReport
from ptq_cli.core.text import printable
from ptq_cli.report.gates import Gate
from ptq_cli.report.report import row_error

MAX_REL_ERR = "--max-rel-err"
_NUMBERS = (
    *(
        "bits",
        "type",
        "group_size",
        "rel_err",
        "heldout_rel_err",
        "rtn_rel_err",
        "rtn_heldout_rel_err",
    ),
    *("weight_rel_err", "gain_vs_rtn", "sqnr_db", "max_abs_err", "tokens", "bits_per_weight"),
)
_SITE_NUMBERS = ("strength", "error", "plain_error", "function_change")
_TOTALS = ("bits_per_weight", "mean_rel_err", "worst_rel_err", "rtn_mean_rel_err", "gain_vs_rtn")


def as_junit(report: RunReport, gates: Sequence[Gate], name: str) -> str:
    """The XML document. name: what was written or measured"""
    suite = Element("testsuite", name=printable(f"ptq {report.command} {name}"))
    properties = SubElement(suite, "properties")
    for key, value in _properties(report):
        SubElement(properties, "property", name=key, value=printable(str(value)))
    place = f"ptq.{report.command}"
    limit = next((gate.limit for gate in gates if gate.option == MAX_REL_ERR), None)
    for row in report.rows:
        _layer(suite, f"{place}.layers", row, limit)
    for site in () if report.rows else report.sites:
        case = _case(suite, f"{place}.sites", site["site"], 0.0)
        _say(case, [(key, site[key]) for key in _SITE_NUMBERS], site["notes"])
    for gate in gates:
        case = _case(suite, f"{place}.gates", gate.name, 0.0)
        if not gate.passed:
            _fail(case, gate.option, f"{gate.name}: {gate.said}")
        _say(case, [("limit", gate.limit), ("measured", gate.value)])
    counts = {
        "tests": str(len(suite.findall("testcase"))),
        "failures": str(len(suite.findall("testcase/failure"))),
        "errors": "0",
        "time": f"{report.totals['seconds']:.3f}",
    }
    suite.attrib.update({**counts, "skipped": "0"})
    root = Element("testsuites", counts)
    root.append(suite)
    indent(root)
    document: bytes = tostring(root, "utf-8", xml_declaration=True)
    return document.decode() + "\n"


def _properties(report: RunReport) -> Iterator[tuple[str, Any]]:
    """What was asked for, and the totals."""
    for key in ("method", "format", "bits", "group_size", "sym"):
        if key in report.settings:
            yield key, report.settings[key]
    for key in _TOTALS:
        if report.totals[key] is not None:
            yield key, _number(report.totals[key])


def _layer(suite: Element, place: str, row: LayerReport, limit: float | None) -> None:
    case = _case(suite, place, row.module, row.seconds)
    error = row_error(row)
    if limit is not None and not error <= limit:
        _fail(case, MAX_REL_ERR, f"relative error {error:.4g} is above {MAX_REL_ERR} {limit:g}")
    words = [*row.notes, *([] if row.fallback is None else [f"fallback: {row.fallback}"])]
    numbers = [("method", row.method), *((key, getattr(row, key)) for key in _NUMBERS)]
    _say(case, numbers, words)


def _case(suite: Element, place: str, name: str, seconds: float) -> Element:
    words = {"classname": place, "name": printable(name), "time": f"{seconds:.3f}"}
    return SubElement(suite, "testcase", words)


def _fail(case: Element, kind: str, message: str) -> None:
    failure = SubElement(case, "failure", type=kind.lstrip("-"), message=printable(message))
    failure.text = printable(message)


def _say(case: Element, numbers: Sequence[tuple[str, Any]], words: Sequence[str] = ()) -> None:
    lines = [f"{key} {_number(value)}" for key, value in numbers if value is not None]
    SubElement(case, "system-out").text = "\n".join([*lines, *map(printable, words)])


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
