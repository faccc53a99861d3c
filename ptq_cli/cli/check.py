"""`ptq check`: will a runtime load it?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ptq_cli.cli import console
from ptq_cli.cli.shared_options import PATH
from ptq_cli.commands import api
from ptq_cli.errors import GateMissed
from ptq_cli.formats.runtimes import FAILS, RUNTIMES, loads


@click.command("check")
@click.argument("out", type=PATH)
@click.option("--runtime", required=True, type=click.Choice(list(RUNTIMES)), help="Which one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(out: Path, runtime: str, as_json: bool) -> None:
    """Say from files alone whether a runtime loads OUT, and within which limits of its kernels.

    Exits 0 where it loads, 3 where it does not; every fact has its reason.

    \b
    ptq check model-gptq-w4g128 --runtime transformers
    """
    name, found = api.check(out, runtime)
    if as_json:
        console.print_json(
            {
                "path": str(out),
                "format": name,
                "runtime": runtime,
                "loads": loads(found),
                "facts": [asdict(fact) for fact in found],
            }
        )
    else:
        for fact in found:
            console.line(f"{fact.level}: {fact}")
        console.line(f"{out}: {runtime} {'loads' if loads(found) else 'does not load'} it ({name})")
    if not loads(found):
        first = next(fact for fact in found if fact.level == FAILS)
        raise GateMissed(f"{out}: {runtime} does not load it: {first.said}", hint=first.hint)
