"""The blocks of docs/loading.md for other runtimes, word for word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("command", "code"), BLOCKS, ids=[c.split()[-1] for c, _ in BLOCKS])
def test_block(tmp_path: Path, command: str, code: str) -> None:
    shutil.copytree(ROOT / "sample_data", tmp_path / "sample_data")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "ptq"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m ptq_cli "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=own, check=True)
    (tmp_path / "block.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=own, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    print(ended.stdout[-300:])
    assert ended.stdout.strip()
