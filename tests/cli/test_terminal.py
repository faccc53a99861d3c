"""Terminals, pipes and environments: same files, same exit code, readable words."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from ptq_cli.cli.main import COMMANDS
from tests.builders import OUTPUT, ROOT, apart, ptq, random_weight, small_job, tree, write_model

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HOME": "/nowhere",
    "TERM": "xterm-256color",
}
PTQ = [sys.executable, "-m", "ptq_cli"]
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07)")


def start(*arguments, env=None, **options):
    """The command as a process of its own, without what this one's environment holds."""
    command = PTQ + [str(argument) for argument in arguments]
    options = {"stdin": subprocess.DEVNULL, "timeout": 60, **options}
    return subprocess.run(command, env={**ENVIRONMENT, **(env or {})}, check=False, **options)


def shell(line, **env):
    """A line for the shell, `ptq` being the command."""
    line = line.replace("ptq ", " ".join(PTQ) + " ")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env={**ENVIRONMENT, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )


def on_terminal(*arguments, columns=80, env=None):
    """Run on a terminal of that width; exit code and everything it showed."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = PTQ + [str(argument) for argument in arguments]
    process = subprocess.Popen(
        command, env={**ENVIRONMENT, **(env or {})}, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b""
    while True:
        ready, _, _ = select.select([master], [], [], 60)
        assert ready, "nothing was shown for a minute"
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    return process.wait(), shown.decode()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small model, its activations and a quantized folder; not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    model, _ = small_job(folder)
    outcome = ptq("gptq", model, "--activations", folder / "acts", "-o", folder / "out")
    assert outcome.code == 0
    return folder


# ---- streams ----


def test_a_reader_that_leaves_is_no_error(packed, job):
    result = shell(f"ptq pack {job} -o out --json --quiet | head -c 1")
    assert result.returncode == 0
    assert result.stdout == b"{"
    assert result.stderr == b""
    assert sorted(os.listdir("out")) == OUTPUT
    result = shell(f"ptq eval {packed}/model.safetensors {packed}/out --top 0 | true")
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", [">/dev/full", ">&-"])
def test_work_is_done_before_it_is_told(target, packed, job):
    result = shell(f"ptq pack {job} -o out {target}")
    assert result.returncode in (0, 1)
    assert b"Traceback" not in result.stderr
    assert b"internal error" not in result.stderr
    assert tree(Path("out")).keys() == set(OUTPUT)
    assert not list(Path().glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("target", [">/dev/full", ">&-"])
@pytest.mark.parametrize("style", ["", "--json"])
def test_eval_that_cannot_tell_fails(target, style, packed):
    result = shell(f"ptq eval {packed}/model.safetensors {packed}/out {style} {target}")
    assert result.returncode == 1
    said, _ = apart(result.stderr.decode())
    (line,) = [x for x in said.splitlines() if not x.startswith("ptq: warning")]
    assert line.startswith("ptq: error: ")
    assert "stdout" in line
    assert "internal" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams",
    [
        *("<&- 2>&-", "2>/dev/full"),
        pytest.param("2>&-", marks=pytest.mark.slow),
        pytest.param("<&-", marks=pytest.mark.slow),
    ],
)
def test_streams_that_are_not_there(streams, packed, job):
    result = shell(f"ptq pack {job} -o out {streams}")
    assert result.returncode == 0
    assert b"layers.0" in result.stdout
    assert Path("out/model.safetensors").is_file()
    result = shell(f"ptq pack nowhere.safetensors {streams}")
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr


# ---- environments ----

ENVIRONMENTS = {
    "plain": {},
    "no colour": {"NO_COLOR": "1"},
    "dumb": {"TERM": "dumb"},
    "narrow": {"COLUMNS": "20"},
    "no columns": {"COLUMNS": "0"},
    "columns of words": {"COLUMNS": "wide"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "ASCII, strict": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "force colour": {"FORCE_COLOR": "1"},
}
ALIKE = ("plain", "no columns", "no colour", "ASCII")  # another does what they do


THREE_COMMANDS = """
import sys
from ptq_cli.__main__ import main
run = ["pack", "model.safetensors", "-o", "out"]
for words in (run, ["gptq", "--help"], ["pack", sys.argv[1]]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        print("code", end.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        pytest.param(env, id=name, marks=[pytest.mark.slow] if name in ALIKE else [])
        for name, env in ENVIRONMENTS.items()
    ],
)
def test_the_environment_changes_no_file_and_no_exit_code(env, tmp_path):
    """A run, help and an error, each said in whatever can be shown."""
    name = "schön模型"
    write_model(Path("model.safetensors"), {f"{name}.weight": random_weight(4, 8)})
    command = [sys.executable, "-c", THREE_COMMANDS, "schön.safetensors"]
    result = subprocess.run(command, env={**ENVIRONMENT, **env}, capture_output=True, check=True)
    table, said, failed = result.stdout.split(b"code 0")
    assert failed.split() == [b"code", b"1"]
    progress = rb"\[1/1\] .*\n\[1/1\] wrote model.safetensors, in .*\n"
    error = rb"ptq: error: [^\n]*sch[^\n]*n.safetensors[^\n]*\n"
    assert re.fullmatch(progress + error, result.stderr)
    assert b"internal error" not in result.stderr
    assert len(said) > 1000
    again = ptq("pack", "model.safetensors", "-o", "expected")
    assert again.code == 0
    assert tree(Path("out")) == tree(Path("expected"))
    text = table.decode("latin-1" if "latin-1" in env.values() else "utf-8")
    shown = ESCAPES.sub("", text).replace("\n", "").replace(" ", "")
    escaped = name.encode("ascii", "backslashreplace").decode()
    partly = name.encode("latin-1", "backslashreplace").decode("latin-1")
    assert name in shown or escaped in shown or partly in shown
    assert "\x1b" not in text or "FORCE_COLOR" in env


