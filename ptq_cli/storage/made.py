"""What a finished output says of the run that made it, and whether it is as that run left it.

An output folder says it in a file of its own. A GGUF file that is an output by itself says it in
its key `ptq`, and has its report beside it: NAME.report.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ptq_cli.errors import PtqError
from ptq_cli.storage.checkpoint import read_header
from ptq_cli.storage.files import named, read_json, to_json
from ptq_cli.storage.gguf_file import read_gguf_header

JOB = "ptq_job.json"  # in an output folder: the run that made it
REPORT = "report.json"
_GGUF = ".gguf"
_MOST_BYTES = 10**9  # of a report


def report_beside(output: Path) -> Path:
    """Where the report of an output lies that is a file."""
    return output.with_name(f"{output.name.removesuffix(_GGUF)}.{REPORT}")


def said_in_file(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
    """What a file says of the run that made it, which has this report."""
    text = to_json(report).encode()
    known = {"files": {REPORT: len(text)}, "sha256": {REPORT: hashlib.sha256(text).hexdigest()}}
    return {"job": {**job, **known}}


def most_said(job: Mapping[str, Any]) -> dict[str, Any]:
    """The same at its longest, before there is a report."""
    known = {"files": {REPORT: _MOST_BYTES}, "sha256": {REPORT: "0" * 64}}
    return {"job": {**job, **known}}


def job_of(output: Path) -> Mapping[str, Any] | None:
    """The run that made a finished output, as it says itself: JOB in a folder, `job` in the
    metadata of a statistics file or a GGUF file. None where it says nothing."""
    try:
        if output.is_dir():
            job = read_json(output / JOB)
        elif output.suffix == _GGUF:
            job = json.loads(read_gguf_header(output).metadata["ptq"])["job"]
        else:
            job = json.loads(read_header(output).metadata["ptq"])["job"]
    except (PtqError, LookupError, TypeError, ValueError, RecursionError):
        return None
    return job if isinstance(job, dict) else None


def files_of(folder: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """By which the files of an output (all, or those of these names) are known again: `files`, the
    bytes of each, and `sha256`, of each that is JSON."""
    sizes, sums = {}, {}
    with named(folder):
        paths = sorted(Path(top, name) for top, _, files in os.walk(folder) for name in files)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != JOB and (names is None or name in names):
            with named(path), open(path, "rb") as file:
                sizes[name] = os.fstat(file.fileno()).st_size
                if path.suffix == ".json":
                    sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"files": sizes, "sha256": sums}


def damage_of(folder: Path, made: Mapping[str, Any]) -> str:
    """The first file that is not as the run left it that says so in JOB; "" where all are. Of an
    output that is a file, its report may not be (the header has told that the file is whole)."""
    if not folder.is_dir():
        return _damage_beside(report_beside(folder), made)
    files, sums = made.get("files"), made.get("sha256")
    if not isinstance(files, dict) or not isinstance(sums, dict):
        return f"{JOB} is damaged"
    there = files_of(folder, files)
    for name, size in files.items():
        if name not in there["files"]:
            return f"{name} is missing"
        found = there["files"][name]
        if found != size:
            return f"{name} is not as the run left it ({found} bytes, {size} expected)"
        if sums.get(name) != there["sha256"].get(name):
            return f"{name} is not as the run left it"
    return ""


def _damage_beside(report: Path, made: Mapping[str, Any]) -> str:
    """What is wrong with the report beside a file that says of which run it is."""
    if "sha256" not in made:
        return ""  # a statistics file has none
    if not report.is_file():
        return f"{report.name} is missing"
    with named(report):
        found = hashlib.sha256(report.read_bytes()).hexdigest()
    return "" if made["sha256"] == {REPORT: found} else f"{report.name} is not as the run left it"


def why_unknown(output: Path) -> str:
    """Why an output does not say which run made it."""
    if output.is_dir():
        return f"{JOB} is {'damaged' if (output / JOB).exists() else 'missing'}"
    try:
        if output.suffix == _GGUF:
            read_gguf_header(output)
        else:
            read_header(output)
    except PtqError as error:
        return str(error.message).removeprefix(f"{output}: ")
    return "it does not say which run made it"
