"""The blocks of docs/loading.md for other runtimes, word for word."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.interop.own_process import in_own_process

pytestmark = pytest.mark.interop
if not all(find_spec(name) for name in ("torch", "gptqmodel", "mlx_lm", "gguf")):
    pytest.skip("needs the extra interop", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "loading.md").read_text("utf-8")
SECTION = PAGE.split("\n## In other people's runtimes\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```sh\n(ptq .*?)```\n\n```python\n(.*?)```", SECTION, re.DOTALL)


def test_there_is_a_block_for_each() -> None:
    formats = [command.split()[-1] for command, _ in BLOCKS]
    assert formats == ["compressed-tensors", "fp8", "gptq", "awq", "gguf", "mlx"]


def printed_by(code: str, folder: Path) -> str:
    """What a script prints that is run in a folder."""
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "block.py", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


@pytest.mark.parametrize(("command", "code"), BLOCKS, ids=[c.split()[-1] for c, _ in BLOCKS])
def test_block(tmp_path: Path, command: str, code: str) -> None:
    shutil.copytree(ROOT / "sample_data", tmp_path / "sample_data")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "ptq"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m ptq_cli "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=own, check=True)
    assert in_own_process(printed_by, code, tmp_path).strip()
