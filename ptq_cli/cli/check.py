"""`ptq check`: was it loaded in our tests, is it known not to load, or did nobody try?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ptq_cli.cli import console
from ptq_cli.cli.shared_options import PATH
from ptq_cli.commands import api
from ptq_cli.errors import GateMissed
from ptq_cli.formats.runtimes import RUNTIMES, UNLOADED, UNTRIED
from ptq_cli.formats.runtimes.artifact import FAILS


@click.command("check")
@click.argument("out", type=PATH)
@click.option("--runtime", required=True, type=click.Choice(list(RUNTIMES)), help="Which one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(out: Path, runtime: str, as_json: bool) -> None:
    """Say from files alone what a runtime makes of OUT: our tests load such models, it is known not
    to load and why, or nobody tried; and within which limits of its kernels.

    Exits 3 where it is known not to load, else 0; every fact has its reason. With --json, `verdict`
    says which, and `loads` is true, false, or null where nobody tried.

    \b
    ptq check model-gptq-w4g128 --runtime transformers
    """
    found = api.check(out, runtime)
    if as_json:
        console.print_json(
            {
                "path": str(out),
                "format": found.format,
                "runtime": runtime,
                "verdict": found.verdict,
                "why": found.why,
                "loads": found.loads,
                "facts": [asdict(fact) for fact in found.facts],
            }
        )
    else:
        for fact in found.facts:
            console.line(f"{fact.level}: {fact}")
        why = f": {found.why}" if found.verdict == UNTRIED else ""
        console.line(f"{out} ({found.format}) in {runtime}: {found.verdict}{why}")
    if found.verdict == UNLOADED:
        first = next(fact for fact in found.facts if fact.level == FAILS)
        raise GateMissed(f"{out}: {runtime} does not load it: {first.said}", hint=first.hint)