@pytest.mark.slow
def test_no_home_and_no_term(packed):
    bare = {key: ENVIRONMENT[key] for key in ("PATH", "PYTHONPATH")}
    command = [*PTQ, "eval", str(packed / "model.safetensors"), str(packed / "out")]
    result = subprocess.run(command, env=bare, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0


def test_piped_tables_show_names_in_full(packed):
    result = start(
        "eval",
        packed / "model.safetensors",
        packed / "out",
        env={"COLUMNS": "20"},
        capture_output=True,
    )
    for name in ("q_proj", "down_proj"):
        assert name in result.stdout.decode()


# ---- terminals ----


@pytest.mark.parametrize("command", ["calibrate", "gptq", "pack", "eval"])
def test_nothing_is_wider_than_80_columns(command, packed, job):
    arguments = {
        "calibrate": [job, "--activations", "acts", "-o", "c.safetensors"],
        "gptq": [job, "--activations", "acts", "-o", "out"],
        "pack": [job, "-o", "out"],
        "eval": [job, packed / "out", "--activations", "acts"],
    }[command]
    code, shown = on_terminal(command, *arguments)
    assert code == 0
    lines = [ESCAPES.sub("", part) for part in re.split(r"[\r\n]+", shown)]
    lines = [line for line in lines if ": ptq " not in line]  # to be pasted, so never cut
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any("layers.0" in line or "q_proj" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_colours_where_none_are_wanted(env, job):
    code, shown = on_terminal("pack", job, "-o", "out", env=env)
    assert code == 0
    colours = [m for m in re.findall(r"\x1b\[([0-9;]*)m", shown) if re.search(r"\b[34][0-7]\b", m)]
    assert colours == []
    if env.get("TERM") == "dumb":
        assert "\x1b" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 1])
def test_a_narrow_terminal_is_no_error(columns, job):
    code, shown = on_terminal("rtn", job, "--activations", "acts", "-o", "out", columns=columns)
    assert code == 0
    assert "Traceback" not in shown
    assert "written: out" in shown.replace("\r\n", "\n")


def test_narrow_terminals_lose_no_digit(packed):
    words = ("eval", packed / "model.safetensors", packed / "out", "--activations", packed / "acts")
    _, wide = on_terminal(*words, columns=200)
    table = ESCAPES.sub("", wide.split("layers at")[0].split("layer")[-1])
    numbers = set(re.findall(r"\d+\.\d+(?:e-\d+)?x?", table))
    assert len(numbers) > 8
    for columns in (60, 20, 1):
        narrow = ESCAPES.sub("", on_terminal(*words, columns=columns)[1])
        assert {n for n in numbers if n not in narrow} == set(), columns
        for name in ("q_proj", "k_proj", "o_proj", "down_proj"):
            assert name in narrow


def test_hostile_names_reach_no_terminal(job):
    names = ("\x1b]0;owned\x07", "\x1b[2J", "a\u202eb", "[bold]", "[/x]", ":smile:")
    tensors = {f"{name}.weight": random_weight(4, 8) for name in names}
    write_model(Path("hostile.safetensors"), tensors)
    code, shown = on_terminal("pack", "hostile.safetensors", "-o", "out", columns=120)
    assert code == 0
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    for literal in ("\\x1b]0;owned", "\\x1b[2J", "\\u202e", "[bold]", "[/x]", ":smile:"):
        assert literal in shown


def test_json_is_alone_on_stdout(job):
    result = start("gptq", job, "--activations", "acts", "--json", "-o", "o2", capture_output=True)
    assert json.loads(result.stdout)["output"] == "o2"
    assert b"[4/4] " in result.stderr


# ---- help ----


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_fits_80_columns(command):
    outcome = ptq(*command, "--help")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "Usage: ptq" in outcome.out
    if command:
        assert "-o, --output" in outcome.out or command in (
            *(["eval"], ["inspect"], ["check"], ["completion"], ["diff"]),
        )
    else:
        for name in COMMANDS:
            assert f"  {name} " in outcome.out


def test_help_needs_neither_numpy_nor_rich_nor_plugins():
    """Imports are what makes it slow; time would depend on the machine."""
    script = (
        "import sys; from ptq_cli.cli.main import run; code = run(['--help']);"
        "print(sorted(m for m in sys.modules), file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, check=True
    )
    modules = result.stderr.decode()
    for name in ("numpy", "rich", "safetensors", "ml_dtypes", "ptq_cli.methods", "ptq_cli.formats"):
        assert f"'{name}" not in modules, name


def test_the_version_names_the_kernel():
    outcome = ptq("--version")
    assert outcome.code == 0
    assert re.match(r"ptq \d+\.\d+.*BLAS: .+\)\n$", outcome.out)


def test_debug_shows_the_traceback():
    outcome = ptq("--debug", "pack", "nowhere.safetensors")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "Traceback" not in ptq("pack", "nowhere.safetensors").err
