"""The page: one HTML file that needs nothing else.

No network: fonts are the system's, charts are inline SVG, and a content security policy forbids the
rest, scripts but the page's own included, should a name in a report ever get past the escaping. The
same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from ptq_cli.report.html.script import SCRIPT
from ptq_cli.report.html.several import several_runs
from ptq_cli.report.html.single import one_run
from ptq_cli.report.html.style import STYLE
from ptq_cli.report.html.subject import Subject
from ptq_cli.report.html.text import escaped
from ptq_cli.storage.files import write_whole


def page(subjects: Sequence[Subject]) -> str:
    """The page of one run, or of several side by side. Raises nothing that a report can cause."""
    if len(subjects) == 1:
        return _document(subjects[0].label, one_run(subjects[0]))
    return _document(", ".join(s.label for s in subjects), several_runs(subjects))


def _document(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="ptq">\n'
        f'<link rel="icon" href="data:,">\n<title>{escaped(title)} - ptq report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(path: Path, subjects: Sequence[Subject]) -> None:
    """Draw and write it, whole or not at all. Raises FileError."""
    write_whole(path, page(subjects))
