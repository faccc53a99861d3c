"""The README and docs/, run: every shell block of a page, in order, in one folder.

The folder holds what the pages speak of: `sample_data/`, `configs/`, and under the names of
everybody's model the same again: `model/`, `model.safetensors`, `activations/`, `tokens.npy`,
`heldout.npy`. It is the sample's first two blocks for pages that show no numbers of it and, unlike
the README, have no gates that take a model that predicts. Blocks of `sh` are run; `console` is for
what cannot be run here (an installation, a benchmark, a cluster). A block of `text` right behind is
what is printed, stdout and stderr: "…" stands for anything, on a line of its own for any lines, and
numbers may differ by 5 %, as BLAS rounds differently from machine to machine. Lines of progress,
which a terminal does not keep, are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.plan.recipe import load_recipe
from tests.builders import SAMPLE, copy_sample, half_sample

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
SETUP = "python3 -m venv"  # the README's two commands, which .ci/run runs word for word
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


PROGRESS = re.compile(r"^\[ *\d+/\d+\] .*\n", re.MULTILINE)


def blocks(language: str) -> list[pytest.param]:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (word, text) in enumerate(BLOCK.findall(page.read_text("utf-8")))
        if word == language
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text: str) -> None:
    compile(text, "block", "exec")


@pytest.mark.parametrize("text", blocks("toml"))
def test_recipes_are_recipes(tmp_path: Path, text: str) -> None:
    name = tomllib.loads(text).get("method", "gptq")
    path = tmp_path / "recipe.toml"
    path.write_text(text, "utf-8")
    assert load_recipe(path, name)


def same(shown: str, printed: str) -> bool:
    """Whether a printed line is the one shown."""
    pattern, wanted = "", []
    for part in re.split(rf"({NUMBER.pattern}|…|[─━-]{{3,}}|\s+)", shown.strip()):
        if NUMBER.fullmatch(part):
            wanted.append(float(part))
            pattern += f"({NUMBER.pattern})"
        elif re.fullmatch(r"[─━-]{3,}", part):
            pattern += r"[─━-]{3,}"
        else:
            pattern += ".*?" if part == "…" else r"\s+" if part.isspace() else re.escape(part)
    found = re.fullmatch(pattern, printed.strip())
    return found is not None and all(
        abs(float(own) - number) <= 0.05 * abs(number)
        for own, number in zip(found.groups(), wanted, strict=True)
    )


def compare(shown: str, printed: str) -> None:
    lines, skipping = printed.splitlines(), False
    for line in shown.splitlines():
        if line.strip() == "…":
            skipping = True
            continue
        while skipping and lines and not same(line, lines[0]):
            lines.pop(0)
        assert lines, f"not printed: {line!r} in\n{printed}"
        assert same(line, lines[0]), f"shown {line!r}, printed {lines[0]!r}"
        lines.pop(0)
        skipping = False
    assert skipping or not lines, f"printed besides: {lines}"


def test_comparing() -> None:
    compare("a 1.00 b …\n…\nend", "a  1.04 b 17\nx\ny\n  end\n")
    for printed in ("a 1.06 b 2\nend", "a 1.00 b 2", "a 1.00 c 2\nend", "a 1.00 b 2\nend\nmore"):
        with pytest.raises(AssertionError):
            compare("a 1.00 b …\n…\nend", printed)


def furnish(folder: Path, whole: bool) -> None:
    """Put there what the pages speak of; see above."""
    data = (copy_sample if whole else half_sample)(folder / "sample_data")
    shutil.copytree(data, folder / "model", ignore=shutil.ignore_patterns("activations"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(data / "activations", folder / "activations")
    shutil.copy(data / "model.safetensors", folder)
    few = 16 if whole else 8
    np.save(folder / "tokens.npy", np.load(SAMPLE / "calibration_tokens.npy")[:few])
    np.save(folder / "heldout.npy", np.load(SAMPLE / "eval_tokens.npy")[: few // 2])
    (folder / "bin").mkdir()
    for name, words in (("ptq", "-m ptq_cli "), ("python", "")):
        tool = folder / "bin" / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
        tool.chmod(0o755)


def run(folder: Path, script: str) -> str:
    """What a block prints, stdout and stderr."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    own.pop("COLUMNS", None)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=own, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ended.returncode == 0, f"{script}\n{ended.stdout[-3000:]}"
    return PROGRESS.sub("", ended.stdout)


def test_the_first_command_ends_with_what_the_readme_shows(tmp_path: Path) -> None:
    furnish(tmp_path, whole=True)
    readme = PAGES[0].read_text("utf-8")
    command = BLOCK.findall(readme)[0][1].split("&&")[-1].replace(".venv/bin/", "")
    shown = readme.split("\nThe first ends with\n\n```text\n")[1].split("```")[0]
    compare("…\n" + shown, run(tmp_path, command))


SHOWING = [page for page in PAGES if SHELL.search(page.read_text("utf-8"))]


@pytest.mark.slow(20)
@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.stem)
def test_page_runs(tmp_path: Path, page: Path) -> None:
    scripts = SHELL.findall(page.read_text("utf-8"))
    furnish(tmp_path, whole=page == PAGES[0] or any(shown for _, shown in scripts))
    for script, shown in scripts:
        if not script.startswith(SETUP):
            printed = run(tmp_path, script)
            print(f"{script}\n{printed}")
            if shown:
                compare(shown, printed)
