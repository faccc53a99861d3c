"""Completion: what TAB offers in bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptq_cli.cli import main
from tests.builders import ROOT, ptq

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def path(tmp_path) -> str:
    """A PATH with a `ptq` on it, and some files to complete in the current folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ptq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ptq_cli "$@"\n')
    (folder / "ptq").chmod(0o755)
    for name in ("models/a.safetensors", "models/b/config.json", "models/notes.txt", "t.toml"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()
    return f"{folder}:{os.environ['PATH']}"


def run(path, *command, **env):
    env = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(Path.cwd()), **env}
    result = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in result.stderr, result.stderr
    return result.stdout.decode()


def offered(monkeypatch, capsys, shell, line):
    """What the shell's function is told for a line, as click's protocol has it: (type, value)."""
    words = line.split(" ")
    count = words[-1] if shell == "fish" else str(len(words) - 1)
    env = {"_PTQ_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": count}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main.run([])
    answer = capsys.readouterr().out.strip().splitlines()
    if shell == "zsh":
        return list(zip(answer[::3], answer[1::3], strict=True))
    return [tuple(entry.split("\t")[0].split(",", 1)) for entry in answer]


CASES = {
    "ptq ca": [("plain", "calibrate")],
    "ptq ": [("plain", name) for name in main.COMMANDS],
    "ptq --v": [("plain", "--version")],
    "ptq gptq --group": [("plain", "--group-size")],
    "ptq gptq --as": [("plain", "--asym")],
    "ptq pack --format a": [("plain", "awq")],
    "ptq smoothquant m --then ": [("plain", "rtn"), ("plain", "gptq")],
    "ptq check --runtime m": [("plain", "mlx")],
    "ptq completion f": [("plain", "fish")],
    "ptq gptq mod": [("file", "mod")],
    "ptq rtn models/b --config t": [("file", "t")],
}


FEW = ("ptq ca", "ptq gptq --as", "ptq gptq mod")  # what is offered does not depend on the shell


@pytest.mark.parametrize(
    ("shell", "line"),
    [*(("bash", line) for line in CASES), *((shell, x) for shell in ("zsh", "fish") for x in FEW)],
)
def test_commands_options_choices_and_files(shell, line, path, monkeypatch, capsys):
    assert offered(monkeypatch, capsys, shell, line) == CASES[line]


@pytest.mark.slow
def test_bash_itself(path):
    """The script in a real bash; compopt works only while it completes, so it is written down."""
    script = (
        'eval "$(ptq completion bash)"; compopt() { echo compopt "$@"; };'
        'COMP_WORDS=(ptq "$@"); COMP_CWORD=$#; _ptq_completion ptq;'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def complete(*words):
        return run(path, "bash", "--norc", "-c", script, "bash", *words).splitlines()

    assert complete("gptq", "--fo") == ["--format", "--force"]
    assert complete("check", "x", "--runtime", "llama") == ["llama.cpp"]
    assert complete("gptq", "models/")[0] == "compopt -o default"  # bash completes the file


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_itself(path):
    def complete(line):
        script = f"ptq completion fish | source; complete -C '{line}'"
        answer = run(path, "fish", "--no-config", "-c", script)
        return [entry.split("\t")[0] for entry in answer.splitlines()]

    assert complete("ptq gptq --group") == ["--group-size"]
    assert complete("ptq pack --format a") == ["awq"]
    assert complete("ptq gptq models/") == ["models/a.safetensors", "models/b/"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_itself(path):
    """In a terminal, as zsh completes nowhere else: what stands on the line after each TAB."""
    env = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(Path.cwd()), "TERM": "dumb"}
    master, slave = pty.openpty()
    zsh = subprocess.Popen(
        ["zsh", "-f", "-i"],
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)

    def answer(keys, end):
        os.write(master, keys.encode())
        shown = ""
        while end not in shown:
            ready, _, _ = select.select([master], [], [], 30)
            assert ready, shown
            shown += os.read(master, 1 << 16).decode()
        return shown

    try:
        answer("autoload -U compinit; compinit -u -D; echo rea''dy\n", "\r\nready")
        answer('eval "$(ptq completion zsh)"; echo se""t\n', "\r\nset")
        answer("ptq check mode\t", "models/")
        answer("a\t", "a.safetensors ")
        answer("--run\t", "--runtime ")
        answer("vl\t", "vllm ")
    finally:
        zsh.kill()
        zsh.wait()
        os.close(master)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell, path):
    outcome = ptq("completion", shell)
    assert (outcome.code, outcome.err) == (0, "")
    assert "_PTQ_COMPLETE" in outcome.out
    asked = run(path, "ptq", _PTQ_COMPLETE=f"{shell}_source")
    assert outcome.out.rstrip() == asked.rstrip()


def test_an_unknown_shell_is_refused(path):
    assert ptq("completion", "tcsh").code == 2
    assert run(path, "ptq", _PTQ_COMPLETE="tcsh_source") == ""


def test_names_of_commands_are_completed_without_importing_them(path):
    script = (
        "import atexit, sys; from ptq_cli.cli.main import run;"
        " atexit.register(lambda: print(*sys.modules, file=sys.stderr)); run([])"
    )
    env = {"_PTQ_COMPLETE": "bash_complete", "COMP_WORDS": "ptq ", "COMP_CWORD": "1"}
    command, names = [sys.executable, "-c", script], {"PATH": path, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env={**names, **env}, capture_output=True, check=True)
    assert b"plain,gptq" in result.stdout
    modules = result.stderr.decode().split()
    for name in ("numpy", "rich", "safetensors", "ptq_cli.cli.completion", "ptq_cli.cli.quantize"):
        assert name not in modules
